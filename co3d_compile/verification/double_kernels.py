"""Convolutions in float64 of each channel alone, for which PyTorch has no quick kernel: a sum over their taps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

aten = torch.ops.aten
AT_ONCE = 500_000  # numbers that are read again and again for the taps of a kernel: 4 MB


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Computes what ``aten.conv3d`` does."""
    alone = x.dim() == 5 and weight.shape[1] == 1 and len(weight) == x.shape[1] == groups > 1
    if x.dtype is not torch.float64 or not alone:
        result: Tensor = aten.conv3d.default(x, weight, bias, stride, padding, dilation, groups)
        return result
    return _by_taps(x, weight, bias, _three(stride), _three(padding), _three(dilation))


def _three(numbers: Sequence[int]) -> list[int]:
    """Lists a number for each dim, of one for all or of one for each."""
    return list(numbers) * (3 // len(numbers))


def _by_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Computes it as each tap times what that reads, summed up: part by part, so that the sums stay in the cache."""
    sizes = [
        (size + 2 * p - d * (taps - 1) - 1) // s + 1
        for size, taps, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    result = x.new_empty([*x.shape[:2], *sizes])
    numbers = x.shape[0] * x.shape[3] * x.shape[4]  # of a frame of one channel
    frames, channels = max(1, AT_ONCE // numbers), max(1, AT_ONCE // (numbers * sizes[0]))
    space = [p for p in reversed(padding[1:]) for _ in range(2)]
    for first in range(0, sizes[0], frames):
        count = min(frames, sizes[0] - first)
        begin = first * stride[0] - padding[0]
        end = begin + (count - 1) * stride[0] + dilation[0] * (weight.shape[2] - 1) + 1
        pads = [*space, max(0, min(0, end) - begin), max(0, end - max(begin, x.shape[2]))]
        there = slice(max(0, begin), max(0, end))
        for at in range(0, x.shape[1], channels):
            own = slice(at, at + channels)
            read = torch.nn.functional.pad(x[:, own, there], pads)
            _sum_taps(result[:, own, first : first + count], read, weight[own], stride, dilation)
    return result if bias is None else result + bias.reshape(-1, 1, 1, 1)


def _sum_taps(result: Tensor, x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> None:
    """Writes the sum of each tap times what that reads."""
    kernel = weight.flatten(1)
    for i, tap in enumerate(product(*map(range, weight.shape[2:]))):
        read = x
        for dim, (at, size, s, d) in enumerate(zip(tap, result.shape[2:], stride, dilation, strict=True), 2):
            read = aten.slice.Tensor(read, dim, at * d, at * d + (size - 1) * s + 1, s)
        factor = kernel[:, i].reshape(-1, 1, 1, 1)
        if i:
            result.addcmul_(read, factor)
        else:
            torch.mul(read, factor, out=result)
