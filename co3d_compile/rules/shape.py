"""Operators that move dims about without computing: views, permutations, expansions."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch.fx import Node

from co3d_compile.ir.layout import BATCH, TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments, order_of
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, combine, fact_of, is_stream, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


class Reshaping(Rule):
    """Operators whose output is the same numbers in other dims."""

    def flow(self, node: Node) -> Fact:
        try:
            layout = self.layout(node)
        except LayoutLost:
            raise NoExtension("tears the time axis apart") from None
        fact = combine([fact_of(n) for n in node.all_input_nodes], layout)
        if layout.time is None:
            raise NoExtension("tears the time axis apart")
        return fact

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        """Writes the entry in the shape that the output's layout gives it."""
        return low.call(aten.reshape.default, low.entry(operand(node), i), known(node).entry().sizes())

    def window(self, node: Node, low: StepGraph) -> Node:
        return low.resized(node)


@register(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze,
    aten.unsqueeze.default,
)
class View(Reshaping):
    """Row-major views: time may be folded into batch or channels and comes out again."""

    def layout(self, node: Node) -> Layout:
        x = operand(node)
        lay = known(x)
        if node.target == aten.unsqueeze.default:
            return lay.insert(Arguments(node).dim(node)).as_clip()
        if node.target in (aten.squeeze.dim, aten.squeeze.dims):
            return lay.remove([d for d in Arguments(node).dims(x) if lay.shape[d] == 1])
        return lay.view(shape_of(node))


@register(aten.permute.default, aten.transpose.int)
class Permutation(Reshaping):
    """Permutations of dims."""

    def order(self, node: Node) -> list[int]:
        """The dims of the operand in their new order."""
        order = order_of(node)
        assert order is not None
        return order

    def layout(self, node: Node) -> Layout:
        return known(operand(node)).permute(self.order(node))

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x = operand(node)
        place = known(x).entry_dims()
        order = [e for d in self.order(node) if (e := place[d]) is not None]
        new = low.entry(x, i)
        return new if order == sorted(order) else low.call(aten.permute.default, new, order)

    def window(self, node: Node, low: StepGraph) -> Node:
        return low.same(node)


@register(aten.expand.default, aten.repeat.default)
class Expansion(Reshaping):
    """Expansion of dims of size one; a single entry of time must not be expanded along time, but for a gate's."""

    def layout(self, node: Node) -> Layout:
        lay, shape = known(operand(node)), shape_of(node)
        if node.target == aten.repeat.default:
            counts = Arguments(node).integers("repeats")
            lay = Layout((((),) * (len(counts) - lay.rank)) + lay.dims)
            if any(c != 1 and any(a.label for a in lay.dims[d]) for d, c in enumerate(counts)):
                raise LayoutLost
        out = Layout((((),) * (len(shape) - lay.rank)) + lay.dims)
        again = self.again(node)
        if again is not None:
            out = Layout(tuple(tuple(a for a in dim if a.label != TIME) for dim in out.dims))
            out = out.replace(again, [Axis(TIME, shape[again])])
        for d, size in enumerate(shape):
            if out.shape[d] != size:
                if any(a.label == TIME for a in out.dims[d]):
                    raise LayoutLost
                labels = [a for a in out.dims[d] if a.label == BATCH]
                out = out.replace(d, [*labels, Axis("", size // prod(a.size for a in labels))])
        return out

    def resamples_again(self, node: Node) -> bool:
        x = operand(node)
        return is_stream(x) and not fact_of(x).per_entry

    def again(self, node: Node) -> int | None:
        """Finds the dim along which what a gate pooled is given to every entry again."""
        x, shape = operand(node), shape_of(node)
        fact = fact_of(x)
        if fact.kind is not Kind.STREAM or not fact.per_entry or fact.pooled is None or fact.clip != 1:
            return None
        right, clip, _ = fact.pooled
        old = (*[1] * (len(shape) - rank_of(x)), *shape_of(x))
        return len(shape) - right if len(shape) >= right and (old[-right], shape[-right]) == (1, clip) else None

    def flow(self, node: Node) -> Fact:
        fact = super().flow(node)
        if self.again(node) is None or fact.pooled is None:
            return fact
        return replace(fact, length=fact.pooled[2])

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x = operand(node)
        new, sizes = low.entry(x, i), known(node).entry().sizes()
        again = self.again(node)
        if again is not None:
            time, lead = known(x).time, rank_of(node) - rank_of(x)
            if again >= lead and (time is None or not time.alone):
                new = low.call(aten.squeeze.dim, new, again - lead)
        if node.target == aten.repeat.default:
            counts = zip(Arguments(node).integers("repeats"), known(node).entry_dims(), strict=True)
            return low.call(aten.repeat.default, new, [count for count, dim in counts if dim is not None])
        old = [int(s) for s in new.meta["val"].shape]
        return new if sizes == old else low.call(aten.expand.default, new, sizes)

    def window(self, node: Node, low: StepGraph) -> Node:
        if node.target != aten.expand.default:
            return low.same(node)
        return low.resized(node)
