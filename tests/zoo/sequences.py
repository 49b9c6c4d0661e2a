"""Temporal networks without a video stem: action segmentation, skeletons, audio, U-Nets over time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Reference, Window, long_clip, randomise, seeded, split


class DilatedResidual(nn.Module):
    def __init__(self, dilation: int, channels: int) -> None:
        super().__init__()
        self.conv_dilated = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.conv_1x1 = nn.Conv1d(channels, channels, 1)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv_1x1(F.relu(self.conv_dilated(x))))


class Stage(nn.Module):
    def __init__(self, layers: int, channels: int, dim: int, classes: int) -> None:
        super().__init__()
        self.conv_1x1 = nn.Conv1d(dim, channels, 1)
        self.layers = nn.ModuleList(DilatedResidual(2**i, channels) for i in range(layers))
        self.conv_out = nn.Conv1d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_1x1(x)
        for layer in self.layers:
            out = layer(out)
        return self.conv_out(out)


class MSTCN(nn.Module):
    """Farha and Gall 2019: refinement stages on softmax scores; all stages are returned, (S, N, C, T)."""

    def __init__(self, stages: int = 3, layers: int = 3) -> None:
        super().__init__()
        self.stage1 = Stage(layers, 8, 6, 4)
        self.stages = nn.ModuleList(Stage(layers, 8, 4, 4) for _ in range(stages - 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.stage1(x)
        outputs = out.unsqueeze(0)
        for stage in self.stages:
            out = stage(F.softmax(out, dim=1))
            outputs = torch.cat((outputs, out.unsqueeze(0)), dim=0)
        return outputs


def _mild_scores() -> MSTCN:
    """A saturated softmax between the stages would hide errors from the stage behind."""
    model = randomise(MSTCN(stages=2))
    assert isinstance(model, MSTCN)
    model.stage1.conv_out.weight.data *= 0.5
    return model


class GraphBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, partitions: int = 3) -> None:
        super().__init__()
        self.partitions = partitions
        self.gcn = nn.Conv2d(channels, out * partitions, 1)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, (5, 1), (stride, 1), (2, 0)), nn.BatchNorm2d(out)
        )
        self.residual = nn.Sequential(nn.Conv2d(channels, out, 1, (stride, 1)), nn.BatchNorm2d(out))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        res = self.residual(x)
        x = self.gcn(x)
        n, kc, t, v = x.size()
        x = x.view(n, self.partitions, kc // self.partitions, t, v)
        x = torch.einsum("nkctv,kvw->nctw", x, adjacency)
        return F.relu(self.tcn(x.contiguous()) + res)


class STGCN(nn.Module):
    """Yan et al. 2018: graph convolutions over joints V and temporal convolutions; input (N, C, T, V)."""

    def __init__(self, joints: int = 5) -> None:
        super().__init__()
        self.data_bn = nn.BatchNorm1d(3 * joints)
        self.adjacency: Tensor
        self.register_buffer("adjacency", torch.rand(3, joints, joints, generator=torch.Generator().manual_seed(3)))
        self.importance = nn.ParameterList(nn.Parameter(torch.ones(3, joints, joints)) for _ in range(3))
        self.blocks = nn.ModuleList([GraphBlock(3, 8, 1), GraphBlock(8, 8, 2), GraphBlock(8, 8, 1)])
        self.fcn = nn.Conv2d(8, 5, 1)

    def features(self, x: Tensor) -> Tensor:
        n, c, t, v = x.size()
        x = x.permute(0, 3, 1, 2).contiguous().view(n, v * c, t)
        x = self.data_bn(x).view(n, v, c, t).permute(0, 2, 3, 1).contiguous()
        for block, importance in zip(self.blocks, self.importance, strict=True):
            x = block(x, self.adjacency * importance)
        return x

    def classify(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, x.size()[2:])
        return self.fcn(x).view(x.size(0), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class WaveNet(nn.Module):
    """van den Oord et al. 2016: gated causal convolutions, dilation doubling, skips summed; (N, C, T)."""

    def __init__(self, layers: int, channels: int = 4) -> None:
        super().__init__()
        self.causal = nn.Conv1d(2, channels, 2)
        self.dilations = [2**i for i in range(layers)]
        self.filters = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=d) for d in self.dilations)
        self.gates = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=d) for d in self.dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in self.dilations)
        self.skips = nn.ModuleList(nn.Conv1d(channels, 6, 1) for _ in self.dilations)
        self.out = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.causal(F.pad(x, (1, 0)))
        total: Tensor | float = 0.0
        for dilation, f, g, residual, skip in zip(
            self.dilations, self.filters, self.gates, self.residuals, self.skips, strict=True
        ):
            padded = F.pad(x, (dilation, 0))
            y = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total = total + skip(y)
            x = x + residual(y)
        assert isinstance(total, Tensor)
        return self.out(F.relu(total))


class WaveNetValid(nn.Module):
    """WaveNet without padding: residuals and skips cropped to the newest entries, as the first ports do it."""

    def __init__(self, layers: int = 3, channels: int = 4) -> None:
        super().__init__()
        self.start = nn.Conv1d(2, channels, 1)
        self.convs = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(channels, 6, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skip = None
        for conv, residual, to_skip in zip(self.convs, self.residuals, self.skips, strict=True):
            y = F.glu(conv(x), dim=1)
            s = to_skip(y)
            skip = s if skip is None else s + skip[:, :, -s.size(2) :]
            x = residual(y) + x[:, :, -y.size(2) :]
        assert skip is not None
        return skip


class CausalTCN(nn.Module):
    """Bai et al. 2018: pad both sides and chomp the end."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(n, 6, 3, padding=2 * d, dilation=d) for n, d in ((4, 1), (6, 2), (6, 4)))
        self.shortcut = nn.Conv1d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.shortcut(x)
        for conv, chomp in zip(self.convs, (2, 4, 8), strict=True):
            x = F.relu(conv(x)[:, :, :-chomp].contiguous())
        return F.relu(x + residual)


