"""Recurrent layers over another dim than time: dual-path speech networks run over frequency, then over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import Entry, Graph, long_clip, randomise


def over_frequency(m: Any, x: Tensor) -> Tensor:
    """(N, 2, T, F): over the frequencies of a frame in both directions, then over time for each frequency."""
    x = m.conv(x).permute(0, 2, 3, 1)
    n, t, f, c = x.shape
    x = x + m.join(m.rows(x.reshape(n * t, f, c))[0]).reshape(n, t, f, c)
    y = m.columns(x.permute(0, 2, 1, 3).reshape(n * f, t, c))[0]
    return m.out(x + y.reshape(n, f, t, c).permute(0, 2, 1, 3))


def _sequence_first(m: Any, x: Tensor) -> Tensor:
    """The sequence is dim 0; what follows reads the last states too."""
    n, _, t, _ = x.shape
    rows = m.conv(x).permute(3, 0, 2, 1).flatten(1, 2)
    y, last = m.rows(rows)
    last = last[0] if isinstance(last, tuple) else last
    y = y.mean(0).reshape(n, t, -1)
    return m.out(torch.cat([y, *(s.reshape(n, t, -1) for s in last)], 2))


def _from_given(m: Any, x: Tensor) -> Tensor:
    """The state begins with what a linear layer makes of the frame, or with a learned one."""
    n, _, t, f = x.shape
    rows = m.conv(x).permute(0, 2, 3, 1).flatten(0, 1)
    if hasattr(m, "start"):
        first = m.start(rows.mean(1)).unsqueeze(0)
    else:
        first = m.learned.weight.unsqueeze(1).expand(-1, n * t, -1).contiguous()
    return m.out(m.rows(rows, first)[0]).reshape(n, t, f, -1)


_CLIP = (1, 2, 10, 6)


def _entry(
    name: str, forward: Callable[..., Tensor], layers: Callable[[], dict[str, nn.Module]], **fields: Any
) -> Entry:
    def build() -> nn.Module:
        taps = 1 if fields.get("causal") else 3
        conv = nn.Conv2d(2, 4, (taps, 3), padding=(taps // 2, 1))
        return randomise(Graph(forward, conv=conv, **layers()), torch.randn(_CLIP))

    return Entry(name, build, (_CLIP,), reference=long_clip(1), **fields)


def _gru(both: bool = True, **kwargs: Any) -> nn.GRU:
    return nn.GRU(4, 4, batch_first=True, bidirectional=both, **kwargs)


DUAL_PATH = (
    _entry(
        "dual_path",
        over_frequency,
        lambda: {"rows": _gru(), "join": nn.Linear(8, 4), "columns": _gru(False), "out": nn.Linear(4, 2)},
        causal=True,
        nan_start=False,
    ),
    _entry(
        "rows_lstm", _sequence_first, lambda: {"rows": nn.LSTM(4, 3, 2, bidirectional=True), "out": nn.Linear(18, 2)}
    ),
    _entry("rows_rnn", _sequence_first, lambda: {"rows": nn.RNN(4, 3, bias=False), "out": nn.Linear(6, 2)}),
    _entry(
        "rows_relu",
        _sequence_first,
        lambda: {"rows": nn.RNN(4, 3, nonlinearity="relu", bidirectional=True), "out": nn.Linear(12, 2)},
    ),
    _entry("rows_projected", _sequence_first, lambda: {"rows": nn.LSTM(4, 5, proj_size=3), "out": nn.Linear(6, 2)}),
    _entry("rows_given", _from_given, lambda: {"rows": _gru(False), "start": nn.Linear(4, 4), "out": nn.Linear(4, 2)}),
    _entry(
        "rows_learned", _from_given, lambda: {"rows": _gru(), "learned": nn.Embedding(2, 4), "out": nn.Linear(8, 2)}
    ),
)
