"""Verification in float64 computes convolutions of each channel alone by their taps: as PyTorch does, and quicker."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from co3d_compile.verification import double_kernels
from co3d_compile.verification.double_kernels import conv3d

CASES = [  # stride, padding, dilation, kernel, channels of each group
    ([1, 1, 1], [1, 1, 1], [1, 1, 1], (3, 3, 3), 1),
    ([1], [0], [1], (3, 3, 3), 1),
    ([1, 2, 2], [2, 0, 1], [1, 1, 1], (5, 1, 3), 1),
    ([2, 1, 3], [0, 2, 1], [2, 1, 2], (2, 3, 1), 1),
    ([1, 2, 2], [1, 1, 1], [1, 1, 1], (3, 3, 3), 2),
    ([1, 1, 1], [3, 2, 0], [1, 1, 1], (2, 1, 3), 1),
]


@pytest.mark.parametrize("at_once", [1, 500, 2000, 10**6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel", "channels"), CASES)
def test_it_is_the_convolution(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel: tuple[int, ...],
    channels: int,
    bias: bool,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(double_kernels, "AT_ONCE", at_once)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 9, 10, 11, generator=draws, dtype=torch.float64)
    x[:, :, 0] = torch.nan
    weight = torch.randn(6, channels, *kernel, generator=draws, dtype=torch.float64)
    added = torch.randn(6, generator=draws, dtype=torch.float64) if bias else None
    given = (x, weight, added, stride, padding, dilation, 6 // channels)
    torch.testing.assert_close(conv3d(*given), torch.ops.aten.conv3d.default(*given), equal_nan=True)
