"""Small networks with a part over time that has no rule: local ones with their reach, and global ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from local_attention import (
    CHANNELS,
    LENGTH,
    Band,
    Biased,
    FilledIn,
    Masked,
    MaskedEnds,
    Part,
    Weighted,
    WeightedByEinsum,
    Written,
    distances,
)
from torch import Tensor, nn
from torch.nn import functional as F

CLIP = (torch.zeros(1, CHANNELS, LENGTH),)


class Around(nn.Module):
    """A convolution in front of the part and one behind it; (N, C, T) in and out."""

    def __init__(self, part: Callable[[Tensor], Tensor], kernel: int = 3) -> None:
        super().__init__()
        self.part = part
        self.before = nn.Conv1d(CHANNELS, CHANNELS, kernel, padding=kernel // 2)
        self.behind = nn.LazyConv1d(2, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """The part between the convolutions."""
        y: Tensor = self.behind(self.part(self.before(x)))
        return y


class Variance(Part):
    """Local mean and variance by ``unfold``."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame less the mean of five, by their deviation."""
        n, c, t = x.shape
        y = F.unfold(x.unsqueeze(-1), (5, 1), padding=(2, 0)).view(n, c, 5, t)
        return (x - y.mean(2)) / (y.var(2) + 1e-3).sqrt()


class Largest(Part):
    """A maximum over five frames by ``unfold``."""

    def forward(self, x: Tensor) -> Tensor:
        """The largest of each frame and two on each side."""
        n, c, t = x.shape
        return F.unfold(x.unsqueeze(-1), (5, 1), padding=(2, 0)).view(n, c, 5, t).amax(2)


class Histogram(Part):
    """How many channels of a frame are in which of eight bins, by ``scatter_add``."""

    def __init__(self, bins: Callable[[Tensor], Tensor] = lambda pixels: pixels >> 5) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """Histograms (N, 8, T)."""
        n, c, t = x.shape
        bins = self.bins((x.transpose(1, 2).reshape(n * t, c) * 64).clamp(0, 255).to(torch.uint8).int()).long()
        bins = (bins + (torch.arange(n * t) << 3).view(-1, 1)).reshape(-1)
        counts = torch.zeros(n * t * 8).scatter_add_(0, bins, torch.ones(len(bins)))
        return counts.view(n, t, 8).transpose(1, 2)


class MaskedBlocks(Part):
    """Attention within blocks of four frames, by a mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees those of its block."""
        block = torch.arange(x.shape[2]) // 4
        return self.attend(x, self.scores(x) + torch.where(block[:, None] == block[None], 0.0, -1e9))


class SlidingChunks(Part):
    """Attention in a band, computed in chunks of four frames, each with those beside it."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees 2 on both sides. A clip is of whole chunks."""
        n, c, t = x.shape
        q, k, v = (f(x.transpose(1, 2)) for f in (self.q, self.k, self.v))
        k, v, there = (F.pad(y, (0, 0, 4, 4)).unflatten(1, (-1, 4)) for y in (k, v, torch.ones(1, t, 1)))
        k, v, there = (torch.cat([y[:, :-2], y[:, 1:-1], y[:, 2:]], 2) for y in (k, v, there))
        near = (torch.arange(4)[:, None] + 4 - torch.arange(12)).abs() <= 2
        scores = (q.unflatten(1, (-1, 4)) @ k.transpose(2, 3)).masked_fill(~near | (there.mT == 0), -1e9)
        return (scores.softmax(-1) @ v).reshape(n, t, c).transpose(1, 2)


