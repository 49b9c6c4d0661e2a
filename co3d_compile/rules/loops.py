"""Loops over frames: the body once per frame, and what a turn hands on to the next one is a state."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.frame_loop import FrameLoop, loop_of
from co3d_compile.ir.layout import TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.time_facts import Fact, NoExtension, combine, fact_of, is_stream, known
from co3d_compile.rules import rule_for
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.handed_on import HandedOn
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(FrameLoop)
class Loop(Rule):
    """A loop over frames. Its states are exact from the first frame: what they start from is the clip's own."""

    why = "walks along another dim than time"

    def flow(self, node: Node) -> Fact:
        loop = loop_of(node)
        walked, _, fixed = loop.parts(_operands(node))
        if any(fact_of(x).clip == 1 and not fact_of(x).per_entry for x in filter(is_stream, fixed)):
            raise NoExtension("reads a single entry of the clip in each turn")
        for x, dim in zip(walked, loop.walked, strict=True):
            place = known(x).time
            if place is None or not place.alone or place.dim != dim:
                raise NoExtension("walks along another dim than time")
            if fact_of(x).spacing > 1:
                raise NoExtension("hands values on from frame to frame, and dense strides leave several clips between")
        for state in loop.parts(loop.placeholders())[1]:
            layout = fact_of(state).layout
            if layout is None or layout.batch is None:
                raise NoExtension("hands on values of which it is not known where the batch is")
        return combine([fact_of(x) for x in _operands(node)], None)

    def remembers_all(self, node: Node) -> bool:
        return loop_of(node).memory is None

    def past(self, node: Node) -> int:
        return loop_of(node).memory or 0

    def begins(self, node: Node) -> bool:
        return loop_of(node).states > 0

    def layouts(self, node: Node) -> list[Layout]:
        loop = loop_of(node)
        walked, _, _ = loop.parts(_operands(node))
        place = known(walked[0]).time
        if place is None:
            raise LayoutLost
        axis = Axis(TIME, place.size)
        found = []
        for result, dim in zip(loop.results()[1], loop.outputs, strict=True):
            layout = fact_of(result).layout
            if layout is None:
                raise LayoutLost
            found.append(layout.insert(dim, (axis,)))
        return found

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        """Computes the entries of each output, from the states that the step before has left."""
        loop = loop_of(node)
        walked, _, _ = loop.parts(_operands(node))
        path, fact = low.path, fact_of(walked[0])
        turns = [[low.entry(x, i) for x in walked] for i in range(low.pulse(walked[0]))]
        states = _states(node, low)
        for state in states:
            state.read(turns, loop.memory)
        results: list[list[Node]] = [[] for _ in loop.outputs]
        for i, entries in enumerate(turns):
            rows_of = [None if at is None else entries[at] for at in loop.opened]
            values = [state.before(fact, i, entry) for state, entry in zip(states, rows_of, strict=True)]
            handed, outputs = self._turn(node, low, entries, values, i)
            low.path = path
            for state, value in zip(states, handed, strict=True):
                state.now(value)
            for row, output in zip(results, outputs, strict=True):
                row.append(output)
        for state in states:
            state.store()
        return results

    def window(self, node: Node, low: StepGraph) -> list[Node]:  # type: ignore[override]
        """Runs the loop over a window, from its starts."""
        loop = loop_of(node)
        walked, _, _ = loop.parts(_operands(node))
        path = low.path
        whole = [low.plain(x) for x in walked]
        values = [state.start_like(whole[0], fact_of(walked[0]).layout) for state in _states(node, low)]
        rows: list[list[Node]] = [[] for _ in loop.outputs]
        for t in range(low.sizes(whole[0])[loop.walked[0]]):
            entries = [low.call(aten.select.int, x, dim, t) for x, dim in zip(whole, loop.walked, strict=True)]
            values = list(loop.first(entries, values)) if t == 0 else values
            values, outputs = self._turn(node, low, entries, values, 0)
            for row, output, dim in zip(rows, outputs, loop.outputs, strict=True):
                row.append(low.call(aten.unsqueeze.default, output, dim))
        low.path = path
        return [low.call(aten.cat.default, row, dim) for row, dim in zip(rows, loop.outputs, strict=True)]

    def _turn(
        self, node: Node, low: StepGraph, entries: list[Node], states: list[Node], i: int
    ) -> tuple[list[Node], list[Node]]:
        """Computes the body on an entry of each walked tensor and what the turn before has handed on."""
        loop = loop_of(node)
        _, _, fixed = loop.parts(_operands(node))
        given = [low.entry(x, i) if is_stream(node) and is_stream(x) else low.plain(x) for x in fixed]
        for inner, value in zip(loop.placeholders(), [*entries, *states, *given], strict=True):
            low.windows[inner] = value
        for inner in loop.body.graph.nodes:
            if inner.op == "call_function":
                low.path = module_path(inner)
                rule = rule_for(inner.target)
                low.windows[inner] = rule.window(inner, low) if rule is not None else low.same(inner)
        handed, outputs = loop.results()
        return [low.windows[n] for n in handed], [low.windows[n] for n in outputs]


def _operands(node: Node) -> list[Node]:
    return [n for n in node.args if isinstance(n, Node)]


def _states(node: Node, low: StepGraph) -> list[HandedOn]:
    """Lists what a loop hands on."""
    loop = loop_of(node)
    _, starts, _ = loop.parts(_operands(node))
    _, inner, _ = loop.parts(loop.placeholders())
    return [HandedOn(low, known(n), start) for n, start in zip(inner, starts, strict=True)]
