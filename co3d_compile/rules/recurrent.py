"""Recurrent layers over time: one direction is a state; both directions are a window."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from co3d_compile.ir.layout import TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.markers import store
from co3d_compile.ir.node_reading import operand, whole
from co3d_compile.ir.time_facts import Fact, NoExtension, combine, constant_of, fact_of, known, own_of, touches_time
from co3d_compile.rules.base import RULES, Rule, one_entry, register
from co3d_compile.rules.reduce import AlongDims
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
class Recurrent(Rule):
    """LSTM, GRU and RNN. The state is exact from the first frame: its start at zero is the clip's own."""

    def flow(self, node: Node) -> Fact:
        x = operand(node)
        bidirectional, batch_first = node.args[7], node.args[8]
        place = known(x).time
        if bidirectional:
            raise NoExtension("reads the clip in both directions")
        if place is None or place.dim != (1 if batch_first else 0) or not place.alone or fact_of(x).spacing > 1:
            raise NoExtension("time is not its sequence dim")
        if not _from_zero(node):
            raise NoExtension("starts from a hidden state that is not zero")
        return combine([fact_of(x)], None)

    def remembers_all(self, node: Node) -> bool:
        return True

    def items(self, node: Node, fact: Fact) -> list[Fact]:
        """The facts of the outputs: the sequence, then the last hidden (and cell) state."""
        late = fact.length - 1
        end = fact.end + late * fact.rate if fact.end is not None else None
        sequence, *last = self.layouts(node)
        result = [replace(fact, layout=sequence)]
        for layout in last:
            one = one_entry(fact, layout)
            result.append(replace(one, delay=fact.delay + late, crop=fact.crop + late, end=end, per_entry=False))
        return result

    def layouts(self, node: Node) -> list[Layout]:
        """Where batch and time are in each output."""
        lay = known(operand(node))
        sequence, *last = (tuple(v.shape) for v in node.meta["val"])
        row = (*lay.dims[0 if node.args[8] else 1], Axis(TIME, 1))
        plain = [Layout.plain([shape[0], shape[2]]).dims for shape in last]
        finals = [Layout((layers, row, features)) for layers, features in plain]
        return [lay.replace(lay.rank - 1, [Axis("", int(sequence[-1]))]), *finals]

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        """Entries of each output."""
        layers, x = Layers.of(node, low), operand(node)
        entries = [low.entry(x, i) for i in range(low.pulse(x))]
        keep = _keeps(x, low)
        finals = []
        for weights in layers.weights:
            sizes = [layers.hidden(weights), *([layers.cells(weights)] if layers.kind == "lstm" else [])]
            states = [_carry(x, low, size) for size in sizes]
            h, c = [rows for _, rows in states] + [None] * (2 - len(states))
            entries, final = layers.run(low, weights, entries, h, c, keep)  # type: ignore[arg-type]
            for (read, _), value in zip(states, final[-1], strict=True):
                low.call(store, read, low.batch_first(value, fact_of(x).layout)[0])
            finals.append(final)
        last = [
            [low.stack([f[i][which] for f in finals]) for i in range(len(entries))] for which in range(len(final[0]))
        ]
        return [entries, *last]

    def window(self, node: Node, low: StepGraph) -> Any:
        """The layers over a window from a zero state, in one direction or both: ``(sequence, last states …)``."""
        if not _from_zero(node):
            return low.same(node)
        layers = Layers.of(node, low)
        directions = 2 if node.args[7] else 1
        time = 1 if node.args[8] else 0
        x = low.plain(operand(node))
        entries = [low.call(aten.select.int, x, time, i) for i in range(low.sizes(x)[time])]
        finals = []
        for first in range(0, len(layers.weights), directions):
            sides = []
            for side, weights in enumerate(layers.weights[first : first + directions]):
                h = low.zero_rows(entries[0], layers.hidden(weights))
                c = low.zero_rows(entries[0], layers.cells(weights)) if layers.kind == "lstm" else None
                outs, final = layers.run(low, weights, entries[::-1] if side else entries, h, c)
                sides.append(outs[::-1] if side else outs)
                finals.append(final[-1])
            entries = [low.call(aten.cat.default, list(pair), 1) for pair in zip(*sides, strict=True)]
        rows = [low.call(aten.unsqueeze.default, e, time) for e in entries]
        last = [low.stack([f[which] for f in finals]) for which in range(len(finals[0]))]
        return [low.call(aten.cat.default, rows, time), *last]

    def reason(self, node: Node) -> str:
        return "reads the clip in both directions"


