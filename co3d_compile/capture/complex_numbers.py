"""Writes operators over complex numbers as operators over their real and imaginary parts.

ONNX runtimes compute with real numbers alone. What has no such form here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.fx.node import Argument, Target

from co3d_compile.analysis.operator_families import GATHERS, MOVES, name_of
from co3d_compile.capture.fourier import Fourier, Parts
from co3d_compile.errors import CaptureError
from co3d_compile.ir.graph_edits import erase_dead, insert, insert_constant
from co3d_compile.ir.node_reading import rank_of, where
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import get_constant

aten = torch.ops.aten
Number: TypeAlias = Node | float
Pair: TypeAlias = tuple[Number | None, Number | None]  # real and imaginary parts; None is zero
LINEAR = MOVES | GATHERS.keys() | {"sum", "mean", "cumsum", "neg", "where", "zeros_like"}
"""Do the same to both parts."""
SAME = frozenset({"resolve_conj", "resolve_neg", "clone", "detach", "alias"})
PRODUCTS = frozenset({"mul", "mm", "bmm", "matmul"})


HINT = "Use Fourier transforms, sums, products, exp and views of complex numbers alone, or write it with real numbers."


def as_real_numbers(program: Program) -> None:
    """Replaces complex tensors by two real ones each.

    Raises:
        CaptureError: An operator has no such form, or an input or output of the model is complex.
    """
    if any(_is_complex(n) for n in program.graph.nodes):
        _Rewriting(program).run()
        erase_dead(program.graph)
        program.module.recompile()


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


class _Rewriting:
    """One walk along a graph that finds the parts of each complex tensor.

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.parts: dict[Node, Parts] = {}
        self.at = next(iter(program.graph.nodes))
        self.fourier = Fourier(self.apply, self._constant)

    def run(self) -> None:
        for node in list(self.program.graph.nodes):
            self.at = node
            if node.op == "get_attr" and _is_complex(node):
                value = get_constant(self.program.module, str(node.target))
                self.at = node.next
                parts = [self._constant(f"{node.target}_{name}", getattr(value, name)) for name in ("real", "imag")]
                self.parts[node] = Parts(*parts)
            elif _is_complex(node) or any(map(_is_complex, node.all_input_nodes)):
                if node.op != "call_function":
                    what = "output" if node.op == "output" else f"input {node.name}"
                    hint = "Take and return its parts: torch.view_as_real and torch.view_as_complex."
                    raise CaptureError(
                        f"The {what} of the model is complex; ONNX runtimes have no such numbers.", hint=hint
                    )
                self._operator(node)

    def apply(self, target: Target, *args: Argument, **kwargs: Argument) -> Node:
        """Puts an operator in front of the one that is rewritten."""
        return insert(self.program, self.at, target, *args, **kwargs)

    def _constant(self, name: str, value: Tensor) -> Node:
        first = next(n for n in self.program.graph.nodes if n.op != "get_attr")
        return insert_constant(self.program, first, name, value.contiguous())

    def _operator(self, node: Node) -> None:
        """Finds the parts of a result, or replaces an operator whose result is real."""
        name = name_of(node)
        if not _is_complex(node) and name in REAL_RESULTS:
            node.replace_all_uses_with(REAL_RESULTS[name](self, node))
            self.program.graph.erase_node(node)
        elif name in COMPLEX_RESULTS:
            self.parts[node] = COMPLEX_RESULTS[name](self, node)
        elif name in SAME:
            self.parts[node] = self.parts[node.all_input_nodes[0]]
        elif name in PRODUCTS:
            self.parts[node] = self._product(node.target, *(self._operand(a) for a in node.args[:2]))
        elif name in LINEAR and _is_complex(node):
            self.parts[node] = self._linear(node)
        else:
            what = "An operator over complex numbers has no form in real ones here."
            raise CaptureError(what, **where(node), hint=HINT)

    def of(self, node: Node, name: str = "self") -> Parts:
        """The parts of an argument; of a real one, the tensor and zero."""
        x = Arguments(node).tensor(name)
        return self.parts[x] if x in self.parts else Parts(x, None)

    def _operand(self, value: Argument) -> Pair:
        """The parts of a tensor or a number; None is zero."""
        if isinstance(value, Node):
            parts = self.parts.get(value, Parts(value, None))
            return parts.real, parts.imaginary
        if isinstance(value, complex):
            return value.real, value.imag or None
        assert isinstance(value, (int, float)), f"{value} is no number"
        return value, None

    def _linear(self, node: Node) -> Parts:
        """Applies an operator that does the same to both parts."""
        read = [self.parts[x] for x in node.all_input_nodes if x in self.parts]

        def part(imaginary: bool) -> Node:
            def own(x: Node) -> Node:
                if x not in self.parts:
                    return x
                found = self.parts[x]
                if not imaginary:
                    return found.real
                return self._zeros(found.real) if found.imaginary is None else found.imaginary

            args, kwargs = map_arg((node.args, dict(node.kwargs)), own)
            return self.apply(node.target, *args, **{name: x for name, x in kwargs.items() if name != "dtype"})

        return Parts(part(False), part(True) if any(p.imaginary is not None for p in read) else None)

    def _zeros(self, like: Node) -> Node:
        return self.apply(aten.full_like.default, like, 0)

    def _product(self, target: Target, a: Pair, b: Pair) -> Parts:
        """Computes ``(a + ib)(c + id) = (ac - bd) + i(ad + bc)``."""

        def times(x: Number | None, y: Number | None) -> Node | None:
            return None if x is None or y is None else self.apply(target, x, y)

        real = self._sum(aten.sub.Tensor, times(a[0], b[0]), times(a[1], b[1]))
        assert real is not None
        return Parts(real, self._sum(aten.add.Tensor, times(a[0], b[1]), times(a[1], b[0])))

    def _sum(self, target: Target, a: Number | None, b: Number | None, **kwargs: Argument) -> Node | None:
        """Adds or subtracts; None is zero."""
        if b is None:
            return a  # type: ignore[return-value]
        if a is None:
            b = self.apply(aten.neg.default, b) if target is aten.sub.Tensor else b
            alpha = kwargs.get("alpha", 1)
            return b if alpha == 1 else self.apply(aten.mul.Tensor, b, alpha)  # type: ignore[return-value]
        return self.apply(target, a, b, **kwargs)

    def added(self, node: Node) -> Parts:
        """Computes ``add`` and ``sub``, whose other operand may be real."""
        target = aten.sub.Tensor if name_of(node) == "sub" else aten.add.Tensor
        (a, b), kwargs = (self._operand(x) for x in node.args[:2]), dict(node.kwargs)
        real = self._sum(target, a[0], b[0], **kwargs)
        assert real is not None
        return Parts(real, self._sum(target, a[1], b[1], **kwargs))

    def divided(self, node: Node) -> Parts:
        """Computes ``a / b = a conj(b) / |b|^2``."""
        a, b = (self._operand(x) for x in node.args[:2])
        if b[1] is not None:
            power = self._sum(aten.add.Tensor, self._square(b[0]), self._square(b[1]))
            opposite = -b[1] if isinstance(b[1], float) else self.apply(aten.neg.default, b[1])
            product = self._product(aten.mul.Tensor, a, (b[0], opposite))
            a, b = (product.real, product.imaginary), (power, None)
        real, imaginary = (None if x is None else self.apply(aten.div.Tensor, x, b[0]) for x in a)
        assert real is not None
        return Parts(real, imaginary)

    def _square(self, x: Number | None) -> Number | None:
        if x is None:
            return None
        return self.apply(aten.mul.Tensor, x, x) if isinstance(x, Node) else x * x

    def opposite(self, x: Node | None) -> Node | None:
        """Negates a part."""
        return None if x is None else self.apply(aten.neg.default, x)

    def length(self, node: Node) -> Node:
        """Computes ``|a + ib|``."""
        x = self.of(node)
        if x.imaginary is None:
            return self.apply(aten.abs.default, x.real)
        squares = [self.apply(aten.mul.Tensor, part, part) for part in (x.real, x.imaginary)]
        return self.apply(aten.sqrt.default, self.apply(aten.add.Tensor, *squares))

    def turned(self, node: Node) -> Parts:
        """Computes ``exp(a + ib) = e^a (cos b + i sin b)``."""
        x = self.of(node)
        size = self.apply(aten.exp.default, x.real)
        return Parts(size, None) if x.imaginary is None else self._polar(size, x.imaginary)

    def _polar(self, size: Node, angle: Node) -> Parts:
        cos, sin = (self.apply(f, angle) for f in (aten.cos.default, aten.sin.default))
        return Parts(self.apply(aten.mul.Tensor, size, cos), self.apply(aten.mul.Tensor, size, sin))

    def polar(self, node: Node) -> Parts:
        """Computes ``torch.polar``."""
        given = Arguments(node)
        return self._polar(given.tensor("abs"), given.tensor("angle"))

    def imaginary(self, node: Node) -> Node:
        """The imaginary part, which may be zeros."""
        x = self.of(node)
        return self._zeros(x.real) if x.imaginary is None else x.imaginary

    def viewed(self, node: Node) -> Node:
        """Computes ``view_as_real``; what selects one part takes it without it."""
        real, imaginary = self.of(node).real, self.imaginary(node)
        for user in list(node.users):
            if user.target is aten.select.int and Arguments(user).dim(node) == rank_of(node) - 1:
                user.replace_all_uses_with(imaginary if Arguments(user).integer("index") % 2 else real)
        return self.apply(aten.cat.default, [self.apply(aten.unsqueeze.default, x, -1) for x in (real, imaginary)], -1)

    def of_pairs(self, node: Node) -> Parts:
        """Computes ``view_as_complex``."""
        x = Arguments(node).tensor()
        return Parts(*(self.apply(aten.select.int, x, -1, i) for i in range(2)))

    def cast(self, node: Node) -> Parts:
        """Casts to complex numbers."""
        x = self.of(node)
        dtype = torch.float64 if node.meta["val"].dtype is torch.complex128 else torch.float32

        def to(part: Node) -> Node:
            return part if part.meta["val"].dtype is dtype else self.apply(aten._to_copy.default, part, dtype=dtype)

        return Parts(to(x.real), None if x.imaginary is None else to(x.imaginary))


