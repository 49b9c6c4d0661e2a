"""Operators over all of the clip in the ways in which code bases write them: each stays on a window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Graph, by_clip, seeded

_VIDEO = (1, 3, 6, 6, 6)
_SERIES = (1, 4, 12)
_TOKENS = (1, 8, 12)


def attend(m: Any, x: Tensor, **how: Any) -> Tensor:
    return m.out(F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1), **how))


def grouped(m: Any, x: Tensor) -> Tensor:
    """Four heads of queries on two of keys, another scale, a learned bias."""
    parts = zip(m.qkv(x).split([12, 6, 6], -1), (4, 2, 2), strict=True)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y, heads in parts)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias.weight, scale=0.4, enable_gqa=True)
    return m.out(y.transpose(1, 2).flatten(2))


def recurrent_both(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Sign language's head: time first, both directions, a label for every entry; the batch is the second dim."""
    y = m.net(x).permute(2, 0, 1)
    both, last = m.gru(y)
    return m.out(both).log_softmax(-1), last, y.topk(2, 0)[0]


def adaptive_kernel(m: Any, x: Tensor) -> Tensor:
    """TAM's global branch: the batch is folded into channels, and convolved with kernels made of all entries."""
    n, c, t, h, w = x.shape
    kernel = m.kernel(x.mean((3, 4)).view(n * c, t)).softmax(-1).view(n * c, 1, 3, 1)
    y = F.conv2d(x.reshape(1, n * c, t, h * w), kernel, padding=(1, 0), groups=n * c)
    return m.out(y.view(n, c, t, h, w).mean((2, 3, 4)))


def _attention(**how: Any) -> nn.Module:
    return Graph(lambda m, x: attend(m, x, **how), qkv=nn.Linear(12, 36), out=nn.Linear(12, 5))


_WINDOWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "attention_of_rank_3": (_attention, _TOKENS, 1),
    "attention_causal": (lambda: _attention(is_causal=True), _TOKENS, 1),
    "attention_grouped": (
        lambda: Graph(grouped, qkv=nn.Linear(12, 24), bias=nn.Linear(8, 8), out=nn.Linear(12, 5)), _TOKENS, 1),
    "encoder_layer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), 1), _TOKENS, 1),
    "median": (lambda: Graph(lambda m, x: m.out(x.median(1)[0]), out=nn.Linear(12, 3)), _TOKENS, 1),
    "best_three": (lambda: Graph(lambda m, x: m.out(x.topk(3, 1)[0].mean(1)), out=nn.Linear(12, 3)), _TOKENS, 1),
    "instance_norm_1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.Conv1d(4, 3, 1)), _SERIES, 2),
    "recurrent_both": (
        lambda: Graph(recurrent_both, net=nn.Conv1d(4, 6, 3), gru=nn.GRU(6, 5, bidirectional=True),
                      out=nn.Linear(10, 3)), _SERIES, 2),
    "adaptive_kernel": (
        lambda: Graph(adaptive_kernel, kernel=nn.Linear(6, 3), out=nn.Linear(3, 2)), _VIDEO, 2),
}  # fmt: skip


def _windowed(name: str) -> Entry:
    make, shape, dim = _WINDOWS[name]
    reference = by_clip(time_dims=(dim,), outputs=3 if name == "recurrent_both" else 1)
    return Entry(name, seeded(make, shape), (shape,), "recompute", time_dim=dim, reference=reference)


WINDOW_STYLES = tuple(_windowed(name) for name in _WINDOWS)
