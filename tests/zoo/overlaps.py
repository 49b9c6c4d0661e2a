"""Overlap-and-add, as people write it: folds, and blocks that are added by constant indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Graph, long_clip, randomise


def _columns(m: Any, x: Tensor) -> Tensor:
    """(N, features, T): what is added."""
    return m.wide(torch.relu(m.conv(x)))


def _fold(
    m: Any, x: Tensor, *, kernel: int = 6, stride: int = 2, padding: int = 0, dilation: int = 1, more: int = 0
) -> Tensor:
    y = _columns(m, x)
    size = (y.shape[2] - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + more
    y = F.fold(y, (1, size), (1, kernel), (1, dilation), (0, padding), (1, stride))
    return m.out(y[:, :, 0])


def _upright(m: Any, x: Tensor) -> Tensor:
    """Time along the height, several columns of each entry side by side: patches of a spectrogram."""
    y = _columns(m, x)
    n, _, t = y.shape
    y = y.reshape(n, 8, 2, t).transpose(2, 3).reshape(n, 8, t * 2)
    return m.out(F.fold(y, (t + 1, 3), (2, 2), padding=0)[:, :, :, 1])


def _indices(t: int, width: int, stride: int) -> Tensor:
    return torch.arange(t)[:, None] * stride + torch.arange(width)


def _index_add(m: Any, x: Tensor) -> Tensor:
    y = _columns(m, x)
    n, _, t = y.shape
    y = y.reshape(n, 2, 6, t).transpose(2, 3).reshape(n, 2, t * 6)
    index = _indices(t, 6, 3).flatten()
    return m.out(x.new_zeros(n, 2, 3 * t + 4).index_add_(2, index, y))


def _subframes(m: Any, x: Tensor) -> Tensor:
    """Conv-TasNet's: blocks of 6 that overlap by 2 are three subframes of 2 each."""
    y = _columns(m, x).transpose(1, 2)
    n, t, _ = y.shape
    index = torch.arange(2 * t + 1).unfold(0, 3, 2).reshape(-1)
    y = y.reshape(n, t * 3, 4)
    return m.out(y.new_zeros(n, 2 * t + 1, 4).index_add_(1, index, y).transpose(1, 2)[:, :2])


def _index_put(m: Any, x: Tensor) -> Tensor:
    """The index has two dims, time comes first; what is added to is a constant, with places in front and behind."""
    y = _columns(m, x)
    n, _, t = y.shape
    y = y.reshape(n, 2, 6, t).permute(3, 2, 0, 1)
    start = torch.full((3 * t + 8, n, 2), 0.5)
    return m.out(start.index_put((_indices(t, 6, 3) + 2,), y, accumulate=True).permute(1, 2, 0))


def _scatter_add(m: Any, x: Tensor) -> Tensor:
    y = _columns(m, x)
    n, _, t = y.shape
    y = y.reshape(n, 2, 6, t).transpose(2, 3).reshape(n, 2, t * 6)
    index = _indices(t, 6, 2).flatten().expand(n, 2, -1)
    return m.out(x.new_zeros(n, 2, 2 * t + 4).scatter_add(2, index, y))


def _per_frame(m: Any, x: Tensor) -> Tensor:
    """Space is unfolded and folded again in each frame."""
    y = _columns(m, x)
    n, c, t = y.shape
    y = y.transpose(1, 2).reshape(n * t, 1, 3, c // 3)
    y = torch.tanh(F.unfold(y, 3, padding=1))
    y = F.fold(y, (3, c // 3), 3, padding=1).reshape(n, t, c).transpose(1, 2)
    return m.out(y[:, :2])


def _entry(name: str, forward: Callable[..., Tensor], wide: int = 12, **fields: Any) -> Entry:
    def build() -> nn.Module:
        layers = {"conv": nn.Conv1d(3, 4, 3, padding=1), "wide": nn.Conv1d(4, wide, 1)}
        return randomise(Graph(forward, **layers, out=nn.Conv1d(2, 2, 3, padding=1)), torch.randn(1, 3, 8))

    return Entry(name, build, ((1, 3, 8),), reference=long_clip(2), **fields)


def _folded(**geometry: int) -> Callable[..., Tensor]:
    return lambda m, x: _fold(m, x, **geometry)


OVERLAPS = (
    _entry("fold", _folded()),
    _entry("fold_padded", _folded(kernel=6, stride=3, padding=2, more=1)),
    _entry("fold_dilated", _folded(kernel=3, stride=1, dilation=2, padding=1), wide=6),
    _entry("fold_apart", _folded(kernel=3, stride=5), wide=6),
    _entry("fold_upright", _upright, wide=16),
    _entry("fold_per_frame", _per_frame),
    _entry("index_add", _index_add),
    _entry("subframes", _subframes),
    _entry("index_put", _index_put),
    _entry("scatter_add", _scatter_add),
)