def _transform(rewriting: _Rewriting, node: Node) -> Parts:
    """Computes ``_fft_r2c`` and ``_fft_c2c``."""
    given = Arguments(node)
    dims, norm = given.dims(given.tensor()), given.integer("normalization")
    if name_of(node) == "_fft_r2c":
        return rewriting.fourier.of_real(given.tensor(), dims, norm, bool(given.integer("onesided")))
    return rewriting.fourier.of_complex(rewriting.of(node), dims, norm, forward=bool(given.integer("forward")))


def _back(rewriting: _Rewriting, node: Node) -> Node:
    """Computes ``_fft_c2r``."""
    given = Arguments(node)
    dims = given.dims(given.tensor())
    last = given.integer("last_dim_size")
    return rewriting.fourier.to_real(rewriting.of(node), dims, given.integer("normalization"), last)


def _angle(rewriting: _Rewriting, node: Node) -> Node:
    return rewriting.apply(aten.atan2.default, rewriting.imaginary(node), rewriting.of(node).real)


def _filled(rewriting: _Rewriting, node: Node) -> Parts:
    """Computes ``full`` and ``full_like``: a start of zeros, for one."""
    like, value = node.args[:2]
    whole = complex(value) if isinstance(value, (int, float, complex)) else None
    if whole is None:
        raise CaptureError("A complex tensor is filled with a number that is computed.", hint=HINT)
    options = {"dtype": node.meta["val"].dtype.to_real(), "device": node.meta["val"].device}
    alike = node.target is aten.full_like.default
    target, first = (aten.full_like.default, rewriting.of(node).real) if alike else (aten.full.default, like)
    real, imaginary = (rewriting.apply(target, first, part, **options) for part in (whole.real, whole.imag))
    return Parts(real, imaginary if whole.imag else None)


