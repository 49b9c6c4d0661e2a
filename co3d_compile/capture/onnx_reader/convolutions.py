"""Convolutions, transposed convolutions and pools of any rank, with every kind of padding that ONNX has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, even_padding, even_part, pad_pairs, reads

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _geometry(call: NodeCall, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the stride and dilation of an operator that slides."""
    ones = [1] * len(kernel)
    return call.integers("strides", ones) or ones, call.integers("dilations", ones) or ones


def _pads(
    call: NodeCall, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Returns the padding, all fronts and then all ends: as given, or as ``auto_pad`` asks for."""
    space = len(kernel)
    how = call.text("auto_pad", "NOTSET")
    if how in ("NOTSET", "VALID"):
        return (call.integers("pads", [0] * (2 * space)) or []) if how == "NOTSET" else [0] * (2 * space)
    fronts, backs = [], []
    for i in range(space):
        entries = x.shape[2 + i]
        outputs = -(-entries // stride[i])
        total = max(0, (outputs - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - entries)
        less, more = total // 2, total - total // 2
        fronts.append(less if how == "SAME_UPPER" else more)
        backs.append(more if how == "SAME_UPPER" else less)
    return fronts + backs


@reads("Conv")
def convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves over one, two or three dims."""
    kernel = list(weight.shape[2:])
    if len(kernel) not in CONVOLUTIONS:
        raise call.refuse(f"slides over {len(kernel)} dims")
    stride, dilation = _geometry(call, kernel)
    pads = _pads(call, x, kernel, stride, dilation)
    padding, others = even_part(pads)
    x = F.pad(x, pad_pairs(others)) if any(others) else x
    return CONVOLUTIONS[len(kernel)](x, weight, bias, stride, padding, dilation, call.integer("group", 1))


@reads("ConvTranspose")
def transposed_convolution(call: NodeCall, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves transposed. Uneven padding and given output shapes crop a result without padding."""
    kernel = list(weight.shape[2:])
    space = len(kernel)
    if space not in TRANSPOSED:
        raise call.refuse(f"slides over {space} dims")
    stride, dilation = _geometry(call, kernel)
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
    kernel = call.integers("kernel_shape") or []
    stride, dilation = _geometry(call, kernel)
    pads = _pads(call, x, kernel, stride, dilation)
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
    kernel = call.integers("kernel_shape") or []
    stride, dilation = _geometry(call, kernel)
    if any(d != 1 for d in dilation):
        return _mean_by_convolution(call, x, kernel, stride, dilation)
    pads = _pads(call, x, kernel, stride, dilation)
    ceil, count = bool(call.integer("ceil_mode", 0)), bool(call.integer("count_include_pad", 0))
    padding = even_padding(pads)
    if padding is None or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return _mean_by_convolution(call, x, kernel, stride, dilation)
    pools = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
    return pools[len(kernel)](x, kernel, stride, padding, ceil, count)


def _mean_by_convolution(
    call: NodeCall, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Computes a mean that PyTorch's pools cannot express: a sum by convolution over the entries counted."""
    given, space = _pads(call, x, kernel, stride, dilation), len(kernel)
    pads = _with_ceiling(x, kernel, stride, dilation, given) if call.integer("ceil_mode", 0) else given
    channels, counts = x.shape[1], bool(call.integer("count_include_pad", 0))
    ones = torch.ones([channels, 1, *kernel], dtype=x.dtype)
    sums = CONVOLUTIONS[space](F.pad(x, pad_pairs(pads)), ones, None, stride, 0, dilation, channels)
    if counts and pads == given:
        return sums / float(torch.Size(kernel).numel())
    there = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    if counts:  # the padding that the file asks for counts; what rounding up adds to it does not
        there, pads = F.pad(there, pad_pairs(given), value=1.0), [p - g for p, g in zip(pads, given, strict=True)]
    there = F.pad(there, pad_pairs(pads))
    return sums / CONVOLUTIONS[space](there, ones[:1], None, stride, 0, dilation)


def _with_ceiling(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], pads: Sequence[int]
) -> list[int]:
    """Returns the padding at the ends with which rounding the number of outputs up is rounding it down."""
    pads, space = list(pads), len(kernel)
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
    kernel = call.integers("kernel_shape") or []
    stride, dilation = _geometry(call, kernel)
    if call.integer("ceil_mode", 0):
        raise call.refuse("has ceil_mode")
    pads, channels = _pads(call, x, kernel, stride, dilation), x.shape[1]
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