def started(x: Node, low: StepGraph) -> list[Node] | None:
    """For each new entry whether it is in the stream, (batch, 1) of bool; None where each is.

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
    """A state with numbers for each row of an entry, and its rows: the batch may share them with other dims."""
    rows = low.zero_rows(low.entry(x, 0), size)
    first, restore = low.batch_first(rows, fact_of(x).layout)
    state = low.carry(first, low.features(rows))
    return state, restore(state)


def _keeps(x: Node, low: StepGraph) -> Callable[[int, Node, Node], Node] | None:
    """Gives the rows of a state behind new entry ``i``: the new ones if that entry is in the stream, else the old."""
    live, layout = started(x, low), fact_of(x).layout
    if live is None:
        return None

    def keep(i: int, new: Node, old: Node) -> Node:
        first, restore = low.batch_first(new, layout)
        return restore(low.call(aten.where.self, live[i], first, low.batch_first(old, layout)[0]))

    return keep


def _from_zero(node: Node) -> bool:
    """Whether the hidden state that the layer is given is a constant zero."""
    hidden: Any = node.args[1]
    return all(constant_of(h).fill == 0 for h in ([hidden] if isinstance(hidden, Node) else hidden))


@dataclass
class Layers:
    """The weights of a recurrent operator, layer by layer (and direction by direction)."""

    kind: str
    weights: list[list[Node]]
    has_bias: bool

    @staticmethod
    def of(node: Node, low: StepGraph) -> Layers:
        params: Any = node.args[2]
        has_bias = bool(node.args[3])
        count = whole(node, 4) * (2 if node.args[7] else 1)
        per = len(params) // count
        plain = [low.plain(p) for p in params]
        return Layers(str(node.target).split(".")[1], [plain[i * per : (i + 1) * per] for i in range(count)], has_bias)

    def hidden(self, weights: list[Node]) -> int:
        """Features of the hidden state."""
        return int(weights[1].meta["val"].shape[1])

    def cells(self, weights: list[Node]) -> int:
        """Features of the cell."""
        return int(weights[1].meta["val"].shape[0]) // {"lstm": 4, "gru": 3}.get(self.kind, 1)

    def run(
        self,
        low: StepGraph,
        weights: list[Node],
        entries: list[Node],
        h: Node,
        c: Node | None,
        keep: Callable[[int, Node, Node], Node] | None = None,
    ) -> tuple[list[Node], list[list[Node]]]:
        """One layer over entries: its outputs, and its states after each. ``keep`` says which entries change these."""
        bias_ih, bias_hh = (weights[2], weights[3]) if self.has_bias else (None, None)
        projection = weights[-1] if len(weights) in (3, 5) else None
        outs, finals = [], []
        for i, x in enumerate(entries):
            gates_x = low.call(aten.linear.default, x, weights[0], bias_ih)
            gates_h = low.call(aten.linear.default, h, weights[1], bias_hh)
            old = (h, c)
            h, c = _CELLS[self.kind](low, gates_x, gates_h, h, c, self.cells(weights))
            if projection is not None:
                h = low.call(aten.linear.default, h, projection)
            if keep is not None:
                h = keep(i, h, old[0])
                c = keep(i, c, old[1]) if c is not None and old[1] is not None else None
            outs.append(h)
            finals.append([h] if c is None else [h, c])
        return outs, finals


def _chunk(low: StepGraph, x: Node, index: int, size: int) -> Node:
    return low.call(aten.slice.Tensor, x, 1, index * size, (index + 1) * size)


Cell = Callable[[StepGraph, Node, Node, Node, Node | None, int], tuple[Node, Node | None]]


def _lstm(low: StepGraph, gx: Node, gh: Node, h: Node, c: Node | None, size: int) -> tuple[Node, Node]:
    gates = low.call(aten.add.Tensor, gx, gh)
    i, f, o = (low.call(aten.sigmoid.default, _chunk(low, gates, n, size)) for n in (0, 1, 3))
    g = low.call(aten.tanh.default, _chunk(low, gates, 2, size))
    c = low.call(aten.add.Tensor, low.call(aten.mul.Tensor, f, c), low.call(aten.mul.Tensor, i, g))
    return low.call(aten.mul.Tensor, o, low.call(aten.tanh.default, c)), c


def _gru(low: StepGraph, gx: Node, gh: Node, h: Node, c: Node | None, size: int) -> tuple[Node, None]:
    r, z = (
        low.call(aten.sigmoid.default, low.call(aten.add.Tensor, _chunk(low, gx, n, size), _chunk(low, gh, n, size)))
        for n in (0, 1)
    )
    new = low.call(aten.mul.Tensor, r, _chunk(low, gh, 2, size))
    new = low.call(aten.tanh.default, low.call(aten.add.Tensor, _chunk(low, gx, 2, size), new))
    old = low.call(aten.mul.Tensor, z, low.call(aten.sub.Tensor, h, new))
    return low.call(aten.add.Tensor, new, old), None


def _rnn(activation: OpOverload) -> Cell:
    def cell(low: StepGraph, gx: Node, gh: Node, h: Node, c: Node | None, size: int) -> tuple[Node, None]:
        return low.call(activation, low.call(aten.add.Tensor, gx, gh)), None

    return cell


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn(aten.tanh.default),
    "rnn_relu": _rnn(aten.relu.default),
}


@register(aten.cumsum.default)
class CumulativeSum(AlongDims):
    """The sum of all entries so far: a state, exact from the first frame, as in causal squeeze-and-excitation."""

    def _over_time(self, node: Node) -> bool:
        return any(touches_time(x, dims) for x, dims in self.mixes(node))

    def flow(self, node: Node) -> Fact:
        x = operand(node)
        place = known(x).time
        if self._over_time(node) and (place is None or not place.alone or fact_of(x).spacing > 1):
            raise NoExtension("sums over a dim into which time is folded")
        return combine([fact_of(x)], known(x))

    def remembers_all(self, node: Node) -> bool:
        return self._over_time(node)

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        if not self._over_time(node):
            return super().lower(node, low)
        x = operand(node)
        first, restore = low.batch_first(low.entry(x, 0), fact_of(x).layout)
        read = total = low.carry(first, low.features(first))
        live = started(x, low)
        sums = []
        for i in range(low.pulse(x)):
            entry = low.batch_first(low.entry(x, i), fact_of(x).layout)[0]
            row = low.call(aten.reshape.default, entry, [-1, low.features(first)])
            if live is not None:
                row = low.call(aten.where.self, live[i], row, low.zero_rows(first, 1))
            total = low.call(aten.add.Tensor, total, row)
            sums.append(restore(low.call(aten.reshape.default, total, [-1, *low.sizes(first)[1:]])))
        low.call(store, read, total)
        return sums


@register(operator.getitem)
class Item(Rule):
    """One of several outputs of an operator."""

    def flow(self, node: Node) -> Fact:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(index, int)
        return own_of(source).items[index]

    def layout(self, node: Node) -> Layout:
        source, index = operand(node), node.args[1]
        rule = RULES.get(source.target)
        if not isinstance(rule, Recurrent) or not isinstance(index, int):
            raise LayoutLost
        layout = rule.layouts(source)[index]
        return layout.without(TIME) if index else layout

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(index, int)
        if source not in low.tuples:
            low.tuples[source] = RULES[source.target].lower_items(source, low)
        return low.tuples[source][index]

    def window(self, node: Node, low: StepGraph) -> Node:
        results: Any = low.plain(operand(node))
        return results[node.args[1]] if isinstance(results, list) else low.same(node)  # type: ignore[index]
