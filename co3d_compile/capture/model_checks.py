"""Checks of a captured network: values, dtypes, operators."""

from __future__ import annotations

import re

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from co3d_compile.errors import CaptureError, UnsupportedError, UsageError
from co3d_compile.ir.node_reading import module_path, operator_name, rank_of, returned, shape_of, where

aten = torch.ops.aten

NUMBERS = torch.SymInt, torch.SymFloat, torch.SymBool
"""What the tracer knows of numbers that are read from tensors."""
NO_NUMBERS = {
    torch.bfloat16: "Switch autocast off (torch.autocast('cpu', enabled=False)) and take casts to bfloat16 out.",
}
"""Kinds of numbers that ONNX runtimes have no kernels for, and the way out."""


def check_parameters(exported: ExportedProgram) -> None:
    """Refuses half precision, other devices and weights that are no numbers: all would end in a wrong or slow file."""
    weights = set(exported.graph_signature.parameters)
    for name, tensor in exported.state_dict.items():
        if tensor.device.type != "cpu":
            raise CaptureError(
                f"The parameter {name} is on the device {tensor.device}.",
                hint="Move the model to the CPU first: model.cpu().",
            )
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise CaptureError(
                f"The parameter {name} is {tensor.dtype}.", hint="Convert the model first: model.float()."
            )
        if name in weights and not bool(torch.isfinite(tensor).all()):
            raise CaptureError(
                f"The parameter {name} contains NaN or infinity.", hint="Take weights from before training diverged."
            )


def _check_batch(node: Node) -> None:
    """Refuses a clip without a batch, which PyTorch's layers take too: its first dim would be the batch.

    Raises:
        UsageError: It names the input.
    """
    layer = re.fullmatch(r"aten\.(?:conv|conv_transpose|max_pool|avg_pool)(\d)d", operator_name(node.target))
    x = node.args[0] if node.args else None
    if layer is None or not isinstance(x, Node) or rank_of(x) != int(layer[1]) + 1:
        return
    while x.all_input_nodes and _same_shape(x, x.all_input_nodes[0]):
        x = x.all_input_nodes[0]
    if x.op == "placeholder":
        shape = ", ".join(map(str, shape_of(x)))
        raise UsageError(
            f"The input {x.name} ({shape}) has no dim for the batch: {operator_name(node.target)} in "
            f"{module_path(node) or 'the model'} takes it as one clip.",
            hint=f"Give a batch of clips, (1, {shape}): clip[None].",
        )


def _same_shape(node: Node, operand: Node) -> bool:
    """Says whether an operand is a tensor of the shape of a result. Some operators give several."""
    return isinstance(operand.meta.get("val"), torch.Tensor) and shape_of(operand) == shape_of(node)


def _is_empty(node: object) -> bool:
    """Says whether a result is a tensor without numbers; a size that is open is not 0."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and any(type(size) is int and size == 0 for size in value.shape)


def check_operators(module: GraphModule) -> None:
    """Refuses what ONNX runtimes do not compute with, reads of memory, sizes that values decide, and empty results."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            _check_batch(node)
        if node.target is aten.as_strided.default:  # what is left of it: a step has other strides
            raise UnsupportedError(
                "It walks through memory from one dim into another.",
                **where(node),
                hint="Write it with slices, unfold or reshape.",
            )
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and free_unbacked_symbols(value):
            raise CaptureError(
                "How large its result is depends on the values that it is given.",
                **where(node),
                hint="Compute sizes from shapes alone; repeat_interleave takes a number, or output_size.",
            )
        number = next((n for n in node.all_input_nodes if isinstance(n.meta.get("val"), NUMBERS)), None)
        if isinstance(value, torch.Tensor) and number is not None:
            raise CaptureError(
                "It takes a number that is read from a tensor.",
                **where(node),
                hint="Keep it a tensor: x * x.mean(), without item() or float().",
            )
        way_out = NO_NUMBERS.get(value.dtype) if isinstance(value, torch.Tensor) else None
        if way_out is not None:
            raise CaptureError(
                f"The model computes in {value.dtype} here.",
                operator=operator_name(node.target) if node.op == "call_function" else None,
                module_path=module_path(node),
                hint=way_out,
            )
    for node in filter(_is_empty, returned(module.graph)):
        raise CaptureError(
            f"The model returns a tensor without any number in it, of the shape {tuple(shape_of(node))}.",
            **where(node),
            hint="Return what has numbers for each clip.",
        )