class CutChunks(Part):
    """Attention in blocks of four frames to those in two before, cut out one by one in Python."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees its block and 2 before it."""
        n, c, t = x.shape
        q, k, v = (f(x.transpose(1, 2)) for f in (self.q, self.k, self.v))
        k, v = (F.pad(y, (0, 0, 2, 0)) for y in (k, v))
        k = torch.stack([k[:, 4 * i : 4 * i + 6] for i in range(t // 4)], 1)
        v = torch.cat([v[:, 4 * i : 4 * i + 6] for i in range(t // 4)], 1).unflatten(1, (-1, 6))
        return ((q.unflatten(1, (-1, 4)) @ k.transpose(2, 3)).softmax(-1) @ v).reshape(n, t, c).transpose(1, 2)


class BlocksInTheBatch(Part):
    """Attention of blocks, which are rows of the batch, to what is around them, as ASFormer has it."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees its block of 4 and 2 on both sides; there is a mask for what lies outside of the clip."""
        n, c, t = x.shape
        q, k, v = (f(x.transpose(1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v, there = (F.pad(y, (2, 2)) for y in (k, v, torch.ones(n, 1, t)))
        k, v, there = (
            torch.stack([y[:, :, 4 * i : 4 * i + 8] for i in range(t // 4)], 1).flatten(0, 1) for y in (k, v, there)
        )
        q = q.reshape(n, c, t // 4, 4).permute(0, 2, 1, 3).reshape(-1, c, 4)
        seen = (q.transpose(1, 2) @ k + torch.log(there + 1e-6)).softmax(-1) * there
        y = (v @ seen.transpose(1, 2)).reshape(n, t // 4, c, 4)
        return y.permute(0, 2, 1, 3).reshape(n, c, t)


class EveryOther(Part):
    """Entries that are changed in place, every second one."""

    def forward(self, x: Tensor) -> Tensor:
        """Each depends on itself alone, the even ones in another way."""
        y = x.clone()
        y[:, :, ::2] *= 2
        return y


class FourthOver(Part):
    """Entries that a mask of all frames says."""

    def forward(self, x: Tensor) -> Tensor:
        """Every fourth entry is one."""
        y = x.clone()
        y[:, :, torch.arange(x.shape[2]) % 4 == 0] = 1.0
        return y


class Gradient(Part):
    """Central differences, by differences of its own at both ends."""

    def forward(self, x: Tensor) -> Tensor:
        """As long as x."""
        return torch.gradient(x, dim=2)[0]


class Rolled(Part):
    """Each frame less the one before; what ``roll`` takes from the other end is written over."""

    def forward(self, x: Tensor) -> Tensor:
        """As long as x."""
        before = torch.roll(x, 1, 2)
        before[:, :, 0] = 0
        return x - before


class Flipped(Part):
    """A causal convolution on a clip that runs backwards, and back again."""

    def forward(self, x: Tensor) -> Tensor:
        """Each frame sees 2 behind it."""
        y = F.conv1d(F.pad(x.flip(2), (2, 0)), self.q.weight[:, :, None].expand(-1, -1, 3))
        return torch.tanh(y).flip(2)


class RolledMasked(Part):
    """The frame before; what ``roll`` takes from the other end is multiplied by zero."""

    def forward(self, x: Tensor) -> Tensor:
        """As long as x."""
        return torch.roll(x, 1, 2) * (torch.arange(x.shape[2]) > 0)


class Envelope(Part):
    """What an inverse Fourier transform divides by: the windows that lie over each entry."""

    def forward(self, x: Tensor) -> Tensor:
        """Windows of 8, every 4 entries: one window alone at both ends."""
        windows = torch.hann_window(10)[None, None, 1:9]
        over = F.conv_transpose1d(torch.ones(1, 1, x.shape[2] // 4 - 1), windows.square(), stride=4)
        return x / over


class Spectrum(Part):
    """Half of each channel's short-time spectrum, as a signal again; the channels are folded into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Windows of 8, every 4 entries."""
        window = torch.hann_window(8)
        spectrum = torch.stft(x.flatten(0, 1), 8, 4, window=window, return_complex=True) * 0.5
        return torch.istft(spectrum, 8, 4, window=window, length=x.shape[2]).unflatten(0, (-1, CHANNELS))


class Global(Part):
    """Parts whose every entry depends on all frames, or on where it is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """One of them."""
        t = x.shape[2]
        mean = x.mean(2, keepdim=True)
        if self.kind == "compared with the mean":
            return torch.where(x > mean, x, x.flip(1)) + self.attend(x, self.scores(x)) * 0
        if self.kind == "saturated gate":
            return self.attend(x * torch.sigmoid(60 + self.scores(x).mean((1, 2))).view(-1, 1, 1), self.scores(x))
        if self.kind == "gate that rarely opens":
            return x + x.flip(1) * (self.scores(x).amax((1, 2)) > 40).view(-1, 1, 1)
        if self.kind == "gate by the largest":
            return x * (self.scores(x).mean(1).argmax(1) % 2).view(-1, 1, 1)
        if self.kind == "softmax":
            return self.attend(x, self.scores(x))
        if self.kind == "rolled":
            return torch.roll(x, 2, 2) + x
        if self.kind == "flipped":
            return x.flip(2) + x
        if self.kind == "sort":
            return x.sort(2).values
        if self.kind == "less the mean":
            return x - mean
        if self.kind == "by distance":
            return self.attend(x, self.scores(x) - 0.5 * distances(t).abs())
        if self.kind == "weak mask":
            return self.attend(x, self.scores(x) - 30.0 * (distances(t).abs() > 2))
        if self.kind == "two rates":
            return x + F.interpolate(x, scale_factor=2.0)[:, :, :t]
        assert self.kind == "learned positions"
        return Band.forward(self, x) + (self.places @ self.q.weight)[None, :, 0:1].transpose(1, 2)  # type: ignore


LOCAL: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int, int]]]] = {
    "band": (Band, [(3, 3, 1)]),
    "mask -1e4": (lambda: Masked(-1e4, 2, 2), [(2, 2, 1)]),
    "mask -1e9": (lambda: Masked(-1e9, 3, 0), [(3, 0, 1)]),
    "mask -inf": (lambda: Masked(-torch.inf, 1, 2), [(1, 2, 1)]),
    "filled in": (FilledIn, [(2, 1, 1)]),
    "nothing beyond the ends": (MaskedEnds, [(1, 1, 1)]),
    "bias by distance": (lambda: Biased(False), [(2, 2, 1)]),
    "learned biases": (lambda: Biased(True), [(2, 2, 1)]),
    "softmax by hand": (Written, [(2, 2, 1)]),
    "band of weights": (Weighted, [(2, 2, 1)]),
    "band of weights by einsum": (WeightedByEinsum, [(2, 2, 1)]),
    "local variance": (Variance, []),  # operators that have a rule, all of them
    "largest of five": (Largest, []),
    "histogram": (Histogram, [(0, 0, 1)]),
    "histogram by a quotient": (lambda: Histogram(lambda pixels: pixels // 32), [(0, 0, 1)]),
    "chunks beside each other": (SlidingChunks, [(2, 2, 1)]),
    "chunks cut one by one": (CutChunks, []),  # operators that have a rule
    "blocks in the batch": (BlocksInTheBatch, [(1, 1, 1)]),  # of blocks
    "every other entry": (EveryOther, []),  # slices that are written have a rule
    "every fourth written over": (FourthOver, [(0, 0, 4)]),
    "blocks by a mask": (MaskedBlocks, [(0, 0, 4)]),
    "gradient": (Gradient, [(1, 1, 1)]),
    "rolled, written over": (Rolled, []),  # an operator that has a rule
    "flipped, and back": (Flipped, [(0, 2, 1)]),
    "rolled, masked": (RolledMasked, [(1, 0, 1)]),
    "windows that overlap": (Envelope, [(4, 4, 4)]),
    "back from a spectrum": (Spectrum, [(0, 0, 4)]),
}
"""Before, after and period of each region."""
RESIZED: dict[str, Callable[[], nn.Module]] = {
    "band behind a stride": lambda: nn.Sequential(nn.MaxPool1d(2), Band()),
    "band behind up-sampling": lambda: nn.Sequential(nn.Upsample(scale_factor=2), Band()),
}
"""Regions at another rate than the frames'."""
GLOBAL = (
    "compared with the mean",
    "saturated gate",
    "gate that rarely opens",
    "gate by the largest",
    "softmax",
    "rolled",
    "flipped",
    "sort",
    "less the mean",
    "by distance",
    "weak mask",
    "two rates",
    "learned positions",
)


def network(part: nn.Module) -> nn.Module:
    """A network with such a part, in eval mode."""
    torch.manual_seed(0)
    net = Around(part)
    net(torch.zeros(1, CHANNELS, LENGTH))
    return net.eval()
