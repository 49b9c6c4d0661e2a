"""Where time is in the inputs of an ONNX file, as the first layer that slides over frames takes them.

Convolutions of ONNX take (N, C, T, H, W) or (N, C, T). In files from TensorFlow and Keras the input is (N, T, H, W, C),
and a Transpose stands in front of them.
"""

from __future__ import annotations

import onnx_ir as ir

from co3d_compile.capture.onnx_reader.elementwise_operators import BINARY, UNARY
from co3d_compile.errors import UsageError

SLIDING = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "BatchNormalization", "InstanceNormalization")
RECURRENT = ("LSTM", "GRU", "RNN")
SAME_SHAPE = {*UNARY, *BINARY, "Cast", "Div", "Pow", "Clip", "Pad", "QuantizeLinear", "DequantizeLinear"}
FOLDING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather")


def time_dims(graph: ir.Graph) -> list[int | None]:
    """Finds the dim of each input that counts frames; None where the file does not say.

    Raises:
        UsageError: An input has its channels last, and no layer says which of its other dims is time.
    """
    return [_said(value) for value in graph.inputs]


def _said(source: ir.Value) -> int | None:
    """Finds the dim that counts frames. What cannot be read says nothing; it is refused when it is run."""
    try:
        return _time_dim(source)
    except (TypeError, ValueError, LookupError, AttributeError):
        return None


def _time_dim(source: ir.Value) -> int | None:
    """Follows an input to the first layer that slides over it, and reads where that layer's first dim comes from."""
    rank = len(source.shape) if source.shape is not None else 0
    found: set[int] = set()
    waiting: list[tuple[ir.Value, list[int] | None, bool]] = [(source, list(range(rank)), False)]
    seen: set[ir.Value] = set()
    turned = mixed = False
    while waiting and rank >= 3:
        value, dims, moved = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, position in value.uses():
            if node.op_type in SLIDING and position == 0:
                turned |= moved
                if dims is not None and dims[0] == 0:
                    found.add(dims[2])
            elif dims is not None and (taken := _frame_by_frame(node, position)) is not None:
                found.add(dims[taken])
            elif node.op_type == "MatMul" and position == 0:
                weight = node.inputs[1]
                mixed |= weight is not None and weight.const_value is not None and dims is not None and dims[-1] == 2
            elif node.op_type == "Transpose":
                order = _order(node, len(dims) if dims is not None else 0)
                last = order[1:2] == [len(order) - 1] and len(order) > 2
                waiting.append((node.outputs[0], [dims[d] for d in order] if dims else None, moved or last))
            elif node.op_type in SAME_SHAPE:
                waiting.append((node.outputs[0], dims, moved))
            elif node.op_type in FOLDING:
                kept = _with_crops_in_the_batch(node, dims, source)
                waiting += [(output, kept, moved) for output in node.outputs]
    if len(found) == 1:
        return found.pop()
    if turned and rank >= 4:
        raise UsageError(
            f"The input {source.name} has its channels last, and the file does not say which of its dims is time.",
            hint="Give the dim that counts the frames, for (N, T, H, W, C) that is 1 (--time-dim 1).",
        )
    if mixed and not found and rank == 3:
        raise UsageError(
            f"The first layer computes over the last dim of the input {source.name}, and the file does not say which "
            "of its dims is time.",
            hint="Give the dim that counts the frames, for (N, T, features) that is 1 (--time-dim 1).",
        )
    return None


def _with_crops_in_the_batch(node: ir.Node, dims: list[int] | None, source: ir.Value) -> list[int] | None:
    """Finds the dims behind a Reshape of (N, 1, C, T, H, W) to (N, C, T, H, W); None of another one.

    What has one entry is no time. Of four dims that are left the third may be frames, or the height of folded frames.
    """
    to = node.inputs[1].const_value if node.op_type == "Reshape" and node.inputs[1] is not None else None
    if dims is None or to is None or source.shape is None:
        return None
    sizes, target = list(source.shape), to.numpy().tolist()
    ones = len(dims) - len(target)
    kept = [dims[0], *dims[1 + ones :]]
    if ones < 1 or len(target) not in (3, 5) or any(sizes[d] != 1 for d in dims[1 : 1 + ones]):
        return None
    return kept if target[1:] == [sizes[d] for d in kept[1:]] else None


def _frame_by_frame(node: ir.Node, position: int) -> int | None:
    """Finds the dim of an operand along which a node goes on from entry to entry, if it does."""
    if node.op_type in RECURRENT and position == 0:
        layout = node.attributes.get("layout")
        return 1 if layout is not None and layout.as_int() else 0
    if node.op_type == "Scan":
        dims, count = node.attributes.get("scan_input_axes"), node.attributes["num_scan_inputs"].as_int()
        at = position - (len(node.inputs) - count)
        return None if at < 0 else list(dims.as_ints())[at] if dims is not None else 0
    inside = node.graph
    if node.op_type == "Gather" and position == 0 and inside is not None and node.inputs[1] in inside.inputs:
        axis = node.attributes.get("axis")  # of a graph inside of a loop, which counts the entry
        return axis.as_int() if axis is not None else 0
    return None


def _order(node: ir.Node, rank: int) -> list[int]:
    """The order of a Transpose; without ``perm`` the opposite one."""
    given = node.attributes.get("perm")
    return list(given.as_ints()) if given is not None else list(reversed(range(rank)))
