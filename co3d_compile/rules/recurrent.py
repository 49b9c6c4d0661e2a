"""Recurrent layers: over time one direction is a state and both are a window; over another dim they see one entry."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.layout import TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.markers import store
from co3d_compile.ir.node_reading import operand, operands, shape_of, whole
from co3d_compile.ir.time_facts import (
    Fact,
    Kind,
    NoExtension,
    combine,
    constant_of,
    fact_of,
    is_stream,
    known,
    own_of,
    touches_time,
)
from co3d_compile.rules.base import Rule, in_table, one_entry, register
from co3d_compile.step_graph.recurrent_layers import Layers, over_sequence
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
class Recurrent(Rule):
    """LSTM, GRU and RNN. Over time the state is exact from the first frame: what it starts from is the clip's own.

    Over another dim, with time among the rows of its batch, a layer is an operator on each entry, in both directions.
    """

    why = "reads the clip in both directions"

    def flow(self, node: Node) -> Fact:
        x = operand(node)
        hidden = [h for h in _hidden(node) if is_stream(h)]
        if self.over_rows(node):
            if any(touches_time(h, [0, 2]) for h in hidden):
                raise NoExtension("starts from a hidden state with time elsewhere than in its input")
            return combine([fact_of(n) for n in (x, *hidden)], None)
        place = known(x).time
        if node.args[7]:
            raise NoExtension("reads the clip in both directions")
        if place is None or place.dim != _time_dim(node) or not place.alone or fact_of(x).spacing > 1:
            raise NoExtension("time is not its sequence dim")
        if not all(_alike(h) or _is_given(h) for h in _hidden(node)):
            raise NoExtension("starts from a hidden state that is computed from frames, or another for each clip")
        return combine([fact_of(x)], None)

    def over_rows(self, node: Node) -> bool:
        """Says whether time is among the rows of its batch, so that its sequence is another dim."""
        x = operand(node)
        place = known(x).time
        if place is None:
            return False
        single = place.size == fact_of(x).length == 1 and not place.alone  # it belongs to each row, wherever it stands
        return place.dim == 1 - _time_dim(node) or (single and place.dim != 2)

    def remembers_all(self, node: Node) -> bool:
        return not self.over_rows(node)

    def items(self, node: Node, fact: Fact) -> list[Fact]:
        """The facts of the outputs: the sequence, then the last hidden (and cell) state."""
        if self.over_rows(node):
            return super().items(node, fact)
        late = fact.length - 1
        end = fact.end + late * fact.rate if fact.end is not None else None
        sequence, *last = self.layouts(node)
        result = [replace(fact, layout=sequence)]
        for layout in last:
            one = one_entry(fact, layout)
            result.append(replace(one, delay=fact.delay + late, cut=fact.cut + late, end=end, per_entry=False))
        return result

    def layouts(self, node: Node) -> list[Layout]:
        """Says where batch and time are in each output."""
        lay = known(operand(node))
        sequence, *last = (tuple(v.shape) for v in node.meta["val"])
        row = lay.dims[1 - _time_dim(node)]
        if not self.over_rows(node):
            row = (*row, Axis(TIME, 1))
        elif not any(a.label == TIME for a in row):  # a single entry, in front of the sequence
            row = (*row, *(a for a in lay.dims[_time_dim(node)] if a.label == TIME))
        plain = [Layout.plain([shape[0], shape[2]]).dims for shape in last]
        finals = [Layout((layers, row, features)) for layers, features in plain]
        return [lay.replace(lay.rank - 1, [Axis("", int(sequence[-1]))]), *finals]

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        """Writes the entries of each output."""
        if self.over_rows(node):
            entries = [self._entry(node, low, i) for i in range(low.pulse(operand(node)))]
            return [list(output) for output in zip(*entries, strict=True)]
        return _over_time(node, low)

    def _entry(self, node: Node, low: StepGraph, i: int) -> list[Node]:
        """Computes the outputs for entry ``i``."""
        x = operand(node)
        hidden = [low.whole_entry(h, i) if is_stream(h) else _plain(h, low) for h in _hidden(node)]
        sequence, *last = over_sequence(node, low, low.whole_entry(x, i), hidden)
        place = known(x).time
        if place is None or not place.alone:
            return [sequence, *last]
        return [low.call(aten.squeeze.dim, sequence, place.dim), *(low.call(aten.squeeze.dim, s, 1) for s in last)]

    def window(self, node: Node, low: StepGraph) -> Any:
        """Writes the layers over a window, in one direction or both: ``(sequence, last states …)``."""
        return over_sequence(node, low, low.plain(operand(node)), [_plain(h, low) for h in _hidden(node)])


def _over_time(node: Node, low: StepGraph) -> list[list[Node]]:
    """Computes the entries of each output of layers whose state is carried from step to step."""
    layers, x = Layers.of(node, low), operand(node)
    entries = [low.entry(x, i) for i in range(low.pulse(x))]
    keep, hidden = _keeps(x, low), _hidden(node)
    finals = []
    for number, weights in enumerate(layers.weights):
        sizes = [layers.hidden(weights), *([layers.cells(weights)] if layers.kind == "lstm" else [])]
        states = [_carry(x, low, size) for size in sizes]
        states = [(read, _opened(x, low, rows, h, number)) for (read, rows), h in zip(states, hidden, strict=True)]
        h, c = [rows for _, rows in states] + [None] * (2 - len(states))
        entries, final = layers.run(low, weights, entries, h, c, keep)  # type: ignore[arg-type]
        for (read, _), value in zip(states, final[-1], strict=True):
            low.call(store, read, low.batch_first(value, fact_of(x).layout)[0])
        finals.append(final)
    last = [[low.stack([f[i][which] for f in finals]) for i in range(len(entries))] for which in range(len(final[0]))]
    return [entries, *last]


def started(x: Node, low: StepGraph) -> list[Node] | None:
    """Says for each new entry whether it is in the stream, (batch, 1) of bool; None where each is.

    Behind a delay the first steps bring entries before the stream's first: what remembers for good must not see them.
    """
    late = fact_of(x).delay
    if low.ends is not None:
        return [low.ends.exists(fact_of(x), i) for i in range(low.pulse(x))]
    if late <= 0:
        return None
    pulse = low.pulse(x)
    seen = low.counter(low.batch_first(low.entry(x, 0), fact_of(x).layout)[0], pulse)
    return [low.call(aten.ge.Scalar, seen, late - i) for i in range(pulse)]


def _carry(x: Node, low: StepGraph, size: int) -> tuple[Node, Node]:
    """Makes a state with numbers for each row of an entry, and its rows: the batch may share them with other dims."""
    rows = low.zero_rows(low.entry(x, 0), size)
    first, restore = low.batch_first(rows, fact_of(x).layout)
    state = low.carry(first, low.features(rows))
    return state, restore(state)


def _opened(x: Node, low: StepGraph, rows: Node, hidden: Node, number: int) -> Node:
    """Takes the rows of a state of a layer, or what the layer starts from if no entry has come before this step."""
    if constant_of(hidden).fill == 0:
        return rows
    layout = fact_of(x).layout
    newest = (
        low.pulse(hidden) - 1 if is_stream(hidden) else 0
    )  # behind a delay the others may be from before the stream
    start = low.whole_entry(hidden, newest) if is_stream(hidden) else _plain(hidden, low)
    start = low.call(aten.select.int, start, 0, number)
    start = low.call(aten.add.Tensor, low.zero_rows(low.entry(x, 0), low.sizes(rows)[1]), start)
    first, restore = low.batch_first(rows, layout)
    flag = low.start.inside(fact_of(x), -1, back=False)
    return restore(low.start.choose(flag, first, low.batch_first(start, layout)[0]))


def _keeps(x: Node, low: StepGraph) -> Callable[[int, Node, Node], Node] | None:
    """Gives the rows of a state behind new entry ``i``: the new ones if that entry is in the stream, else the old."""
    live, layout = started(x, low), fact_of(x).layout
    if live is None:
        return None

    def keep(i: int, new: Node, old: Node) -> Node:
        first, restore = low.batch_first(new, layout)
        return restore(low.call(aten.where.self, live[i], first, low.batch_first(old, layout)[0]))

    return keep


def _hidden(node: Node) -> list[Node]:
    """The hidden states (and cells) that the layer is given."""
    hidden: Any = node.args[1]
    return [hidden] if isinstance(hidden, Node) else list(hidden)


def _plain(hidden: Node, low: StepGraph) -> Node:
    """A hidden state that does not stream: one row of it if it is the same for all."""
    return low.first_row(hidden, 1) if 1 in constant_of(hidden).alike else low.plain(hidden)


def _time_dim(node: Node) -> int:
    """The dim over which the layer runs."""
    return 1 if node.args[8] else 0


def _alike(hidden: Node) -> bool:
    """Says whether a hidden state that the layer is given is a constant, and the same for each clip."""
    same = shape_of(hidden)[1] == 1 or constant_of(hidden).fill == 0 or 1 in constant_of(hidden).alike
    return same and fact_of(hidden).kind is Kind.STATIC


def _is_given(hidden: Node) -> bool:
    """Says whether a hidden state comes from inputs without time alone: it is read at the first entry, and kept."""
    behind = reached([hidden], operands)
    inputs = [n for n in behind if n.op == "placeholder"]
    streams = all(is_stream(n) and fact_of(n).per_entry for n in (hidden, *inputs))
    return streams and bool(inputs) and fact_of(hidden).delay == 0


@register(operator.getitem)
class Item(Rule):
    """One of several outputs of an operator."""

    def flow(self, node: Node) -> Fact:
        return own_of(operand(node)).items[whole(node, 1)]

    def layout(self, node: Node) -> Layout:
        source, index = operand(node), whole(node, 1)
        rule = in_table(source.target)
        if rule is None:
            raise LayoutLost
        layout = rule.layouts(source)[index]
        if isinstance(rule, Recurrent):
            return layout.without(TIME) if index and not rule.over_rows(source) else layout
        return layout

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        source = operand(node)
        if source not in low.tuples:
            rule = in_table(source.target)
            assert rule is not None
            low.tuples[source] = rule.lower_items(source, low)
        return low.tuples[source][whole(node, 1)]

    def window(self, node: Node, low: StepGraph) -> Node:
        results = low.plain(operand(node))
        return results[whole(node, 1)] if isinstance(results, list) else low.same(node)
