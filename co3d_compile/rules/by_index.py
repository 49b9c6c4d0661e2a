"""Reading and writing at computed indices, such as those of the largest entries: along other dims than time."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.layout import PLAIN, Axis, Layout
from co3d_compile.ir.node_reading import operand, operands, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, constant_of, fact_of, is_stream, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(
    aten.gather.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)
class ByIndex(Rule):
    """``gather`` and ``scatter``: each frame is read, or written to, at indices of its own."""

    why = "reads or writes entries of the clip by their index"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        dim = Arguments(node).dim(operand(node))
        return [(n, [dim]) for n in operands(node) if fact_of(n).kind is not Kind.STATIC]

    def layout(self, node: Node) -> Layout:
        moving = next(n for n in operands(node) if fact_of(n).kind is not Kind.STATIC)
        layout = known(moving).sized(shape_of(node), range(rank_of(node)))
        if node.target is not aten.gather.default:
            return layout
        dim, index = Arguments(node).dim(operand(node)), operands(node)[1]  # where the index says what stands
        own = known(index).dims[dim] if fact_of(index).kind is not Kind.STATIC else (Axis(PLAIN, shape_of(index)[dim]),)
        return layout.replace(dim, own)

    def flow(self, node: Node) -> Fact:
        fact, place = super().flow(node), self.layout(node).time
        for n in operands(node):
            if place is None or shape_of(n)[place.dim] != shape_of(node)[place.dim]:
                raise NoExtension(self.why)
            if is_stream(n) and known(n).dims[place.dim] != self.layout(node).dims[place.dim]:
                raise NoExtension("time stands in two different dims")
            alike = constant_of(n).filling or place.dim in constant_of(n).alike
            if not is_stream(n) and not alike:
                raise NoExtension("meets a constant with a time axis")
        return fact

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        layout = known(node)
        place, batch = layout.time, layout.batch
        assert place is not None
        like = low.whole_entry(next(n for n in operands(node) if is_stream(n)), i)

        def one(n: Node) -> Node:
            if is_stream(n):
                return low.whole_entry(n, i)
            row = low.first_row(n, place.dim)
            if batch is None or batch.dim != place.dim:
                rows = [low.sizes(like)[d] if d == place.dim else size for d, size in enumerate(low.sizes(row))]
                row = low.call(aten.expand.default, row, rows)
            return row if batch is None else low.with_batch_of(row, like, batch.dim, batch.dim)

        args, kwargs = map_arg((node.args, node.kwargs), one)
        x, dim, index, *rest = args
        index = self._inside(node, low, x, dim, index)
        return low.without_time(node, low.call(node.target, x, dim, index, *rest, **kwargs))

    def _inside(self, node: Node, low: StepGraph, x: Any, dim: Any, index: Any) -> Any:
        """Limits indices to places that are there, whatever a frame or state has: NaN, cast to an integer, is none."""
        casts = any(n.target is aten._to_copy.default for n in computed_from(operands(node)[1]))
        return low.call(aten.clamp.default, index, 0, low.sizes(x)[dim] - 1) if casts else index


@register(aten.max_pool2d_with_indices.default)
class PoolWithIndices(Rule):
    """A pool over space that says where each maximum was."""

    why = "pools over time, and says where each maximum was"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        return [(operand(node), [-2, -1])]

    def layouts(self, node: Node) -> list[Layout]:
        return [known(operand(node)).sized(tuple(part.shape), [-2, -1]) for part in node.meta["val"]]

    def layout(self, node: Node) -> Layout:
        return self.layouts(node)[0]

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        """Writes the entries of both outputs."""
        x = operand(node)
        both = [low.call(node.target, low.whole_entry(x, i), *node.args[1:]) for i in range(low.pulse(x))]
        return [[low.without_time(x, low.call(operator.getitem, pair, k)) for pair in both] for k in range(2)]
