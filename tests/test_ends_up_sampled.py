"""`boundary="exact"` where what is behind a stride is up-sampled: which sequences have exact ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_graphs import conv, fn
from torch import Tensor, nn
from unlike_streams import streams

import co3d_compile as co3d

pytestmark = pytest.mark.slow


def cropped(m: Any, a: Tensor) -> Tensor:
    return F.interpolate(m.d(a), scale_factor=2.0)[:, :, : a.shape[2]]


def filled(m: Any, a: Tensor) -> Tensor:
    u = m.t(F.max_pool1d(a, 2))
    return F.pad(u, (0, a.shape[2] - u.shape[2]))


def two_levels(m: Any, a: Tensor) -> Tensor:
    d = m.d(a)
    e = F.interpolate(m.e(F.relu(d)), scale_factor=2.0, mode="linear")[:, :, : d.shape[2]]
    return m.t(d + e)[:, :, : a.shape[2]]


def u_net(middle: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Entries at a lower rate, up-sampled, beside those of each frame."""
    torch.manual_seed(0)
    return fn(
        lambda m, x: m.out(torch.cat([a := m.a(x), middle(m, a)], 1)), a=lambda: conv(padding=1),
        d=lambda: conv(3, 1, 2, 1), e=lambda: conv(3, 1, 2, 1), t=lambda: nn.ConvTranspose1d(4, 4, 2, 2),
        out=lambda: nn.Conv1d(8, 4, 3, padding=1),
    )().eval()  # fmt: skip


@pytest.mark.parametrize("clip", [12, 13, 15])
@pytest.mark.parametrize(("middle", "stride"), [(cropped, 2), (filled, 2), (two_levels, 4)])
def test_behind_up_sampling_sequences_differ_from_the_clip_by_whole_strides(
    middle: Callable[[Any, Tensor], Tensor], stride: int, clip: int
) -> None:
    module = u_net(middle)
    streams(module, module, [clip, clip - stride, clip + 3 * stride], clip)
    more = f" {clip % stride} more than" if clip % stride else ""
    with pytest.raises(co3d.SessionError, match=f"ends after {clip + 1} frames.* in streams of{more} a multiple of"):
        streams(module, module, [clip + 1], clip)
