"""Tensors in the blocked layout of ONNX Runtime's CPU kernels: what can work on them without a reorder.

A blocked tensor of (N, C, H, W) has the shape (N, C', H, W), C' the next multiple of the block, and the order
(N, C' / block, H, W, block) in memory. The channels that fill the last block are finite; whoever reads them multiplies
them by zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

BLOCKED = "com.microsoft.nchwc"
ENTER, LEAVE = "ReorderInput", "ReorderOutput"
# One number in, one out, finite where its operand is.
POINTWISE = {
    "Abs",
    "Clip",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Neg",
    "QuickGelu",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Tanh",
}
BINARY = {"Add", "Mul", "Sub"}


def in_blocks(channels: int, block: int) -> int:
    """Counts the channels of a blocked tensor."""
    return -(-channels // block) * block


def keep_blocked(graph: ir.Graph) -> None:
    """Takes out the reorders around pointwise operators, which can work on blocks as well."""
    chosen = {node for node in graph if _could(node)}
    while odd := {node for node in chosen if not _surrounded(node, chosen)}:
        chosen -= odd
    for node in [n for n in graph if n in chosen]:
        for i, operand in enumerate(node.inputs):
            node.replace_input_with(i, _inside(operand))
        result = node.outputs[0]
        result.shape = None
        for user in list(result.consumers()):
            if user.op_type == ENTER:
                ir.convenience.replace_all_uses_with(user.outputs[0], result)


def _could(node: ir.Node) -> bool:
    """Says whether an operator has a form on blocked tensors, as far as it alone can tell."""
    out = node.outputs[0]
    if node.domain == BLOCKED or out.is_graph_output() or not out.consumers() or not _is_image(out.shape):
        return False
    tensors = [v for v in node.inputs if v is not None and not _is_number(v)]
    if node.op_type in POINTWISE:
        return len(tensors) == 1 and node.inputs[0] is tensors[0]
    return node.op_type in BINARY and len(tensors) == 2 and _fit([v.shape for v in tensors])


def _surrounded(node: ir.Node, chosen: set[ir.Node]) -> bool:
    """Says whether its operands are there in blocks and its results wanted in blocks."""
    for v in node.inputs:
        if v is None or _is_number(v):
            continue
        producer = v.producer()
        if producer is None or not (producer.op_type == LEAVE or producer in chosen):
            return False
    return all(user.op_type == ENTER or user in chosen for user in node.outputs[0].consumers())


def _inside(v: ir.Value | None) -> ir.Value | None:
    """The blocked form of an operand."""
    producer = v.producer() if v is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == LEAVE else v


def _is_image(shape: ir.Shape | None) -> bool:
    return shape is not None and len(shape) == 4 and all(isinstance(s, int) for s in shape[1:])


def _is_number(v: ir.Value) -> bool:
    return v.const_value is not None and v.const_value.size == 1


def _fit(shapes: Sequence[ir.Shape | None]) -> bool:
    """Says whether images are of one shape; to multiply blocks with a gate takes longer than to reorder them."""
    return all(s is not None and _is_image(s) and s[1:] == shapes[0][1:] for s in shapes)  # type: ignore[index]
