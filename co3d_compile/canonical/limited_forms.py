"""Convolutions and pools over time that read less of the future: a pad in front, the operator, and a crop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.node_reading import rank_of, schema_of, shape_of, spread
from co3d_compile.ir.operator_arguments import Arguments

aten = torch.ops.aten
Make = Callable[..., Node]


@dataclass(frozen=True)
class _Over:
    """A convolution or pool as it slides over one of the dims of its operand."""

    node: Node
    dim: int

    @property
    def names(self) -> tuple[str, str]:
        """The first two arguments: what it reads, and what says how long its kernel is."""
        return ("input", "weight") if self.is_conv else ("self", "kernel_size")

    @property
    def given(self) -> Arguments:
        return Arguments(self.node)

    @property
    def is_conv(self) -> bool:
        return "conv" in str(self.node.target)

    @property
    def x(self) -> Node:
        return self.given.tensor(self.names[0])

    @property
    def dims(self) -> int:
        """Over how many dims it slides."""
        if self.is_conv:
            return rank_of(self.given.tensor("weight")) - 2
        return int(str(self.node.target).split("pool")[1][0])

    @property
    def axis(self) -> int:
        """Which of these is the one."""
        return self.dim - (rank_of(self.x) - self.dims)

    def sizes(self, name: str) -> list[int]:
        """Reads an argument, for each dim."""
        value = self.given.given(name)
        if not self.is_conv and name == "stride" and not value:
            return self.sizes("kernel_size")
        return spread(value, self.dims) if value is not None else [1] * self.dims

    @property
    def kernel(self) -> Kernel:
        """The index equation."""
        long = shape_of(self.given.tensor("weight"))[2:] if self.is_conv else self.sizes("kernel_size")
        d, s = (self.sizes(name)[self.axis] for name in ("dilation", "stride"))
        return Kernel(long[self.axis], d, s, *self.pads[self.axis], ceil=bool(self.given.given("ceil_mode")))

    @property
    def pads(self) -> list[tuple[int, int]]:
        """The padding in front and at the end of each dim."""
        padding = self.given.given("padding")
        if not isinstance(padding, str):
            return [(size, size) for size in self.sizes("padding")]
        long = shape_of(self.given.tensor("weight"))[2:]
        both = [d * (k - 1) if padding == "same" else 0 for k, d in zip(long, self.sizes("dilation"), strict=True)]
        return [(size // 2, size - size // 2) for size in both]

    def written(self, make: Make, x: Node, more: Mapping[str, Any]) -> Node:
        """Writes the operator on another operand, with some arguments changed."""
        schema = schema_of(self.node).arguments
        given = self.given
        values = {a.name: given.given(a.name) for a in schema}
        values |= {self.names[0]: x, **more}
        target: Any = self.node.target
        return make(numeric(target), *(values[a.name] for a in schema))


def numeric(target: Any) -> Any:
    """Names the operator that takes its padding in numbers: ``conv3d.padding`` takes a word."""
    return target.overloadpacket.default if target._overloadname == "padding" else target


def limited(node: Node, dim: int, later: int, dropped: int, fold: bool, make: Make) -> Node:
    """Writes a convolution or pool that reads less of the future in front of a node; returns what has its place.

    Args:
        node: A convolution or pool.
        dim: The dim of its operand that is time.
        later: Entries by which the whole kernel stands later.
        dropped: Taps that are left out at its end.
        fold: Whether the weights of these are added to the last one that is left.
        make: Puts an operator in front of the node.
    """
    over = _Over(node, dim)
    kernel, x = over.kernel, over.x
    front, back = kernel.p + later, max(0, kernel.p_end - later - dropped * kernel.d)
    pads = [(0, back - front) for front, back in over.pads]  # what is not alike on both sides is a pad of its own
    pads[over.axis] = (front, back)
    flat = [size for pad in reversed(pads) for size in pad]
    if any(flat):
        x = _padded(x, flat, "max_pool" in str(node.target), make)
    padding = [0 if a == over.axis else front for a, (front, _) in enumerate(over.pads)]
    more: dict[str, Any] = {"padding": padding, "stride": over.sizes("stride")}
    if dropped and over.is_conv:
        more["weight"] = _weight(over, kernel.k - dropped, fold, make)
    elif dropped:
        more["kernel_size"] = [n - dropped if a == over.axis else n for a, n in enumerate(over.sizes("kernel_size"))]
    result = over.written(make, x, more)
    clip = int(over.x.meta["val"].shape[dim])
    shorter = replace(kernel, k=kernel.k - dropped, p=0, p_end=0)
    entries, wanted = shorter.length(clip + front + back), kernel.length(clip)
    return make(aten.slice.Tensor, result, dim, 0, wanted) if entries > wanted else result


def _padded(x: Node, flat: list[int], lowest: bool, make: Make) -> Node:
    """Pads with what a kernel reads outside of its operand: behind a pad that repeats the edge, with the edge again."""
    if "replication_pad" in str(x.target):
        dims = len(Arguments(x).integers("padding"))
        if not any(flat[dims:]):
            return make(x.target, x, [*flat, *[0] * dims][:dims])
    return make(aten.constant_pad_nd.default, x, flat, -math.inf if lowest else 0.0)


def _weight(over: _Over, kept: int, fold: bool, make: Make) -> Node:
    """Takes the first taps of a weight; the others are left out, or added to the last of these."""
    weight, dim, taps = over.given.tensor("weight"), over.axis + 2, over.kernel.k
    if not fold:
        return make(aten.slice.Tensor, weight, dim, 0, kept)
    last = make(aten.sum.dim_IntList, make(aten.slice.Tensor, weight, dim, kept - 1, taps), [dim], True)
    return make(aten.cat.default, [make(aten.slice.Tensor, weight, dim, 0, kept - 1), last], dim) if kept > 1 else last
