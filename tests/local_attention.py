"""Attention over time in a band, written in the ways people write it, and similarities of frames near each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 4
LENGTH = 16


class Part(nn.Module):
    """A part with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.places = nn.Parameter(torch.randn(LENGTH, CHANNELS))

    def scores(self, x: Tensor) -> Tensor:
        """Of every pair of frames, (N, T, T)."""
        y = x.transpose(1, 2)
        scores: Tensor = self.q(y) @ self.k(y).transpose(1, 2) / math.sqrt(CHANNELS)
        return scores

    def attend(self, x: Tensor, scores: Tensor) -> Tensor:
        """Values by their scores, (N, C, T)."""
        y: Tensor = (scores.softmax(-1) @ self.v(x.transpose(1, 2))).transpose(1, 2)
        return y


def distances(t: int) -> Tensor:
    """From each frame to each other."""
    i = torch.arange(t)
    return i[:, None] - i[None, :]


class Band(Part):
    """``x xT`` over time, of which each frame takes those with its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        """The similarities with the 7 frames around each, (N, 7, T)."""
        n, _, t = x.shape
        z = F.normalize(x.transpose(1, 2), dim=2)
        s = F.pad(torch.bmm(z, z.transpose(1, 2)), (3, 3))
        band = torch.arange(t)[:, None] + torch.arange(7)
        return s[torch.arange(n)[:, None, None], torch.arange(t)[:, None], band].transpose(1, 2)


class Masked(Part):
    """Attention by matrix products with a mask that is added."""

    def __init__(self, low: float, before: int, after: int) -> None:
        super().__init__()
        self.low, self.before_, self.after_ = low, before, after

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees those around it."""
        d = distances(x.shape[2])
        mask = torch.zeros(d.shape).masked_fill((d > self.before_) | (d < -self.after_), self.low)
        return self.attend(x, self.scores(x) + mask)


class Biased(Part):
    """Attention in a band, with what the distance adds to the scores: ALiBi's slope, or a learned number for each."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees 2 on both sides."""
        d = distances(x.shape[2])
        bias = -0.5 * d.abs() if self.table is None else self.table[(d + 2).clamp(0, 4)]
        return self.attend(x, (self.scores(x) + bias).masked_fill(d.abs() > 2, -torch.inf))


class FilledIn(Part):
    """Attention with scores that are filled in."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees 2 before and 1 behind it."""
        d = distances(x.shape[2])
        return self.attend(x, self.scores(x).masked_fill((d > 2) | (d < -1), -torch.inf))


class MaskedEnds(Part):
    """Scores of which some are minus infinity in the first frame, and others in the last one."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame has its own."""
        scores, place = self.q(x.transpose(1, 2)), torch.arange(x.shape[1])
        scores[:, :1] = scores[:, :1].masked_fill(place == 0, -torch.inf)
        scores[:, -1:] = scores[:, -1:].masked_fill(place == 1, -torch.inf)
        return scores.softmax(-1).transpose(1, 2)


class Written(Part):
    """A softmax written by hand, in a band."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees 2 on both sides."""
        s = torch.where(distances(x.shape[2]).abs() <= 2, self.scores(x), -1e9)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return ((e / e.sum(-1, keepdim=True)) @ self.v(x.transpose(1, 2))).transpose(1, 2)


class Weighted(Part):
    """A band of constant weights."""

    def forward(self, x: Tensor) -> Tensor:
        """A smoothing as a matrix product."""
        near = (distances(x.shape[2]).abs() <= 2).float()
        return x @ near / 5


class WeightedByEinsum(Part):
    """The same with the batch beside the channels, as ``einsum`` has it."""

    def forward(self, x: Tensor) -> Tensor:
        """A smoothing in which time is summed over."""
        near = (distances(x.shape[2]).abs() <= 2).float()
        return torch.einsum("st,nct->ncs", near, x) / 5
