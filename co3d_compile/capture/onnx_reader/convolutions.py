"""Convolutions, transposed convolutions and pools of any rank, with every kind of padding that ONNX has."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, even_padding, even_part, pad_pairs, reads

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


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


def _pool_window(call: NodeCall, x: Tensor) -> Window:
    """Reads the window of a pool, which gives the size of its kernel as an attribute."""
    return _window(call, x, call.integers("kernel_shape") or [])


def _window(call: NodeCall, x: Tensor, kernel: list[int]) -> Window:
    """Reads the window of an operator; its padding is as given, or as ``auto_pad`` asks for."""
    space = len(kernel)
    stride, dilation = _stride_and_dilation(call, space)
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


def _stride_and_dilation(call: NodeCall, space: int) -> tuple[list[int], list[int]]:
    ones = [1] * space
    return call.integers("strides", ones) or ones, call.integers("dilations", ones) or ones


@reads("Conv")
def convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves over one, two or three dims."""
    kernel = list(weight.shape[2:])
    if len(kernel) not in CONVOLUTIONS:
        raise call.refuse(f"slides over {len(kernel)} dims")
    window = _window(call, x, kernel)
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
    stride, dilation = _stride_and_dilation(call, space)
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


@reads("MaxPool")
def max_pool(call: NodeCall, x: Tensor) -> tuple[Tensor, ...]:
    """Takes the largest entry below a kernel."""
    kernel, stride, dilation, pads = _pool_window(call, x)
    if len(call.node.outputs) > 1 and call.node.outputs[1].name:
        raise call.refuse("gives the places of its maxima")
    ceil = bool(call.integer("ceil_mode", 0))
    padding, others = even_part(pads, [k // 2 for k in kernel])
    if any(others):
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        x = F.pad(x, pad_pairs(others), value=lowest)
    dtype = x.dtype
    x = x if x.is_floating_point() else x.to(torch.float64)  # PyTorch has no max pool of whole numbers
    return (MAX_POOLS[len(kernel)](x, kernel, stride, padding, dilation, ceil).to(dtype),)


@reads("AveragePool")
def average_pool(call: NodeCall, x: Tensor) -> Tensor:
    """Takes the mean below a kernel."""
    window = _pool_window(call, x)
    kernel, padding = window.kernel, even_padding(window.pads)
    ceil, count = bool(call.integer("ceil_mode", 0)), bool(call.integer("count_include_pad", 0))
    dilated = any(d != 1 for d in window.dilation)
    if dilated or padding is None or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return _mean_by_convolution(x, window, ceil, count)
    pools = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
    return pools[len(kernel)](x, kernel, window.stride, padding, ceil, count)


def _mean_by_convolution(x: Tensor, window: Window, ceil: bool, count_padding: bool) -> Tensor:
    """Computes a mean that PyTorch's pools cannot express: a sum by convolution over the entries counted."""
    kernel, stride, dilation, given = window
    pads = _with_ceiling(x, window) if ceil else given
    channels, convolve = x.shape[1], CONVOLUTIONS[len(kernel)]
    ones = torch.ones([channels, 1, *kernel], dtype=x.dtype)
    sums = convolve(F.pad(x, pad_pairs(pads)), ones, None, stride, 0, dilation, channels)
    if count_padding and pads == given:
        return sums / float(torch.Size(kernel).numel())
    there = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    if count_padding:  # the padding that the file asks for counts; what rounding up adds to it does not
        there, pads = F.pad(there, pad_pairs(given), value=1.0), [p - g for p, g in zip(pads, given, strict=True)]
    there = F.pad(there, pad_pairs(pads))
    return sums / convolve(there, ones[:1], None, stride, 0, dilation)


def _with_ceiling(x: Tensor, window: Window) -> list[int]:
    """Pads more at the ends: as much as makes the number of outputs, rounded down, what it was rounded up."""
    kernel, stride, dilation, given = window
    pads, space = list(given), len(kernel)
    for i in range(space):
        extent = (kernel[i] - 1) * dilation[i] + 1
        room = x.shape[2 + i] + pads[i] + pads[space + i] - extent
        outputs = -(-room // stride[i]) + 1
        if (outputs - 1) * stride[i] >= x.shape[2 + i] + pads[i]:  # would begin in the padding at the end
            outputs -= 1
        pads[space + i] += max(0, (outputs - 1) * stride[i] - room)
    return pads


@reads("LpPool")
def lp_pool(call: NodeCall, x: Tensor) -> Tensor:
    """Takes the p-norm below a kernel."""
    p = call.integer("p", 2)
    kernel, stride, dilation, pads = _pool_window(call, x)
    if call.integer("ceil_mode", 0):
        raise call.refuse("has ceil_mode")
    channels = x.shape[1]
    ones = torch.ones([channels, 1, *kernel], dtype=x.dtype)
    powers = F.pad(x.abs() ** p, pad_pairs(pads))
    return CONVOLUTIONS[len(kernel)](powers, ones, None, stride, 0, dilation, channels) ** (1.0 / p)


@reads("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(call: NodeCall, x: Tensor) -> Tensor:
    """Pools over all dims behind the channels."""
    dims = list(range(2, x.dim()))
    if call.node.op_type == "GlobalAveragePool":
        return x.mean(dims, keepdim=True)
    if call.node.op_type == "GlobalMaxPool":
        return x.amax(dims, keepdim=True)
    p = call.integer("p", 2)
    return (x.abs() ** p).sum(dims, keepdim=True) ** (1.0 / p)
