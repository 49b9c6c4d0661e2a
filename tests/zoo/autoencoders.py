"""Causal video autoencoders: 1 + 4k frames to k + 1 latents and back, the first frame by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, randomise
from .gates import gated

_FRAMES = (1, 3, 13, 8, 8)
_LATENTS = (1, 4, 5, 2, 2)


class CausalConv(nn.Conv3d):
    """A convolution whose operand begins with copies of its first entry."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([*[x[:, :, :1]] * 2, x], 2))


class Block(nn.Module):
    """Two causal convolutions and a way past them."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, i), CausalConv(i, o)
        self.norm2, self.conv2 = nn.GroupNorm(2, o), CausalConv(o, o)
        self.past = nn.Conv3d(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.past(x) + self.conv2(F.silu(self.norm2(y)))


class Down(nn.Module):
    """Half as many frames, but for the first one, and half the pixels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        line = x.permute(0, 3, 4, 1, 2).reshape(n * h * w, c, t)
        line = torch.cat([line[..., 0][..., None], F.avg_pool1d(line[..., 1:], 2, 2)], -1)
        x = F.pad(line.reshape(n, h, w, c, -1).permute(0, 4, 3, 1, 2), (0, 1, 0, 1))
        return self.conv(x.flatten(0, 1)).unflatten(0, (n, -1)).transpose(1, 2)


class Up(nn.Module):
    """Twice as many frames, but for the first one, and twice the pixels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split((1, x.shape[2] - 1), 2)
        first = F.interpolate(first[:, :, 0], scale_factor=2.0)[:, :, None]
        x = torch.cat([first, F.interpolate(rest, scale_factor=2.0)], 2)
        return self.conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Guided(nn.Module):
    """A norm whose scale comes from the latents, resampled to what it normalises: the first one by itself."""

    def __init__(self, c: int, latent: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.GroupNorm(2, c), nn.Conv3d(latent, c, 1)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        first = F.interpolate(latent[:, :, :1], size=(1, *x.shape[3:]))
        rest = F.interpolate(latent[:, :, 1:], size=(x.shape[2] - 1, *x.shape[3:]))
        return self.norm(x) * self.scale(torch.cat([first, rest], 2))


class Encoder(nn.Module):
    """Frames to latents."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = CausalConv(3, 4), CausalConv(8, 4)
        self.a, self.b, self.c = Block(4, 4), Block(4, 8), Block(8, 8)
        self.down1, self.down2 = Down(4), Down(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(self.a(self.start(x)))
        return self.end(F.silu(self.c(self.down2(self.b(x)))))


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = CausalConv(4, 8), CausalConv(4, 3)
        self.a, self.b, self.c = Block(8, 8), Block(8, 4), Block(4, 4)
        self.up1, self.up2 = Up(8), Up(4)
        self.guided1, self.guided2 = Guided(8, 4), Guided(4, 4)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.guided1(self.up1(self.a(self.start(latent))), latent)
        x = self.guided2(self.up2(self.b(x)), latent)
        return self.end(F.silu(self.c(x)))


AUTOENCODERS = (
    Entry("causal_autoencoder_encoder", lambda: randomise(Encoder(), torch.randn(_FRAMES)), (_FRAMES,),
          reference=gated(1)),
    Entry("causal_autoencoder_decoder", lambda: randomise(Decoder(), torch.randn(_LATENTS)), (_LATENTS,),
          reference=gated(1)),
)  # fmt: skip