class TemporalUNet(nn.Module):
    """Two levels down by convolution stride and max pool, up again in one of three ways, with skips."""

    def __init__(self, up: str) -> None:
        super().__init__()
        self.up = up
        self.down0 = nn.Conv1d(4, 6, 3, padding=1)
        self.down1 = nn.Conv1d(6, 8, 4, stride=2, padding=1)
        self.down2 = nn.Conv1d(8, 8, 3, padding=1)
        self.up1 = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.up0 = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.merge1 = nn.Conv1d(16, 8, 3, padding=1)
        self.merge0 = nn.Conv1d((6 if up == "transpose" else 8) + 6, 5, 3, padding=1)

    def _up(self, conv: nn.Module, x: Tensor) -> Tensor:
        if self.up == "transpose":
            return F.relu(conv(x))
        if self.up == "nearest":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.interpolate(x, scale_factor=2, mode="linear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down0(x))
        b = F.relu(self.down1(a))
        c = F.relu(self.down2(F.max_pool1d(b, 2)))
        b = F.relu(self.merge1(torch.cat([b, self._up(self.up1, c)], 1)))
        return self.merge0(torch.cat([a, self._up(self.up0, b)], 1))


class TwoHeads(nn.Module):
    """One trunk, a score per frame and a score per clip."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv3d(3, 6, 3, (1, 2, 2), 1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1), nn.ReLU()
        )
        self.frame = nn.Conv1d(6, 2, 5, padding=2)
        self.clip = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x).mean((3, 4))
        return self.frame(features), self.clip(features.mean(2))


def _two_heads_reference(model: Any) -> Reference:
    def trunk(x: Tensor) -> tuple[Tensor, Tensor]:
        features = model.trunk(x).mean((3, 4))
        return model.frame(features), features

    return Reference(trunk, (0, Window(lambda f: model.clip(f.mean(2)), (1,))), (2, 2))


class RunningMean(nn.Module):
    """Each frequency divided by the mean of all its frames so far: frequencies are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        n, _, f, t = x.shape
        y = self.conv(F.pad(x, (2, 0))).permute(0, 2, 1, 3).reshape(n * f, 2, t)
        total = torch.cumsum(y.abs().sum(1), -1)
        count = torch.arange(2, 2 * t + 1, 2, dtype=x.dtype).reshape(1, t).expand_as(total)
        return (y / (1 + total / count).reshape(n * f, 1, t)).reshape(n, f, 2, t)


class Siamese(nn.Module):
    """Two inputs through the same weights, compared frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.net(a).mean((3, 4)) - self.net(b).mean((3, 4))).abs()


class AudioVisual(nn.Module):
    """A clip of T frames and 4 T audio vectors, fused at the rate of the frames, pooled into one score."""

    def __init__(self) -> None:
        super().__init__()
        self.video = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())
        self.audio = nn.Sequential(nn.Conv1d(5, 6, 5, stride=4, padding=2), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1))
        self.fuse = nn.Conv1d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def fused(self, video: Tensor, audio: Tensor) -> Tensor:
        return F.relu(self.fuse(torch.cat([self.video(video).mean((3, 4)), self.audio(audio)], 1)))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        return self.fc(self.fused(video, audio).mean(-1))


def _entry(name: str, factory: Any, *shapes: tuple[int, ...], **fields: Any) -> Entry:
    return Entry(name, seeded(factory, *shapes), shapes, **fields)


_VIDEO = (1, 3, 8, 6, 6)

SEQUENCES = (
    Entry("ms_tcn", _mild_scores, ((1, 6, 40),), reference=long_clip(3)),
    _entry("st_gcn", STGCN, (1, 3, 16, 5), expect="window",
           reference=split(lambda m: m.features, lambda m: m.classify)),
    _entry("wavenet", lambda: WaveNet(10), (1, 2, 64), causal=True),
    _entry("wavenet_small", lambda: WaveNet(4), (1, 2, 32), causal=True, tight=True),
    _entry("wavenet_valid", WaveNetValid, (1, 2, 24), tight=True),
    _entry("causal_tcn", CausalTCN, (1, 4, 32), causal=True),
    _entry("unet_transpose", lambda: TemporalUNet("transpose"), (1, 4, 32)),
    _entry("unet_nearest", lambda: TemporalUNet("nearest"), (1, 4, 32)),
    _entry("unet_linear", lambda: TemporalUNet("linear"), (1, 4, 32)),
    _entry("two_heads", TwoHeads, _VIDEO, expect="window", reference=_two_heads_reference),
    _entry("running_mean_per_frequency", RunningMean, (1, 1, 5, 8), time_dim=3, causal=True, nan_start=False,
           reference=lambda m: Reference(m, time_dims=(3,))),
    _entry("siamese", Siamese, _VIDEO, _VIDEO, tight=True),
    _entry("audio_visual", AudioVisual, _VIDEO, (1, 5, 32), expect="window",
           reference=split(lambda m: m.fused, lambda m: lambda x: m.fc(x.mean(-1)))),
)  # fmt: skip
