"""The rule of users' own operators: made of what ``co3d.rule`` was told, and checked against the operator itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from co3d_compile.errors import Co3dError, UnsupportedError, UsageError
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.layout import TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, shape_of, where
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, fact_of, is_stream, known
from co3d_compile.rules.base import Rule
from co3d_compile.rules.pointwise import POINTWISE
from co3d_compile.step_graph.step_graph import StepGraph
from co3d_compile.user_operators.entry_function import (
    Call,
    Compute,
    Entries,
    Function,
    by_function,
    by_operator,
    inline,
    over_clip,
)

aten = torch.ops.aten
T = TypeVar("T", Node, Tensor)
V = TypeVar("V")


@dataclass(eq=False)
class CustomRule(Rule):
    """The rule of a user's operator; see :func:`rule`."""

    built_in: ClassVar[bool] = False

    pointwise: bool = False
    dims: Sequence[int] | Callable[..., Sequence[int]] | None = None
    slide: Kernel | Callable[..., Kernel] | None = None
    dim: int | Callable[..., int] = 2
    decomposition: Function | None = None
    translated: bool = False
    function: Function | None = None

    # --- what it does to time

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        dims = list(of_call(self.dims or (), node))
        if self.slide is not None and self.kernel(node) is None:
            dims.append(of_call(self.dim, node))
        return [(n, [d for d in dims if -known(n).rank <= d < known(n).rank]) for n in moving(node)]

    def layout(self, node: Node) -> Layout:
        """Takes the layout of the first operand: every dim keeps its place, and the batch its size."""
        if self.pointwise:
            return POINTWISE.layout(node)
        out, shape = known(moving(node)[0]), shape_of(node)
        if out.rank != len(shape):
            raise LayoutLost
        for d, size in enumerate(shape):
            labels = [a for a in out.dims[d] if a.label]
            if out.shape[d] != size:
                if labels and (len(out.dims[d]) > 1 or labels[0].label != TIME):
                    raise LayoutLost
                out = out.replace(d, [Axis(TIME, size)] if labels else [Axis("", size)])
        return out

    def kernel(self, node: Node) -> Kernel | None:
        x = node.args[0] if node.args else None
        if self.slide is None or not isinstance(x, Node) or not is_stream(x):
            return None
        place = known(x).time
        kernel, dim = self.geometry(node)
        return kernel if place is not None and place.alone and place.dim == dim else None

    def geometry(self, node: Node) -> tuple[Kernel, int]:
        """The kernel and the dim it slides over, whether that is time or not."""
        assert self.slide is not None
        x = operand(node)
        dim = of_call(self.dim, node) % len(shape_of(x))
        kernel, old, new = of_call(self.slide, node), shape_of(x)[dim], shape_of(node)[dim]
        if kernel.s == 1 and kernel.p_end == 0:
            kernel = replace(kernel, p_end=new - old - kernel.p + (kernel.k - 1) * kernel.d)
        if kernel.length(old) != new:
            raise UsageError(
                f"{kernel} makes {kernel.length(old)} entries of {old}, but the operator makes {new}.",
                **where(node),
                hint="Are stride, padding and p_end right?",
            )
        return kernel, dim

    def flow(self, node: Node) -> Fact:
        if self.pointwise:
            return POINTWISE.flow(node)
        fact, kernel = super().flow(node), self.kernel(node)
        if kernel is None:
            if fact.clip != max(fact_of(n).clip for n in moving(node)):
                raise NoExtension("changes the number of entries, and no kernel says how")
            return fact
        x = operand(node)
        if len(moving(node)) > 1:
            raise NoExtension("slides over one operand while another streams too")
        return fact_of(x).through(kernel, self.layout(node).resize(TIME, fact_of(x).clip))

    # --- how it is computed

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        kernel = self.kernel(node) or Kernel()
        compute = self._on_entries(node)
        self._check(node, low, compute, kernel)
        fact = fact_of(moving(node)[0])
        spread = fact.spacing if fact.dense else 1
        results = []
        for o in range(low.pulse(node)):
            at = range(o * fact.flowing(kernel).s, 2**40, spread)
            results.append(inline(node, low, compute, self._operands(node, low.entry, o, at, low.call, low.plain)))
        return results

    def _on_entries(self, node: Node) -> Compute:
        """Makes what computes one entry of the output from what :meth:`_operands` gives."""
        call = self.decomposition or target_of(node)
        layout = known(node)
        if self.pointwise:
            return by_function(self.function or call)
        if self.function is None:
            dim = layout.time.dim if layout.time is not None and layout.time.alone else None
            return by_operator(call, self.kernel(node) or Kernel(), dim)
        if self.slide is None or self.kernel(node) is not None:
            return by_function(self.function)
        kernel, dim = self.geometry(node)
        return over_clip(self.function, kernel, layout.entry_dims()[dim])

    def _operands(
        self,
        node: Node,
        entry: Callable[[Node, int], T],
        o: int,
        at: range,
        call: Callable[..., T],
        plain: Callable[[Node], T],
    ) -> Call:
        """Writes the arguments for entry ``o`` of the output; a sliding operand's are those at the indices ``at``."""
        kernel, own = self.kernel(node), known(node).time

        def operand(n: Node) -> Entries | T:
            if not is_stream(n):
                right = len(shape_of(node)) - own.dim if self.pointwise and own is not None and own.alone else 0
                rank = len(shape_of(n))
                return call(aten.squeeze.dim, plain(n), rank - right) if 0 < right <= rank else plain(n)
            layout = known(n)
            batch, time = layout.entry().batch, layout.time
            dim, first = time.dim if time is not None and time.alone else None, batch.dim if batch is not None else 0
            if kernel is not None:
                taps = range(0, (kernel.k - 1) * kernel.d + 1, kernel.d if self.function is not None else 1)
                return Entries(tuple(entry(n, at[i]) for i in taps), dim, first, True)
            if self.slide is not None and self.function is not None:
                dim = layout.entry_dims()[self.geometry(node)[1]]
            return Entries((entry(n, o),), dim, first, self.slide is not None)

        return Call.of(node, operand)

    def window(self, node: Node, low: StepGraph) -> Node:
        if self.decomposition is None and (self.function is None or self.translated):
            return low.same(node)
        compute, operand = self._on_clip(node)
        if self.decomposition is None:
            self._check(node, low, compute, None)
        return inline(node, low, compute, whole_operands(node, operand, low.plain))

    def _on_clip(self, node: Node) -> tuple[Compute, Callable[[Node], Entries | None]]:
        """Makes what computes the whole output, and what it takes for an operand."""
        kernel, over = self.geometry(node) if self.slide is not None else (Kernel(), None)
        layouts = {n: fact_of(n).layout for n in [*moving(node), node]}
        times = {n: lay.time for n, lay in layouts.items() if lay is not None}
        if self.decomposition is None and not self.pointwise and over is None and len(times) < len(layouts):
            raise UnsupportedError(
                "The function for one entry cannot be applied to this window.",
                **where(node),
                hint="Give decomposition= or onnx= too.",
            )

        def dim_of(n: Node) -> int | None:
            place = times.get(n)
            return place.dim if place is not None and place.alone else None

        def operand(n: Node) -> Entries | None:
            if n not in layouts:
                return None
            layout = layouts[n]
            batch = layout.batch.dim if layout is not None and layout.batch is not None else 0
            if self.decomposition is not None or self.pointwise:
                return Entries((), None, batch)
            slides = over is not None and n is node.args[0]
            return Entries((), over if slides else dim_of(n), batch, slides)

        if self.decomposition is not None or self.pointwise:
            return by_function(self.decomposition or self.function or target_of(node)), operand
        assert self.function is not None
        out = over if over is not None else dim_of(node)
        return over_clip(self.function, kernel, out) if out is not None else by_function(self.function), operand

    # --- whether it is true

    def _check(self, node: Node, low: StepGraph, compute: Compute, kernel: Kernel | None) -> None:
        """Compares what was said with the operator itself, on random numbers.

        Args:
            kernel: Of the stream; None: the whole output is computed.

        Raises:
            UsageError: They differ.
        """
        real = {n: real_value(n, low) for n in node.all_input_nodes}
        if any(n.op != "get_attr" and not x.is_floating_point() for n, x in real.items()):
            return
        try:
            with torch.no_grad():
                sample = self._on_clip_of(node, real) if kernel is None else self._at_one_entry(node, real, kernel)
                if sample is None:
                    return
                call, wanted = sample
                found = compute(call)
        except NotImplementedError:  # the operator has no kernel on this machine
            return
        except Co3dError:
            raise
        except Exception as error:
            raise UsageError(
                f"What its rule says fails on random numbers: {type(error).__name__}: {error}", **where(node)
            ) from error
        compare(node, found, wanted, kernel is None)

    def _on_clip_of(self, node: Node, real: dict[Node, Tensor]) -> tuple[Call, Tensor]:
        """Writes the arguments for the whole output, and computes what the operator makes of them."""
        return whole_operands(node, self._on_clip(node)[1], real.__getitem__), called(node, real)

    def _at_one_entry(self, node: Node, real: dict[Node, Tensor], kernel: Kernel) -> tuple[Call, Tensor] | None:
        """Writes the arguments for one entry far from the ends, and says which that is.

        None where padding reaches every entry.
        """
        last = max(fact_of(n).clip for n in moving(node)) - 1
        first, end = max(0, -(-kernel.p // kernel.s)), (last + kernel.p - (kernel.k - 1) * kernel.d) // kernel.s
        if first > end:
            return None
        o = (first + end) // 2

        def entry(n: Node, i: int) -> Tensor:
            own = known(n).time
            return real[n].select(own.dim, min(i, own.size - 1)) if own is not None and own.alone else real[n]

        at = range(o * kernel.s - kernel.p, 2**40)
        call = self._operands(node, entry, o, at, lambda f, *a: f(*a), real.__getitem__)
        wanted, place = called(node, real), known(node).time
        return call, wanted.select(place.dim, o) if place is not None and place.alone else wanted


def whole_operands(
    node: Node, operand: Callable[[Node], Entries | None], value: Callable[[Node], Node | Tensor]
) -> Call:
    """Writes the arguments for the whole output: operands with their time, and what is said of each by ``operand``."""

    def new(n: Node) -> Entries | Node | Tensor:
        entries = operand(n)
        return replace(entries, items=(value(n),)) if entries is not None else value(n)

    return Call.of(node, new)


def called(node: Node, real: dict[Node, Tensor]) -> Tensor:
    """Runs the operator itself on tensors."""
    return Call.of(node, real.__getitem__).to(target_of(node))


def target_of(node: Node) -> Function:
    """The operator of a node, to be called."""
    assert callable(node.target)
    return node.target


def compare(node: Node, found: Tensor, wanted: Tensor, whole: bool) -> None:
    """Refuses a rule that says something else than the operator does."""
    if found.shape != wanted.shape:
        raise UsageError(
            f"Its rule gives an entry of shape {tuple(found.shape)}, not {tuple(wanted.shape)}.", **where(node)
        )
    a, b = found.double().nan_to_num(), wanted.double().nan_to_num()
    off = float((a - b).abs().max()) if a.numel() else 0.0
    if off > 1e-4 * max(float(b.abs().max()) if b.numel() else 0.0, 1e-12):
        hint = (
            "Outside of the window it must read zeros: give decomposition= or onnx= too."
            if whole
            else "Which entries does it read, and in which order?"
        )
        raise UsageError(f"The operator and its rule differ by {off:.3g} on random numbers.", **where(node), hint=hint)


def of_call(value: V | Callable[..., V], node: Node) -> V:
    """Reads an argument of :func:`rule`, or what it is for this call of the operator."""
    if not callable(value):
        return value
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        return value(*args, **kwargs)
    except Exception as error:
        raise UsageError(
            f"A function given to its rule fails: {type(error).__name__}: {error}",
            **where(node),
            hint="It takes the operator's own arguments.",
        ) from error


def moving(node: Node) -> list[Node]:
    """Lists the operands that are no constants."""
    return [n for n in node.all_input_nodes if fact_of(n).kind is not Kind.STATIC]


def real_value(node: Node, low: StepGraph) -> Tensor:
    """Reads a constant's value; draws random numbers for any other operand."""
    if node.op == "get_attr":
        return low.program.constant(node)
    value = node.meta["val"]
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype)
    return torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0))