def _conjugate(rewriting: _Rewriting, node: Node) -> Parts:
    x = rewriting.of(node)
    return Parts(x.real, rewriting.opposite(x.imaginary))


COMPLEX_RESULTS: dict[str, Callable[[_Rewriting, Node], Parts]] = {
    "_fft_r2c": _transform,
    "_fft_c2c": _transform,
    "add": _Rewriting.added,
    "sub": _Rewriting.added,
    "div": _Rewriting.divided,
    "exp": _Rewriting.turned,
    "polar": _Rewriting.polar,
    "complex": lambda r, node: Parts(Arguments(node).tensor("real"), Arguments(node).tensor("imag")),
    "full": _filled,
    "full_like": _filled,
    "_to_copy": _Rewriting.cast,
    "to": _Rewriting.cast,
    "view_as_complex": _Rewriting.of_pairs,
    "_conj": _conjugate,
    "_conj_physical": _conjugate,
    "conj_physical": _conjugate,
}
"""By operator, the parts of its result."""
REAL_RESULTS: dict[str, Callable[[_Rewriting, Node], Node]] = {
    "abs": _Rewriting.length,
    "angle": _angle,
    "real": lambda r, node: r.of(node).real,
    "imag": _Rewriting.imaginary,
    "view_as_real": _Rewriting.viewed,
    "_fft_c2r": _back,
}
"""By operator over complex numbers, its real result."""
