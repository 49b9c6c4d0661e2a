"""Fourier transforms as products with matrices of cosines and sines: ``X[k] = sum_j x[j] exp(-2 pi i j k / n)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.ir.node_reading import rank_of, shape_of

aten = torch.ops.aten
Apply = Callable[..., Node]
NORMS: dict[int, Callable[[int], float]] = {0: lambda n: 1.0, 1: lambda n: n**-0.5, 2: lambda n: 1 / n}
"""The factor of a transform of n numbers, by PyTorch's number for ``norm``."""


@dataclass(frozen=True)
class Parts:
    """A complex tensor: its real and its imaginary part; None is zero."""

    real: Node
    imaginary: Node | None


@dataclass
class Fourier:
    """The writer of Fourier transforms over some dims of a tensor.

    Args:
        apply: Puts an operator into the graph: its target, then its arguments.
        store: Puts a constant into the graph, under a name.
    """

    apply: Apply
    store: Callable[[str, Tensor], Node]
    _stored: dict[tuple[object, ...], Node] = field(default_factory=dict)

    def of_real(self, x: Node, dims: list[int], norm: int, onesided: bool) -> Parts:
        """Transforms real numbers (``_fft_r2c``).

        One-sided: the first n // 2 + 1 entries of the last dim.
        """
        sizes = [shape_of(x)[d] for d in dims]
        n, last = sizes[-1], dims[-1]
        scale, kept = NORMS[norm](math.prod(sizes)), n // 2 + 1 if onesided else n
        cos, sin = (self._matrix(kind, n, n, kept, x, scale) for kind in ("cos", "sin"))
        parts = Parts(self._along(x, last, cos), self.apply(aten.neg.default, self._along(x, last, sin)))
        return self.of_complex(parts, dims[:-1], 0, forward=True)

    def of_complex(self, x: Parts, dims: list[int], norm: int, *, forward: bool) -> Parts:
        """Transforms complex numbers, or back (``_fft_c2c``)."""
        sizes = [shape_of(x.real)[d] for d in dims]
        scale = NORMS[norm](math.prod(sizes))
        for n, d in zip(sizes, dims, strict=True):
            cos, sin = (self._matrix(kind, n, n, n, x.real, scale) for kind in ("cos", "sin"))
            x, scale = self._turned(x, d, cos, sin, forward), 1.0
        return x

    def to_real(self, x: Parts, dims: list[int], norm: int, size: int) -> Node:
        """Finds the real numbers whose one-sided transform is given (``_fft_c2r``).

        ``size`` of them in the last dim.
        """
        sizes = [*(shape_of(x.real)[d] for d in dims[:-1]), size]
        scale, last = NORMS[norm](math.prod(sizes)), dims[-1]
        x = self.of_complex(x, dims[:-1], 0, forward=False)
        kept = shape_of(x.real)[last]
        cos, sin = (self._matrix(f"both {kind}", size, kept, size, x.real, scale) for kind in ("cos", "sin"))
        real = self._along(x.real, last, cos)
        return real if x.imaginary is None else self.apply(aten.sub.Tensor, real, self._along(x.imaginary, last, sin))

    def _turned(self, x: Parts, dim: int, cos: Node, sin: Node, forward: bool) -> Parts:
        """Computes ``(a + ib)(c - is)`` forward, ``(a + ib)(c + is)`` back."""
        of_real = self._along(x.real, dim, sin)
        if x.imaginary is None:
            return Parts(self._along(x.real, dim, cos), self.apply(aten.neg.default, of_real) if forward else of_real)
        plus, minus = (aten.add.Tensor, aten.sub.Tensor) if forward else (aten.sub.Tensor, aten.add.Tensor)
        real = self.apply(plus, self._along(x.real, dim, cos), self._along(x.imaginary, dim, sin))
        return Parts(real, self.apply(minus, self._along(x.imaginary, dim, cos), of_real))

    def _along(self, x: Node, dim: int, matrix: Node) -> Node:
        """Computes the product over one dim."""
        last = rank_of(x) - 1
        if dim == last:
            return self.apply(aten.matmul.default, x, matrix)
        product = self.apply(aten.matmul.default, self.apply(aten.transpose.int, x, dim, last), matrix)
        return self.apply(aten.transpose.int, product, dim, last)

    def _matrix(self, kind: str, n: int, rows: int, columns: int, like: Node, scale: float) -> Node:
        """Computes cosines or sines of ``2 pi j k / n``, times a scale; "both": of rows that stand for two."""
        dtype = like.meta["val"].dtype
        key = kind, n, rows, columns, dtype, scale
        if key not in self._stored:
            turns = torch.outer(torch.arange(rows), torch.arange(columns)) % n
            angles = turns.double() * (2 * math.pi / n)
            values = (torch.cos(angles) if kind.endswith("cos") else torch.sin(angles)) * scale
            if kind.startswith("both"):
                values[1 : (n + 1) // 2] *= 2
            self._stored[key] = self.store(f"fourier.{kind.split()[-1]}", values.to(dtype))
        return self._stored[key]
