"""Convolutions in float64 of each channel alone, for which PyTorch has no quick kernel: a sum over their taps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

aten = torch.ops.aten


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
    """Computes it as each tap times what that reads, summed up."""
    x = torch.nn.functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
    sizes = [
        (size - d * (taps - 1) - 1) // s + 1
        for size, taps, s, d in zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    result = x.new_zeros([*x.shape[:2], *sizes])
    kernel = weight.flatten(1)
    for i, tap in enumerate(product(*map(range, weight.shape[2:]))):
        read = x
        for dim, (at, size, s, d) in enumerate(zip(tap, sizes, stride, dilation, strict=True), 2):
            read = aten.slice.Tensor(read, dim, at * d, at * d + (size - 1) * s + 1, s)
        result.addcmul_(read, kernel[:, i].reshape(-1, 1, 1, 1))
    return result if bias is None else result + bias.reshape(-1, 1, 1, 1)
