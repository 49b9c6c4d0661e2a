"""Convolutional video networks written from scratch, in the style of their own repositories."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Reference, Window, by_clip, long_clip, seeded, split


class C3D(nn.Module):
    """Tran et al. 2015: 3x3x3 convolutions, temporal pools, time flattened into the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 6, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(6, 8, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3 = nn.Conv3d(8, 8, 3, padding=1)
        self.pool3 = nn.MaxPool3d(2)
        self.fc6 = nn.Linear(8 * 2 * 2 * 2, 16)
        self.fc7 = nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        return self.pool3(F.relu(self.conv3(x)))

    def classify(self, x: Tensor) -> Tensor:
        return self.fc7(F.relu(self.fc6(x.view(-1, 8 * 2 * 2 * 2))))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class P3DBlock(nn.Module):
    """Qiu et al. 2017: spatial and temporal convolutions in series (A), parallel (B) or both (C)."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.reduce = nn.Conv3d(channels, channels // 2, 1, bias=False)
        self.spatial = nn.Conv3d(channels // 2, channels // 2, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.temporal = nn.Conv3d(channels // 2, channels // 2, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.expand = nn.Conv3d(channels // 2, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm3d(n) for n in (channels // 2, channels // 2, channels // 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.reduce(x)))
        spatial = F.relu(self.norms[1](self.spatial(y)))
        temporal = F.relu(self.norms[2](self.temporal(y if self.kind == "B" else spatial)))
        y = temporal if self.kind == "A" else temporal + spatial
        return F.relu(x + self.norms[3](self.expand(y)))


class P3D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(P3DBlock(8, kind) for kind in "ABC"))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class TemporalShift(nn.Module):
    """Lin et al. 2019: an eighth of the channels one frame forth, an eighth one frame back."""

    def __init__(self, net: nn.Module, n_segment: int, n_div: int = 4) -> None:
        super().__init__()
        self.net, self.n_segment, self.n_div = net, n_segment, n_div

    def forward(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        x = x.view(nt // self.n_segment, self.n_segment, c, h, w)
        fold = c // self.n_div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return self.net(out.view(nt, c, h, w))


class ShiftBlock(nn.Module):
    def __init__(self, channels: int, n_segment: int) -> None:
        super().__init__()
        self.conv1 = TemporalShift(nn.Conv2d(channels, channels, 3, padding=1, bias=False), n_segment)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class TSMResNet(nn.Module):
    """Input (N, T, C, H, W); time folded into the batch, shifted inside the blocks, logits averaged."""

    def __init__(self, n_segment: int = 8) -> None:
        super().__init__()
        self.n_segment = n_segment
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.Sequential(*(ShiftBlock(8, n_segment) for _ in range(3)))
        self.fc = nn.Linear(8, 5)

    def frame_logits(self, x: Tensor) -> Tensor:
        x = x.view((-1, *x.size()[2:]))
        x = self.layers(self.stem(x)).mean((2, 3))
        logits = self.fc(x)
        return logits.view((-1, self.n_segment, *logits.size()[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.frame_logits(x).mean(1)


def _tsm_reference(model: Any) -> Reference:
    """The segment count is part of the module: the long clip needs its own."""

    def trunk(x: Tensor) -> Tensor:
        for module in model.modules():
            if hasattr(module, "n_segment"):
                module.n_segment = x.shape[1]
        return model.frame_logits(x)

    return Reference(trunk, (Window(lambda logits: logits.mean(1)),), (1,))


class TSN(nn.Module):
    """Wang et al. 2016: a 2D network per frame, consensus by the mean of the scores. Input (N, T, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        features = self.backbone(x.flatten(0, 1)).mean((2, 3))
        return self.fc(features).view(n, t, -1).mean(dim=1)


class DenseLayer3D(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm3d(channels), nn.Conv3d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm3d(2 * growth), nn.Conv3d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(new)))], 1)


