"""What ExecuTorch has no kernels for, in operators for which it has some.

Its verifier takes the Core ATen operators only, and shifts of bits are none. Its portable kernels take convolutions
over one or two dims. Its XNNPACK delegate leaves copies out, and then stumbles over one tensor that is two outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

aten = torch.ops.aten


def for_executorch(program: ExportedProgram) -> ExportedProgram:
    """Decomposes the program into operators that ExecuTorch has."""
    return program.run_decompositions(TABLE)


def _copied(x: Tensor, *, memory_format: torch.memory_format | None = None) -> Any:
    return aten.maximum.default(x, x) if memory_format is None else NotImplemented


def _shifted_right(x: Tensor, by: Tensor | int) -> Tensor:
    """Divides in two parts: 2 ** 31 is no int32."""
    for part in _halves(by):
        x = aten.div.Tensor_mode(x, part, rounding_mode="floor")
    return x


def _shifted_left(x: Tensor, by: Tensor | int) -> Tensor:
    for part in _halves(by):
        x = x * part
    return x


def _halves(by: Tensor | int) -> Sequence[Tensor | int]:
    """Finds two factors whose product is 2 to the power of ``by``."""
    if isinstance(by, Tensor):
        half = aten.div.Tensor_mode(by, 2, rounding_mode="floor")
        return aten.pow.Scalar(2, half), aten.pow.Scalar(2, by - half)
    return int(2 ** (by // 2)), int(2 ** (by - by // 2))


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Writes a convolution over three dims as the sum of those of its taps along the first one."""
    if x.dim() != 5:
        return NotImplemented
    taps, apart, step, front = weight.shape[2], dilation[0], stride[0], padding[0]
    back = front
    if transposed:  # over entries with zeros in between, its taps in the other order
        x, step = _with_zeros_between(x, step), 1
        front, back = (apart * (taps - 1) - front + more for more in (0, output_padding[0]))
        weight = weight.flip(2)
    x = aten.constant_pad_nd(x, [0, 0, 0, 0, front, back])
    entries = (x.shape[2] - apart * (taps - 1) - 1) // step + 1
    total = None
    for tap in range(taps):
        read = x[:, :, tap * apart : tap * apart + (entries - 1) * step + 1 : step]
        own = None if tap else bias
        rest = stride[1:], padding[1:], dilation[1:], transposed, output_padding[1:], groups
        part = aten.convolution(read.transpose(1, 2).contiguous().flatten(0, 1), weight[:, :, tap], own, *rest)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(-1, entries, *total.shape[1:]).transpose(1, 2)


def _with_zeros_between(x: Tensor, step: int) -> Tensor:
    """Takes the entries of dim 2 as far from each other as the stride is."""
    if step == 1:
        return x
    n, channels, entries, *place = x.shape
    filled = aten.constant_pad_nd(x.unsqueeze(3), [0, 0, 0, 0, 0, step - 1])
    return filled.reshape(n, channels, entries * step, *place)[:, :, : (entries - 1) * step + 1]


COMPOSITES = torch.export.default_decompositions()
TABLE: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    aten.clone.default: _copied,
    aten.convolution.default: _convolved,
    **{
        operator: COMPOSITES[operator]
        for operator in (
            aten.conv3d.default,
            aten.conv3d.padding,
            aten._convolution_mode.default,
            aten.conv_transpose3d.input,
        )
    },
    **dict.fromkeys(
        (
            aten.__rshift__.Scalar,
            aten.__rshift__.Tensor,
            aten.bitwise_right_shift.Tensor,
            aten.bitwise_right_shift.Tensor_Scalar,
        ),
        _shifted_right,
    ),
    **dict.fromkeys(
        (
            aten.__lshift__.Scalar,
            aten.__lshift__.Tensor,
            aten.bitwise_left_shift.Tensor,
            aten.bitwise_left_shift.Tensor_Scalar,
        ),
        _shifted_left,
    ),
}
