"""Starts of their own: the first entries of a stream are computed from the first entries of others alone."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.layout import TIME, Layout
from co3d_compile.ir.markers import begin, opening, settled
from co3d_compile.ir.node_reading import operand, shape_of, whole
from co3d_compile.ir.time_facts import fact_of, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(opening)
class Opening(Rule):
    """The first entries of a stream, as one clip."""

    def layout(self, node: Node) -> Layout:
        return known(operand(node)).resize(TIME, whole(node, 2))

    def window(self, node: Node, low: StepGraph) -> Node:
        x = operand(node)
        return low.as_clip([low.ref(x, i) for i in range(whole(node, 2))], known(x))


@register(begin)
class Begin(Rule):
    """A stream whose first entries are computed in one step, in which all that they need is there."""

    def layout(self, node: Node) -> Layout:
        return known(operand(node))

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        x, first, dim, opened = operand(node), operand(node, 1), whole(node, 2), whole(node, 3)
        fact, pulse, start = fact_of(node), low.pulse(x), low.plain(first)
        results = []
        for i in range(pulse):
            new, restore = low.batch_first(low.entry(x, i), fact.layout)
            own = [n for n in range(shape_of(first)[dim]) if (n + fact.delay - i) % pulse == 0]
            for n in reversed(own):
                value, _ = low.batch_first(low.call(aten.select.int, start, dim, n), fact.layout)
                value = low.start.kept(value, opened) if (n + fact.delay) // pulse > opened else value
                new = low.start.choose(low.start.inside(fact, i, back=False, lead=n + 1), new, value)
            steps = max(((n + fact.delay) // pulse + 1 for n in own), default=0)
            results.append(low.call(settled, restore(new), low.entry(x, i), steps) if own else low.entry(x, i))
        return results