class DenseNet3D(nn.Module):
    """Dense blocks with a transition that halves time, as in 3D-ResNets-PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(3, 6, (3, 3, 3), (1, 2, 2), 1, bias=False),
            *(DenseLayer3D(6 + 3 * k, 3) for k in range(3)),
            nn.Sequential(nn.BatchNorm3d(15), nn.ReLU(), nn.Conv3d(15, 8, 1, bias=False), nn.AvgPool3d(2, 2)),
            *(DenseLayer3D(8 + 3 * k, 3) for k in range(2)),
            nn.BatchNorm3d(14),
        )
        self.classifier = nn.Linear(14, 5)

    def classify(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool3d(F.relu(x), (1, 1, 1)).view(x.size(0), -1)
        return self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class ResNeXt3D(nn.Module):
    """Grouped bottlenecks with a strided projection shortcut (time and space)."""

    class Block(nn.Module):
        def __init__(self, channels: int, out: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv3d(channels, 8, 1, bias=False), nn.BatchNorm3d(8)
            self.conv2 = nn.Conv3d(8, 8, 3, stride, 1, groups=4, bias=False)
            self.bn2 = nn.BatchNorm3d(8)
            self.conv3, self.bn3 = nn.Conv3d(8, out, 1, bias=False), nn.BatchNorm3d(out)
            self.downsample = None
            if stride != 1 or channels != out:
                self.downsample = nn.Sequential(nn.Conv3d(channels, out, 1, stride, bias=False), nn.BatchNorm3d(out))

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
            residual = x if self.downsample is None else self.downsample(x)
            out += residual
            return F.relu(out, inplace=True)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False)
        self.bn1 = nn.BatchNorm3d(8)
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        self.layers = nn.Sequential(self.Block(8, 12, 1), self.Block(12, 12, 2), self.Block(12, 12, 1))
        self.fc = nn.Linear(12, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(self.maxpool(F.relu(self.bn1(self.conv1(x)))))

    def classify(self, x: Tensor) -> Tensor:
        return self.fc(x.mean([2, 3, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


class Inception3D(nn.Module):
    """Branches with temporal kernels 1, 3 and 5 and a pool, concatenated; keeps its time axis."""

    class Mixed(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.branch0 = nn.Conv3d(channels, 4, 1)
            self.branch1 = nn.Sequential(nn.Conv3d(channels, 4, 1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1))
            self.branch2 = nn.Sequential(nn.Conv3d(channels, 2, 1), nn.ReLU(), nn.Conv3d(2, 4, 5, padding=2))
            self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), nn.Conv3d(channels, 4, 1))
            self.norm = nn.BatchNorm3d(16)

        def forward(self, x: Tensor) -> Tensor:
            branches = [self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)]
            return F.relu(self.norm(torch.cat(branches, 1)))

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Sequential(self.Mixed(3), self.Mixed(16))
        self.logits = nn.Conv3d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.mixed(x)).mean((3, 4))


class FramesFirst(nn.Module):
    """Input and output (N, T, C, H, W), as video loaders give it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm3d(6)
        self.conv2 = nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 1, 3, 4)
        x = self.conv2(F.relu(self.norm(self.conv1(x))))
        return x.permute(0, 2, 1, 3, 4)


class FoldedR2Plus1D(nn.Module):
    """Spatial 2D convolutions on (N T, C, H, W), temporal 1D convolutions on (N H W, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.temporal = nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        y = x.transpose(1, 2).reshape(n * t, c, h, w)
        y = F.relu(self.norm(self.spatial(y)))
        y = y.reshape(n, t, 6, h, w).permute(0, 3, 4, 2, 1).reshape(n * h * w, 6, t)
        y = F.relu(self.temporal(y))
        return y.reshape(n, h, w, 4, t).permute(0, 3, 4, 1, 2)


class StackedFrames(nn.Module):
    """Time folded into the channels of a grouped 2D convolution, one group per frame, and unfolded again."""

    def __init__(self, frames: int = 8) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        y = self.conv(x.movedim(2, 1).reshape(n * t, c, h, w)).view(n, t * 4, h, w)
        return self.mix(F.relu(y).view(n, t, 4, h, w).transpose(1, 2))


class OddBottleneck(nn.Module):
    """An inverted bottleneck with a gate, whose channels are no multiple of what the runtime's kernels take."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.mix = nn.Conv3d(3, channels, 1), nn.Conv3d(channels, channels, 1)
        self.depthwise = nn.Conv3d(channels, channels, 3, padding=1, groups=channels)
        self.squeeze, self.excite = nn.Conv3d(channels, 4, 1), nn.Conv3d(4, channels, 1)
        self.project = nn.Conv3d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.expand(x))
        x = F.silu(self.depthwise(x + self.mix(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((3, 4), keepdim=True))))
        return self.project(x * gate.sigmoid())


_CLIP = (1, 3, 8, 8, 8)


def _classifier(features: str, classify: str) -> Any:
    return split(lambda model: getattr(model, features), lambda model: getattr(model, classify))


def _p3d_parts(model: Any) -> Any:
    return nn.Sequential(model.stem, model.blocks)


CONVNETS = (
    Entry("c3d", seeded(C3D, (1, 3, 8, 16, 16)), ((1, 3, 8, 16, 16),), "recompute",
          reference=_classifier("features", "classify")),
    Entry("p3d", seeded(P3D, _CLIP), (_CLIP,), "window",
          reference=split(_p3d_parts, lambda m: lambda x: m.fc(x.mean((2, 3, 4))))),
    Entry("tsm_resnet", seeded(TSMResNet, (1, 8, 3, 8, 8)), ((1, 8, 3, 8, 8),), "window", time_dim=1,
          reference=_tsm_reference),
    Entry("tsn", seeded(TSN, (1, 8, 3, 8, 8)), ((1, 8, 3, 8, 8),), "window", time_dim=1,
          reference=by_clip(time_dims=(1,))),
    Entry("densenet3d", seeded(DenseNet3D, _CLIP), (_CLIP,), "window",
          reference=_classifier("features", "classify")),
    Entry("resnext3d", seeded(ResNeXt3D, (1, 3, 16, 16, 16)), ((1, 3, 16, 16, 16),), "window",
          reference=_classifier("features", "classify")),
    Entry("inception3d", seeded(Inception3D, _CLIP), (_CLIP,), tight=True),
    Entry("frames_first", seeded(FramesFirst, (1, 8, 3, 6, 6)), ((1, 8, 3, 6, 6),), time_dim=1,
          reference=long_clip(1), tight=True),
    Entry("folded_r2plus1d", seeded(FoldedR2Plus1D, _CLIP), (_CLIP,), tight=True),
    *(Entry(f"{channels}_channels", seeded(partial(OddBottleneck, channels), _CLIP), (_CLIP,), tight=True)
      for channels in (18, 131)),
    Entry("stacked_frames", seeded(StackedFrames, _CLIP), (_CLIP,), tight=True),
)  # fmt: skip
