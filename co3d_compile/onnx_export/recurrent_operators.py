"""From recurrent layers to the ONNX operators of the same names."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.markers import expand_batch
from co3d_compile.ir.node_reading import operand, operand_list, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.onnx_export.emitter import Attribute, Emitter, translates

aten = torch.ops.aten
# The operator, and the order of its gates in PyTorch's.
OPERATORS: dict[Target, tuple[str, list[int]]] = {
    aten.lstm.input: ("LSTM", [0, 3, 1, 2]),
    aten.gru.input: ("GRU", [1, 0, 2]),
    aten.rnn_tanh.input: ("RNN", [0]),
    aten.rnn_relu.input: ("RNN", [0]),
}


@translates(*OPERATORS)
def _recurrent(e: Emitter, node: Node) -> list[ir.Value] | None:
    given = Arguments(node)
    weights = operand_list(node, 2)
    lstm, per = node.target is aten.lstm.input, 4 if given.integer("has_biases") else 2
    states = operand_list(node, 1) if lstm else [operand(node, 1)]
    sides = 2 if given.integer("bidirectional") else 1
    layers = given.integer("num_layers")
    if len(weights) != layers * sides * per or any(w.op != "get_attr" for w in weights):
        return None  # projections, weights that are computed
    x = e.value(operand(node))
    x = e.op("Transpose", x, perm=[1, 0, 2]) if given.integer("batch_first") else x
    finals: list[list[ir.Value]] = []
    for layer in range(layers):
        own = [weights[(layer * sides + side) * per :][:per] for side in range(sides)]
        first = [_first(e, s, layer * sides, sides) for s in states]
        result, *last = _layer(e, node, x, own, first)
        finals.append(last)
        x = e.op("Reshape", e.op("Transpose", result, perm=[0, 2, 1, 3]), [0, 0, sides * shape_of(own[0][1])[1]])
    x = e.op("Transpose", x, perm=[1, 0, 2]) if given.integer("batch_first") else x
    stacked = [list(values) for values in zip(*finals, strict=True)]
    return [x, *(values[0] if layers == 1 else e.op("Concat", *values, axis=0) for values in stacked)]


def _layer(
    e: Emitter, node: Node, x: ir.Value, weights: list[list[Node]], states: list[ir.Value | None]
) -> list[ir.Value]:
    """Runs one layer in all its directions: (entries, directions, rows, features), then its last states."""
    name, order = OPERATORS[node.target]
    attributes: dict[str, Attribute] = {"hidden_size": shape_of(weights[0][1])[1]}
    if len(weights) > 1:
        attributes["direction"] = "bidirectional"
    if name == "GRU":
        attributes["linear_before_reset"] = 1
    if node.target is aten.rnn_relu.input:
        attributes["activations"] = ["Relu"] * len(weights)
    inputs, hidden = (_packed(e, [side[i] for side in weights], order) for i in (0, 1))
    bias = None
    if len(weights[0]) > 2:
        bias = _initializer(e, [side[2] for side in weights], _biases(e, weights, order))
    return e.outputs(len(states) + 1, name, x, inputs, hidden, bias, None, *states, **attributes)


def _first(e: Emitter, state: Node, start: int, sides: int) -> ir.Value | None:
    """What the states of a layer begin with; None for zeros."""
    source = operand(state) if state.target is expand_batch else state
    if source.op == "get_attr" and not bool(e.program.constant(source).any()):
        return None
    return e.op("Slice", state, [start], [start + sides], [0]) if shape_of(state)[0] != sides else e.value(state)


def _sorted(value: Tensor, order: list[int]) -> Tensor:
    """Puts the rows of a weight in ONNX's order of gates."""
    gates = value.chunk(len(order))
    return torch.cat([gates[i] for i in order])


def _packed(e: Emitter, weights: list[Node], order: list[int]) -> ir.Value:
    """Stacks a weight of each direction."""
    return _initializer(e, weights, torch.stack([_sorted(e.program.constant(w), order) for w in weights]))


def _biases(e: Emitter, weights: list[list[Node]], order: list[int]) -> Tensor:
    """Stacks both biases of each direction, one behind the other."""
    rows = [torch.cat([_sorted(e.program.constant(b), order) for b in side[2:4]]) for side in weights]
    return torch.stack(rows)


def _initializer(e: Emitter, weights: list[Node], value: Tensor) -> ir.Value:
    return e.initializer(f"{weights[0].target}_packed_{len(weights)}", value.contiguous().numpy())
