"""Cells of recurrent layers, written in the operators that PyTorch decomposes them into.

A loop over frames has one in each turn. To ask PyTorch takes as long as the rest of the capture of a small network.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import Argument

from co3d_compile.ir.graph_edits import shape_of_call
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.operator_arguments import Arguments

aten = torch.ops.aten


class Cell:
    """A cell, operator by operator.

    Args:
        node: The cell in its network.
        mode: What its shapes live in.

    Attributes:
        operands: Inputs of the graph that stand for the operands of the node, in their order.
        results: What it gives.
    """

    def __init__(self, node: Node, mode: FakeTensorMode) -> None:
        self.graph, self.mode, self.given = Graph(), mode, Arguments(node)
        self.inputs = {operand: self._input(operand) for operand in node.all_input_nodes}
        self.operands = list(self.inputs.values())
        self.results = CELLS[node.target](self)

    def _input(self, operand: Node) -> Node:
        made = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        made.meta = {"val": operand.meta["val"]}
        return made

    def call(self, target: Any, *args: Argument) -> Node:
        """Writes an operator."""
        node = self.graph.call_function(target, args)
        node.meta = {"val": shape_of_call(self.mode, target, args, {})}
        return node

    def linear(self, x: Node, of: str) -> Node:
        """Writes the linear layer of the input (``ih``) or of the state (``hh``)."""
        bias = self.given.optional(f"b_{of}")
        weights = [self.given.tensor(f"w_{of}"), *([] if bias is None else [bias])]
        return self.call(aten.linear.default, self.inputs[x], *[self.inputs[w] for w in weights])

    def parts(self, x: Node, count: int) -> list[Node]:
        """Splits the gates."""
        sizes = [shape_of(x)[-1] // count] * count
        split = self.call(aten.split_with_sizes.default, x, sizes, len(shape_of(x)) - 1)
        return [self.call(operator.getitem, split, i) for i in range(count)]


def _gru(cell: Cell) -> list[Node]:
    x, h = cell.given.tensor("input"), cell.given.tensor("hx")
    reset, update, new = cell.parts(cell.linear(x, "ih"), 3)
    old_reset, old_update, old_new = cell.parts(cell.linear(h, "hh"), 3)
    reset = cell.call(aten.sigmoid.default, cell.call(aten.add.Tensor, old_reset, reset))
    update = cell.call(aten.sigmoid.default, cell.call(aten.add.Tensor, old_update, update))
    new = cell.call(aten.add.Tensor, new, cell.call(aten.mul.Tensor, old_new, reset))
    new = cell.call(aten.tanh.default, new)
    kept = cell.call(aten.mul.Tensor, cell.call(aten.sub.Tensor, cell.inputs[h], new), update)
    return [cell.call(aten.add.Tensor, kept, new)]


def _lstm(cell: Cell) -> list[Node]:
    x, (h, c) = cell.given.tensor("input"), cell.given.tensors("hx")
    gates = cell.call(aten.add.Tensor, cell.linear(h, "hh"), cell.linear(x, "ih"))
    taken, kept, new, shown = cell.parts(gates, 4)
    taken, kept = cell.call(aten.sigmoid.default, taken), cell.call(aten.sigmoid.default, kept)
    new, shown = cell.call(aten.tanh.default, new), cell.call(aten.sigmoid.default, shown)
    kept = cell.call(aten.mul.Tensor, kept, cell.inputs[c])
    state = cell.call(aten.add.Tensor, kept, cell.call(aten.mul.Tensor, taken, new))
    return [cell.call(aten.mul.Tensor, shown, cell.call(aten.tanh.default, state)), state]


def _simple(activation: Any) -> Callable[[Cell], list[Node]]:
    def write(cell: Cell) -> list[Node]:
        old = cell.linear(cell.given.tensor("hx"), "hh")
        gates = cell.call(aten.add.Tensor, old, cell.linear(cell.given.tensor("input"), "ih"))
        return [cell.call(activation, gates)]

    return write


CELLS: dict[Any, Callable[[Cell], list[Node]]] = {
    aten.gru_cell.default: _gru,
    aten.lstm_cell.default: _lstm,
    aten.rnn_tanh_cell.default: _simple(aten.tanh.default),
    aten.rnn_relu_cell.default: _simple(aten.relu.default),
}
