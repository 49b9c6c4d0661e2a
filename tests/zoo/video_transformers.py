"""Video transformers in the order of operators of their code: each token of a clip attends to tokens of all frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Entry, by_clip, seeded

SHAPE, PATCH, WIDTH, HEADS = (1, 8, 3, 8, 8), 4, 8, 2
ROWS = SHAPE[3] // PATCH


class Attention(nn.Module):
    """Of all tokens of a row to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (c // HEADS) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, c))


class Features(nn.Sequential):
    """A norm and two layers on each token."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class VideoMAE(nn.Module):
    """Tong et al. 2022: a token of two frames and one patch attends to all tokens of the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, WIDTH, (2, PATCH, PATCH), (2, PATCH, PATCH))
        self.places: Tensor
        self.register_buffer("places", self.waves(SHAPE[1] // 2 * ROWS**2))
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.features = nn.ModuleList(Features() for _ in range(2))
        self.norm, self.classify = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    @staticmethod
    def waves(tokens: int) -> Tensor:
        """The place of each token, as sines and cosines."""
        angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(WIDTH) // 2 * 2 / WIDTH)
        return torch.where(torch.arange(WIDTH) % 2 == 0, angles.sin(), angles.cos())[None]

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x.permute(0, 2, 1, 3, 4)).flatten(2).transpose(1, 2)
        y = y + self.places.type_as(y).clone().detach()
        for attention, features in zip(self.attention, self.features, strict=True):
            y = y + attention(y)
            y = y + features(y)
        return self.classify(self.norm(y.mean(1)))


class Divided(nn.Module):
    """A layer of TimeSformer: each patch attends to itself in all frames, then to its frame and the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time, self.over_space, self.features = Attention(), Attention(), Features()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        n = x.shape[0]
        token, y = x[:, 0].unsqueeze(1), x[:, 1:]
        seen = self.over_time(y.reshape(n, ROWS, ROWS, frames, WIDTH).reshape(n * ROWS**2, frames, WIDTH))
        y = y + self.dense(seen.reshape(n, ROWS, ROWS, frames, WIDTH).reshape(n, ROWS**2 * frames, WIDTH))
        tokens = token.repeat(1, frames, 1).reshape(n * frames, 1, WIDTH)
        places = y.reshape(n, ROWS, ROWS, frames, WIDTH).permute(0, 3, 1, 2, 4).reshape(n * frames, ROWS**2, WIDTH)
        seen = self.over_space(torch.cat((tokens, places), 1))
        tokens = torch.mean(seen[:, 0].reshape(n, frames, WIDTH), 1, True)
        places = seen[:, 1:].reshape(n, frames, ROWS, ROWS, WIDTH).permute(0, 2, 3, 1, 4)
        y = torch.cat((token, y), 1) + torch.cat((tokens, places.reshape(n, ROWS**2 * frames, WIDTH)), 1)
        return y + self.features(y)


class TimeSformer(nn.Module):
    """Bertasius et al. 2021, attention over time and over space by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_space = nn.Parameter(torch.zeros(1, 1 + ROWS**2, WIDTH))
        self.pos_time = nn.Parameter(torch.zeros(1, SHAPE[1], WIDTH))
        self.layers = nn.ModuleList(Divided() for _ in range(2))
        self.norm, self.classify = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        y = self.patches(x.reshape(n * t, *x.shape[2:])).flatten(2).transpose(1, 2)
        y = torch.cat((self.token.expand(y.size(0), -1, -1), y), 1) + self.pos_space
        token = y[:n, 0, :].unsqueeze(1)
        y = y[:, 1:].reshape(n, t, ROWS**2, WIDTH).permute(0, 2, 1, 3).reshape(n * ROWS**2, t, WIDTH)
        y = (y + self.pos_time).view(n, ROWS**2, t, WIDTH).reshape(n, ROWS**2 * t, WIDTH)
        y = torch.cat((token, y), 1)
        for layer in self.layers:
            y = layer(y, t)
        return self.classify(self.norm(y)[:, 0])


def _entry(name: str, factory: type[nn.Module], stride: int) -> Entry:
    reference = by_clip(time_dims=(1,), stride=stride)
    return Entry(name, seeded(factory, SHAPE), (SHAPE,), "recompute", time_dim=1, reference=reference)


VIDEO_TRANSFORMERS = (_entry("videomae", VideoMAE, 2), _entry("timesformer", TimeSformer, 1))
