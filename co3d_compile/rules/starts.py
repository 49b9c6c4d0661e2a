"""First entries of a stream: those that are computed in another way than the rest, and the one that all others meet."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from co3d_compile.ir.index_equation import NO_COPIES
from co3d_compile.ir.layout import TIME, Layout
from co3d_compile.ir.markers import begin, kept, opening, settled, store
from co3d_compile.ir.node_reading import operand, shape_of, whole
from co3d_compile.ir.time_facts import Fact, NoExtension, Own, fact_of, known
from co3d_compile.rules.base import Rule, one_entry, register
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
            entry = low.entry(x, i)
            new, restore = low.batch_first(entry, fact.layout)
            own = [n for n in range(shape_of(first)[dim]) if (n + fact.delay - i) % pulse == 0]
            for n in reversed(own):
                value, _ = low.batch_first(low.call(aten.select.int, start, dim, n), fact.layout)
                value = low.start.kept(value, opened) if (n + fact.delay) // pulse > opened else value
                new = low.start.choose(low.start.inside(fact, i, back=False, lead=n + 1), new, value)
            if own:
                entry = low.call(settled, restore(new), entry, (own[-1] + fact.delay) // pulse + 1)
            results.append(entry)
        return results


@register(kept)
class Kept(Rule):
    """The first entry of a stream, which each later one meets: ``x - x[:, :, :1]``. It is remembered for good."""

    def flow(self, node: Node) -> Fact:
        if fact_of(operand(node)).spacing > 1:
            raise NoExtension("is the first entry of several clips")
        return replace(one_entry(fact_of(operand(node)), self.layout(node)), copies=NO_COPIES, own=Own())

    def layout(self, node: Node) -> Layout:
        one = known(operand(node)).resize(TIME, 1)
        return one.remove([whole(node, 1)]) if node.args[2] else one

    def remembers_all(self, node: Node) -> bool:
        return True

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        x = operand(node)
        fact, results = fact_of(x), []
        firsts = [low.batch_first(low.entry(x, i), fact.layout) for i in range(low.pulse(x))]
        state = low.carry_value([[new for new, _ in firsts]], firsts[0][0])
        value = state
        for i, (new, restore) in enumerate(firsts):
            came = low.ends is None and i > fact.delay
            value = value if came else low.start.choose(low.start.inside(fact, i - 1, back=False), value, new)
            results.append(restore(value))
        low.call(store, state, value)
        return results

    def window(self, node: Node, low: StepGraph) -> Node:
        x, dim = low.plain(operand(node)), whole(node, 1)
        if node.args[2]:
            return low.call(aten.select.int, x, dim, 0)
        return low.call(aten.slice.Tensor, x, dim, 0, 1)
