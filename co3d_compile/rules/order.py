"""Sorting and selecting along a dim: values and indices. Over other dims than time they stream."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node

from co3d_compile.ir.layout import Axis, Layout
from co3d_compile.ir.node_reading import operand, rank_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import Fact, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.kthvalue.default,
    aten.median.dim,
    aten.max.dim,
    aten.min.dim,
)
class Order(Rule):
    """Operators with two outputs, values and where they were."""

    why = "selects among all entries"

    def _dim(self, node: Node) -> int:
        return Arguments(node).dim(operand(node))

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        return [(operand(node), [self._dim(node)])]

    def layout(self, node: Node) -> Layout:
        x, d, shape = operand(node), self._dim(node), tuple(node.meta["val"][0].shape)
        kept = [a for a in known(x).dims[d] if a.label and a.size == 1]
        if len(shape) == rank_of(x):
            return known(x).replace(d, [*kept, Axis("", int(shape[d]))])
        return known(x).replace(d, kept).remove([d])

    def layouts(self, node: Node) -> list[Layout]:
        return [self.layout(node)] * len(node.meta["val"])

    def items(self, node: Node, fact: Fact) -> list[Fact]:
        """Gives both outputs the fact of the values."""
        return [fact] * len(node.meta["val"])

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        """Writes the entries of both outputs."""
        x, dim = operand(node), known(operand(node)).entry_dims()[self._dim(node)]
        alone = dim is None  # among a single entry of time
        dim = self._dim(node) if dim is None else dim
        kept = alone and node.meta["val"][0].dim() == rank_of(x)
        args, kwargs = Arguments(node).changed(dim=dim)
        results: list[list[Node]] = [[], []]
        for i in range(low.pulse(x)):
            new = low.whole_entry(x, i) if alone else low.entry(x, i)
            both = low.call(node.target, new, *args[1:], **kwargs)
            for which, entries in enumerate(results):
                item = low.call(operator.getitem, both, which)
                entries.append(low.call(aten.squeeze.dim, item, dim) if kept else item)
        return results
