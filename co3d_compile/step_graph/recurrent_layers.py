"""Recurrent layers in a step graph: cell by cell over the entries of a stream, or over a sequence that is there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from co3d_compile.ir.node_reading import operand_list, whole
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


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

    @property
    def projects(self) -> bool:
        """Whether the hidden state has fewer features than the cell (``proj_size``)."""
        return len(self.weights[0]) in (3, 5)

    def hidden(self, weights: list[Node]) -> int:
        """Counts the features of the hidden state."""
        return int(weights[1].meta["val"].shape[1])

    def cells(self, weights: list[Node]) -> int:
        """Counts the features of the cell."""
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
        """Runs one layer over entries: its outputs, and its states after each.

        ``keep`` says which entries change these.
        """
        bias_ih, bias_hh = (weights[2], weights[3]) if self.has_bias else (None, None)
        projection = weights[-1] if self.projects else None
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


def over_sequence(node: Node, low: StepGraph, x: Node, hidden: Sequence[Node]) -> list[Node]:
    """Runs the layers over a whole sequence, in one direction or both: its outputs, then the last states.

    Args:
        node: The recurrent operator in the clip.
        x: The sequence.
        hidden: The states that it begins with, with a row for each of the batch or one for all.
    """
    rows = 0 if node.args[8] else 1
    states = [low.with_batch_of(h, x, 1, rows) for h in hidden]
    layers = Layers.of(node, low)
    if layers.projects or x.meta["val"].dtype is not torch.float32:  # ONNX Runtime has no such operator
        return _unrolled(node, low, layers, x, states)
    given = states if layers.kind == "lstm" else states[0]
    weights = [low.plain(p) for p in operand_list(node, 2)]
    result = low.call(node.target, x, given, weights, *node.args[3:])
    return [low.call(operator.getitem, result, i) for i in range(1 + len(states))]


def _unrolled(node: Node, low: StepGraph, layers: Layers, x: Node, states: list[Node]) -> list[Node]:
    """Runs the layers over a sequence, cell by cell."""
    directions, dim = (2 if node.args[7] else 1), (1 if node.args[8] else 0)
    entries = [low.call(aten.select.int, x, dim, i) for i in range(low.sizes(x)[dim])]
    finals = []
    for first in range(0, len(layers.weights), directions):
        sides = []
        for side, weights in enumerate(layers.weights[first : first + directions]):
            h, c = [*(low.call(aten.select.int, state, 0, first + side) for state in states), None][:2]
            assert h is not None
            outs, final = layers.run(low, weights, entries[::-1] if side else entries, h, c)
            sides.append(outs[::-1] if side else outs)
            finals.append(final[-1])
        entries = [low.call(aten.cat.default, list(pair), 1) for pair in zip(*sides, strict=True)]
    sequence = [low.call(aten.unsqueeze.default, e, dim) for e in entries]
    last = [low.stack([f[which] for f in finals]) for which in range(len(finals[0]))]
    return [low.call(aten.cat.default, sequence, dim), *last]


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
