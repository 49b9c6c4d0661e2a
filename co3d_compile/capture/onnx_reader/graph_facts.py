"""What is told of a graph of ONNX before it is run: its operators, what moves with frames, the kinds of numbers."""

from __future__ import annotations

import onnx_ir as ir

from co3d_compile.capture.onnx_reader.control_flow import CONTROL
from co3d_compile.capture.onnx_reader.node_call import TABLE
from co3d_compile.errors import UnsupportedError

RANDOM = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def graphs_of(graph: ir.Graph) -> list[ir.Graph]:
    """Gives a graph, and those inside of its nodes."""
    attributes = [a for node in graph for a in node.attributes.values() if a.type is ir.AttributeType.GRAPH]
    return [graph, *(inner for a in attributes for inner in graphs_of(a.as_graph()))]


def nodes_of(graph: ir.Graph) -> list[ir.Node]:
    """Gives the nodes of a graph, and of those inside of its nodes."""
    return [node for g in graphs_of(graph) for node in g]


def check_values(graph: ir.Graph) -> None:
    """Refuses inputs and outputs that are no tensors.

    Raises:
        UnsupportedError: It names the first of them.
    """
    for what, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if value.type is not None and not isinstance(value.type, ir.TensorType):
                raise UnsupportedError(
                    f"The {what} {value.name} of the ONNX file is no tensor (it is a {type(value.type).__name__}).",
                    hint="Export the model with tensors as inputs and outputs.",
                )


def check_operators(graph: ir.Graph, opset: int) -> None:
    """Refuses operators that cannot be read.

    Raises:
        UnsupportedError: It names all of them at once.
    """
    missing: dict[str, list[ir.Node]] = {}
    moving = _moving(graph)
    for node in nodes_of(graph):
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        known = name in TABLE or name in CONTROL or name == "Constant"
        fixed = name == node.op_type and node.inputs and not moving.intersection(node.outputs)
        if not known and (not fixed or name in RANDOM):
            missing.setdefault(name, []).append(node)
    if missing:
        lines = [
            f"{name} ({len(nodes)} times, first at node {nodes[0].name or '?'})" for name, nodes in missing.items()
        ]
        raise UnsupportedError(
            f"These ONNX operators (opset {opset}) cannot be read: {'; '.join(lines)}.",
            hint="Export the model with standard operators, or with another opset.",
        )


def _moving(graph: ir.Graph) -> set[ir.Value]:
    """Finds the values that depend on the values of frames. Others are numbers, which ONNX itself computes."""
    moving = {v for g in graphs_of(graph) for v in g.inputs}
    for node in nodes_of(graph):  # a node stands behind what it reads; graphs inside of nodes stand behind these
        inside = any(a.type is ir.AttributeType.GRAPH for a in node.attributes.values())
        if node.op_type not in ("Shape", "Size") and (inside or moving.intersection(node.inputs)):
            moving.update(node.outputs)
    return moving


def has_half_precision(graph: ir.Graph) -> bool:
    """Says whether weights are stored, or numbers computed, in half precision."""
    casts = (n.attributes["to"].as_int() for n in nodes_of(graph) if n.op_type == "Cast")
    return any(v.dtype in HALF for v in [*graph.inputs, *graph.initializers.values()]) or any(
        to in HALF for to in casts
    )


def is_quantized(graph: ir.Graph) -> bool:
    """Says whether numbers are rounded to 8 bits on the way."""
    return any(n.op_type == "QuantizeLinear" for n in graph)
