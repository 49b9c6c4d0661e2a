"""Pools of any rank: the largest entry below a kernel and where it was, means, p-norms; what puts maxima back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.convolutions import CONVOLUTIONS, Window, stride_and_dilation, window_of
from co3d_compile.capture.onnx_reader.node_call import (
    NodeCall,
    Value,
    even_padding,
    even_part,
    pad_pairs,
    reads,
    whole_numbers,
)

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _pool_window(call: NodeCall, x: Tensor) -> Window:
    """Reads the window of a pool, which gives the size of its kernel as an attribute."""
    return window_of(call, x, call.integers("kernel_shape") or [])


@reads("MaxPool")
def max_pool(call: NodeCall, x: Tensor) -> tuple[Tensor, ...]:
    """Takes the largest entry below a kernel; the second output says where it was."""
    kernel, stride, dilation, pads = _pool_window(call, x)
    ceil = bool(call.integer("ceil_mode", 0))
    padding, others = even_part(pads, [k // 2 for k in kernel])
    dtype, sizes = x.dtype, x.shape[2:]
    if any(others):
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        x = F.pad(x, pad_pairs(others), value=lowest)
    whole = x if x.is_floating_point() else x.to(torch.float64)  # PyTorch has no max pool of whole numbers
    pool, how = MAX_POOLS[len(kernel)], (kernel, stride, padding, dilation, ceil)
    if len(call.node.outputs) < 2 or not call.node.outputs[1].name:
        return (pool(whole, *how).to(dtype),)
    if set(kernel) == {1} and not any(pads):  # each entry is the largest of its own
        steps = tuple(slice(None, None, s) for s in stride)
        result, places = x[(slice(None), slice(None), *steps)], torch.arange(prod(sizes)).reshape(sizes)[steps]
    else:
        result, places = pool(whole, *how, return_indices=True)
        result = result.to(dtype)
    places = _places(places, x.shape[2:], sizes, others, call.integer("storage_order", 0))
    return result, places + _starts(call, x, prod(sizes))


def _places(places: Tensor, padded: Sequence[int], sizes: Sequence[int], pads: Sequence[int], turned: int) -> Tensor:
    """Writes places in a picture with padding as places in the one without.

    Args:
        places: They count row by row.
        padded, sizes: The sizes of both pictures.
        pads: The padding, all fronts and then all ends.
        turned: Whether the results count column by column.
    """
    if not turned and not any(pads):
        return places
    along: list[Tensor] = []
    for size, front in reversed(list(zip(padded, pads, strict=False))):
        along.insert(0, places % size - front)
        places = places // size
    order = reversed(range(len(sizes))) if turned else range(len(sizes))
    found = torch.zeros_like(places)
    for d in order:
        found = found * sizes[d] + along[d]
    return found


def _starts(call: NodeCall, x: Tensor, size: int) -> Tensor:
    """Finds the place at which each picture of a clip begins, as ONNX counts: through all pictures, one by one."""
    place = call.places[0] if call.places else None
    rows, channels = (s // call.clips if place is not None and place.dim == d else s for d, s in enumerate(x.shape[:2]))
    starts = (torch.arange(rows * channels) * size).reshape([rows, channels, *[1] * (x.dim() - 2)])
    return starts if place is None or place.dim > 1 else place.repeated(starts, call.clips)


@reads("MaxUnpool", host=(2,))
def max_unpool(call: NodeCall, x: Tensor, places: Tensor, shape: Value = None) -> Tensor:
    """Puts maxima back to where they were, and zeros between them."""
    kernel = call.integers("kernel_shape") or []
    stride, _ = stride_and_dilation(call, len(kernel))
    pads = call.integers("pads", [0] * (2 * len(kernel))) or []
    sizes = [(x.shape[2 + d] - 1) * stride[d] - pads[d] - pads[len(kernel) + d] + k for d, k in enumerate(kernel)]
    own = (places - _starts(call, x, prod(sizes))).flatten(2)
    result = x.new_zeros([*x.shape[:2], prod(sizes)]).scatter(2, own, x.flatten(2)).unflatten(2, sizes)
    if shape is None:
        return result
    more = [w - s for w, s in zip(whole_numbers(shape)[2:], sizes, strict=True)]
    return F.pad(result, pad_pairs([0] * len(more) + more))


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
