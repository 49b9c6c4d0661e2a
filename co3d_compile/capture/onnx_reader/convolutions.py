"""Convolutions and transposed convolutions of any rank, with every kind of padding that ONNX has."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, even_padding, even_part, pad_pairs, reads

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Window(NamedTuple):
    """What an operator reads below its kernel, and how far it moves.

    Attributes:
        kernel: The size of the kernel in each dim.
        stride: How many entries the kernel moves from one output to the next.
        dilation: How far apart the entries are that one output reads.
        pads: The padding of each dim: all fronts, then all ends.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    pads: list[int]


def window_of(call: NodeCall, x: Tensor, kernel: list[int]) -> Window:
    """Reads the window of an operator; its padding is as given, or as ``auto_pad`` asks for."""
    space = len(kernel)
    stride, dilation = stride_and_dilation(call, space)
    how = call.text("auto_pad", "NOTSET")
    if how in ("NOTSET", "VALID"):
        pads = call.integers("pads", [0] * (2 * space)) if how == "NOTSET" else [0] * (2 * space)
        return Window(kernel, stride, dilation, pads or [])
    fronts, backs = [], []
    for i in range(space):
        entries = x.shape[2 + i]
        outputs = -(-entries // stride[i])
        total = max(0, (outputs - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - entries)
        less, more = total // 2, total - total // 2
        fronts.append(less if how == "SAME_UPPER" else more)
        backs.append(more if how == "SAME_UPPER" else less)
    return Window(kernel, stride, dilation, fronts + backs)


def stride_and_dilation(call: NodeCall, space: int) -> tuple[list[int], list[int]]:
    ones = [1] * space
    return call.integers("strides", ones) or ones, call.integers("dilations", ones) or ones


@reads("Conv")
def convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves over one, two or three dims."""
    kernel = list(weight.shape[2:])
    if len(kernel) not in CONVOLUTIONS:
        raise call.refuse(f"slides over {len(kernel)} dims")
    window = window_of(call, x, kernel)
    padding, others = even_part(window.pads)
    x = F.pad(x, pad_pairs(others)) if any(others) else x
    return CONVOLUTIONS[len(kernel)](x, weight, bias, window.stride, padding, window.dilation, call.integer("group", 1))


@reads("ConvTranspose")
def transposed_convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves transposed. Uneven padding and given output shapes crop a result without padding."""
    kernel = list(weight.shape[2:])
    space = len(kernel)
    if space not in TRANSPOSED:
        raise call.refuse(f"slides over {space} dims")
    stride, dilation = stride_and_dilation(call, space)
    extra = call.integers("output_padding", [0] * space) or [0] * space
    pads = call.integers("pads", [0] * (2 * space)) or []
    wanted = call.integers("output_shape")
    how = call.text("auto_pad", "NOTSET")
    if wanted is None and how in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [x.shape[2 + i] * stride[i] for i in range(space)]
    if wanted is not None:
        pads = [0] * (2 * space)
        for i, size in enumerate(wanted[-space:]):
            whole = (x.shape[2 + i] - 1) * stride[i] + extra[i] + (kernel[i] - 1) * dilation[i] + 1
            total = whole - size
            pads[i] = total // 2 if how == "SAME_UPPER" else total - total // 2
            pads[space + i] = total - pads[i]
    padding, groups = even_padding(pads), call.integer("group", 1)
    if padding is not None and all(p >= 0 for p in padding):
        return TRANSPOSED[space](x, weight, bias, stride, padding, extra, groups, dilation)
    whole_result = TRANSPOSED[space](x, weight, bias, stride, [0] * space, extra, groups, dilation)
    return F.pad(whole_result, pad_pairs([-p for p in pads]))
