"""Recurrent layers over time: one direction is a state; both directions are a window."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from co3d_compile.facts import Fact, NoExtension, combine, fact_of
from co3d_compile.layout import TIME, Axis, Layout
from co3d_compile.rules.base import Rule, known, one_entry, operand, register, touches_time
from co3d_compile.rules.reduce import AlongDims

if TYPE_CHECKING:
    from co3d_compile.lowering import Lowering

aten = torch.ops.aten


@register(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
class Recurrent(Rule):
    """LSTM, GRU and RNN. The state is exact from the first frame: its start at zero is the clip's own."""

    def flow(self, node: Node) -> Fact:
        x, hidden = node.args[0], node.args[1]
        assert isinstance(x, Node)
        bidirectional, batch_first = node.args[7], node.args[8]
        place = known(x).time
        if bidirectional:
            raise NoExtension("reads the clip in both directions")
        if place is None or place.dim != (1 if batch_first else 0) or not place.alone or fact_of(x).spacing > 1:
            raise NoExtension("time is not its sequence dim")
        if any(not h.meta.get("zero", False) for h in ([hidden] if isinstance(hidden, Node) else hidden)):  # type: ignore
            raise NoExtension("starts from a hidden state that is not zero")
        return combine([fact_of(x)], None)

    def items(self, node: Node, fact: Fact) -> list[Fact]:
        """The facts of the outputs: the sequence, then the last hidden (and cell) state."""
        x = operand(node)
        lay = known(x)
        outs = [tuple(v.shape) for v in node.meta["val"]]
        sequence = replace(fact, layout=lay.replace(lay.rank - 1, [Axis("", int(outs[0][-1]))]))
        batch = 0 if node.args[8] else 1
        late = fact.length - 1
        result = [sequence]
        for shape in outs[1:]:
            layout = Layout(
                (
                    (*Layout.plain([shape[0]]).dims[0],),
                    (*lay.dims[batch], Axis(TIME, 1)),
                    Layout.plain([shape[2]]).dims[0],
                )
            )
            last = one_entry(fact, layout)
            result.append(replace(last, delay=fact.delay + late, crop=fact.crop + late))
        return result

    def lower_items(self, node: Node, low: Lowering) -> list[list[Node]]:
        """Entries of each output."""
        x, _, params = node.args[0], node.args[1], node.args[2]
        assert isinstance(x, Node) and isinstance(params, (list, tuple))
        has_bias, layers = bool(node.args[3]), int(node.args[4])  # type: ignore[arg-type]
        per = 4 if has_bias else 2
        if len(params) != layers * per:
            per += 1  # a projection of the hidden state
        kind = str(node.target).split(".")[1]
        entries = [low.entry(x, i) for i in range(low.pulse(x))]
        finals: list[list[list[Node]]] = []
        for layer in range(layers):
            weights = [low.plain(p) for p in params[layer * per : (layer + 1) * per]]  # type: ignore[arg-type]
            entries, final = self._layer(node, low, kind, entries, weights, has_bias)
            finals.append(final)
        outs = [entries]
        for which in range(len(finals[0][0])):
            outs.append([low.stack([finals[n][i][which] for n in range(layers)]) for i in range(len(entries))])
        return outs

    def _layer(
        self, node: Node, low: Lowering, kind: str, entries: list[Node], weights: list[Node], has_bias: bool
    ) -> tuple[list[Node], list[list[Node]]]:
        bias_ih, bias_hh = (weights[2], weights[3]) if has_bias else (None, None)
        projection = weights[-1] if len(weights) in (3, 5) else None
        size = int(weights[1].meta["val"].shape[1])
        cell_size = int(weights[1].meta["val"].shape[0]) // {"lstm": 4, "gru": 3}.get(kind, 1)
        h = low.carry(entries[0], size)
        c = low.carry(entries[0], cell_size) if kind == "lstm" else None
        reads = [h, *([c] if c is not None else [])]
        finals = []
        outs = []
        for x in entries:
            gates_x = low.call(aten.linear.default, x, weights[0], bias_ih)
            gates_h = low.call(aten.linear.default, h, weights[1], bias_hh)
            h, c = _CELLS[kind](low, gates_x, gates_h, h, c, cell_size)
            if projection is not None:
                h = low.call(aten.linear.default, h, projection)
            outs.append(h)
            finals.append([h, *([c] if c is not None else [])])
        for read, value in zip(reads, finals[-1], strict=True):
            read.meta["next"] = value
        return outs, finals

    def reason(self, node: Node) -> str:
        return "reads the clip in both directions"


def _chunk(low: Lowering, x: Node, index: int, size: int) -> Node:
    return low.call(aten.slice.Tensor, x, 1, index * size, (index + 1) * size)


def _lstm(low: Lowering, gx: Node, gh: Node, h: Node, c: Any, size: int) -> tuple[Node, Node]:
    gates = low.call(aten.add.Tensor, gx, gh)
    i, f, o = (low.call(aten.sigmoid.default, _chunk(low, gates, n, size)) for n in (0, 1, 3))
    g = low.call(aten.tanh.default, _chunk(low, gates, 2, size))
    c = low.call(aten.add.Tensor, low.call(aten.mul.Tensor, f, c), low.call(aten.mul.Tensor, i, g))
    return low.call(aten.mul.Tensor, o, low.call(aten.tanh.default, c)), c


def _gru(low: Lowering, gx: Node, gh: Node, h: Node, c: Any, size: int) -> tuple[Node, None]:
    r, z = (
        low.call(aten.sigmoid.default, low.call(aten.add.Tensor, _chunk(low, gx, n, size), _chunk(low, gh, n, size)))
        for n in (0, 1)
    )
    new = low.call(aten.mul.Tensor, r, _chunk(low, gh, 2, size))
    new = low.call(aten.tanh.default, low.call(aten.add.Tensor, _chunk(low, gx, 2, size), new))
    old = low.call(aten.mul.Tensor, z, low.call(aten.sub.Tensor, h, new))
    return low.call(aten.add.Tensor, new, old), None


def _rnn(activation: Any) -> Any:
    def cell(low: Lowering, gx: Node, gh: Node, h: Node, c: Any, size: int) -> tuple[Node, None]:
        return low.call(activation, low.call(aten.add.Tensor, gx, gh)), None

    return cell


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn(aten.tanh.default), "rnn_relu": _rnn(aten.relu.default)}


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

    def lower(self, node: Node, low: Lowering) -> list[Node]:
        if not self._over_time(node):
            return super().lower(node, low)
        x = operand(node)
        first = low.entry(x, 0)
        read = total = low.carry(first, low.features(first))
        sums = []
        for i in range(low.pulse(x)):
            row = low.call(aten.reshape.default, low.entry(x, i), [-1, low.features(first)])
            total = low.call(aten.add.Tensor, total, row)
            sums.append(low.call(aten.reshape.default, total, [-1, *low.sizes(first)[1:]]))
        read.meta["next"] = total
        return sums


@register(operator.getitem)
class Item(Rule):
    """One of several outputs of an operator."""

    def flow(self, node: Node) -> Fact:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(index, int)
        fact: Fact = source.meta["items"][index]
        return fact

    def layout(self, node: Node) -> Layout:
        source = operand(node)
        val = source.meta["val"][node.args[1]]
        return Layout.plain(val.shape)

    def lower(self, node: Node, low: Lowering) -> list[Node]:
        source, index = node.args[0], node.args[1]
        assert isinstance(source, Node) and isinstance(index, int)
        return low.items(source)[index]
