"""Networks with attention, recurrence or a position over time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Reference, Window, by_clip, long_clip, seeded, split


class NonLocalBlock(nn.Module):
    """Wang et al. 2018: every place attends to every place of the clip; keys and values are sub-sampled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv3d(channels, channels // 2, 1)
        self.phi = nn.Sequential(nn.Conv3d(channels, channels // 2, 1), nn.MaxPool3d((1, 2, 2)))
        self.g = nn.Sequential(nn.Conv3d(channels, channels // 2, 1), nn.MaxPool3d((1, 2, 2)))
        self.out = nn.Sequential(nn.Conv3d(channels // 2, channels, 1), nn.BatchNorm3d(channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[0], x.shape[1] // 2
        theta = self.theta(x).view(n, c, -1).permute(0, 2, 1)
        attention = F.softmax(torch.matmul(theta, self.phi(x).view(n, c, -1)), dim=-1)
        y = torch.matmul(attention, self.g(x).view(n, c, -1).permute(0, 2, 1))
        return self.out(y.permute(0, 2, 1).contiguous().view(n, c, *x.shape[2:])) + x


class NonLocalI3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2)), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((2, 1, 1))
        )
        self.block = NonLocalBlock(8)
        self.conv = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0))
        self.fc = nn.Linear(8, 5)

    def rest(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(self.block(x))).mean((2, 3, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


class FrameFeatures(nn.Module):
    """A small 2D network per frame, (N, T, C, H, W) to (N, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c, h, w = x.size()
        return self.net(x.view(n * t, c, h, w)).view(n, t, -1)


class TransformerOverTime(nn.Module):
    """Per-frame features, a learned position, a transformer encoder over time, mean."""

    def __init__(self, frames: int = 8) -> None:
        super().__init__()
        self.features = FrameFeatures()
        self.pos = nn.Parameter(torch.zeros(1, frames, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.features(x) + self.pos).mean(1))


class ConvThenPosition(nn.Module):
    """A temporal convolution, then a position embedding over time; keeps its time axis."""

    def __init__(self, frames: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.pos = nn.Parameter(torch.zeros(1, 6, frames))
        self.out = nn.Conv1d(6, 3, 1)

    def rest(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(x + self.pos))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.conv(x))


class CausalAttention(nn.Module):
    """Self-attention over time behind a mask: lower triangular, or the newest `band` entries only."""

    def __init__(self, band: int | None = None) -> None:
        super().__init__()
        self.band = band
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (y.view(n, t, 2, c // 2).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        if self.band is not None:
            mask = mask.triu(1 - self.band)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).reshape(n, t, c))


class AttentionPool(nn.Module):
    """Softmax over time as weights of a mean, behind temporal convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.score = nn.Conv1d(6, 1, 1)
        self.fc = nn.Linear(6, 3)

    def rest(self, x: Tensor) -> Tensor:
        return self.fc((x * F.softmax(self.score(x), dim=2)).sum(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(F.relu(self.conv(x)))


class Recurrent(nn.Module):
    """Per-frame features and a recurrent layer over time; the answer at every frame or at the last."""

    def __init__(self, kind: str, last: bool, both: bool = False) -> None:
        super().__init__()
        self.last = last
        self.features = FrameFeatures()
        cell = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind]
        self.rnn = cell(8, 6, num_layers=2 if kind == "lstm" else 1, batch_first=True, bidirectional=both)
        self.fc = nn.Linear(12 if both else 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.features(x))
        return self.fc(hidden[:, -1] if self.last else hidden)


class FinalHidden(nn.Module):
    """Classifies the final hidden state that an LSTM returns, (T, N, C) inside."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FrameFeatures()
        self.lstm = nn.LSTM(8, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.features(x).transpose(0, 1))
        return self.fc(hidden[-1])


def _last_reference(model: Any) -> Reference:
    """The recurrent state covers the whole stream; only its newest entry reaches the head."""

    def trunk(x: Tensor) -> Tensor:
        return model.rnn(model.features(x))[0]

    return Reference(trunk, (Window(lambda h: model.fc(h[:, -1])),), (1,))


def _final_hidden_reference(model: Any) -> Reference:
    def trunk(x: Tensor) -> Tensor:
        return model.lstm(model.features(x).transpose(0, 1))[0]

    return Reference(trunk, (Window(lambda h: model.fc(h[-1])),), (0,))


class FlattenHead(nn.Module):
    """Temporal convolutions, then a linear layer over all T entries: its weights fix T."""

    def __init__(self, frames: int = 8) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 3, 3, padding=1))
        self.fc = nn.Linear(3 * frames, 5)

    def rest(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.convs(x))


def _entry(name: str, factory: Any, shape: tuple[int, ...], **fields: Any) -> Entry:
    return Entry(name, seeded(factory, shape), (shape,), **fields)


def _rnn(name: str, *args: Any, **fields: Any) -> Entry:
    return _entry(name, lambda: Recurrent(*args), (1, 8, 3, 6, 6), time_dim=1, causal=True, nan_start=False, **fields)


def _split(trunk: str, time_dim: int = 2) -> Any:
    return split(lambda m: getattr(m, trunk), lambda m: m.rest, time_dim)


_FRAMES, _SERIES = (1, 8, 3, 6, 6), (1, 4, 8)

ATTENTION = (
    _entry("nonlocal_i3d", NonLocalI3D, (1, 3, 8, 8, 8), expect="recompute", reference=_split("stem")),
    _entry("transformer", TransformerOverTime, _FRAMES, expect="recompute", time_dim=1,
           reference=by_clip(time_dims=(1,))),
    _entry("position", ConvThenPosition, _SERIES, expect="recompute", reference=_split("conv")),
    _entry("attention_pool", AttentionPool, _SERIES, expect="recompute",
           reference=split(lambda m: lambda x: F.relu(m.conv(x)), lambda m: m.rest)),
    _entry("causal_attention", CausalAttention, (1, 8, 8), expect="recompute", time_dim=1,
           reference=by_clip(time_dims=(1,))),
    _entry("band_attention", lambda: CausalAttention(band=4), (1, 8, 8), time_dim=1, reference=long_clip(1),
           causal=True),
    _entry("flatten_head", FlattenHead, _SERIES, expect="recompute", reference=_split("convs")),
)  # fmt: skip

RECURRENT = (
    _rnn("cnn_lstm", "lstm", False, reference=long_clip(1)),
    _rnn("cnn_lstm_last", "lstm", True, reference=_last_reference),
    _rnn("cnn_gru", "gru", False, reference=long_clip(1)),
    _rnn("cnn_rnn", "rnn", False, reference=long_clip(1)),
    _entry("lstm_final_hidden", FinalHidden, _FRAMES, time_dim=1, causal=True, nan_start=False,
           reference=_final_hidden_reference),
    _entry("cnn_bilstm", lambda: Recurrent("lstm", False, True), _FRAMES, expect="recompute", time_dim=1,
           reference=by_clip(time_dims=(1,))),
)  # fmt: skip
