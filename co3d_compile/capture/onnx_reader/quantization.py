"""Quantized models in QDQ form, read as the float models that they approximate."""

from __future__ import annotations

import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, reads


@reads("QuantizeLinear")
def quantize(call: NodeCall, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Passes numbers on as they are: the model is read without its rounding to 8 bits."""
    if any(user.op_type != "DequantizeLinear" for user, _ in call.node.outputs[0].uses()):
        raise call.refuse("feeds an operator in 8 bits", "Give the float model, or one in QDQ form.")
    return x


@reads("DequantizeLinear")
def dequantize(call: NodeCall, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Turns stored 8-bit weights into floats, and passes on what was never rounded."""
    if x.is_floating_point():
        return x
    scale = _spread(call, x, scale)
    number = x.to(torch.float32)
    return (number if zero is None else number - _spread(call, x, zero.to(torch.float32))) * scale


def _spread(call: NodeCall, x: Tensor, per_block: Tensor) -> Tensor:
    """Gives numbers, one per tensor, per entry of a dim or per block of a dim, a shape that meets ``x``."""
    axis = call.integer("axis", 1) % max(x.dim(), 1)
    if per_block.dim() == 1 and per_block.shape[0] > 1:
        return per_block.reshape([-1 if d == axis else 1 for d in range(x.dim())])
    if per_block.dim() > 1:
        return per_block.repeat_interleave(x.shape[axis] // per_block.shape[axis], axis)
    return per_block
