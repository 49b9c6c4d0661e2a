"""Networks whose pools or norms over time meet the stream again: every one in the scopes frame and window."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Entry, Reference, Window, long_clip, seeded
from .gates import ScopedPool, gated, gated_split, newest_mean


class Mean(nn.Module):
    """A mean over (T, H, W) as a method call, the way most repositories write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3, 4], keepdim=True)

    def scoped(self, window: int) -> nn.Module:
        return ScopedPool("mean", window)


class Amax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.amax(x, dim=(2, 3, 4), keepdim=True)

    def scoped(self, window: int) -> nn.Module:
        return ScopedPool("max", window)


_POOLS: dict[str, Callable[[], nn.Module]] = {
    "mean": Mean,
    "amax": Amax,
    "adaptive_avg": lambda: nn.AdaptiveAvgPool3d(1),
    "adaptive_max": lambda: nn.AdaptiveMaxPool3d(1),
}


class Gate(nn.Module):
    def __init__(self, channels: int, pool: str) -> None:
        super().__init__()
        self.pool = _POOLS[pool]()
        self.fc1, self.fc2 = nn.Conv3d(channels, 4, 1), nn.Conv3d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


class GatedNet(nn.Module):
    """Two temporal convolutions with a gate behind each."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.conv1, self.gate1 = nn.Conv3d(3, 6, 3, padding=1), Gate(6, pool)
        self.norm = nn.BatchNorm3d(6)
        self.conv2, self.gate2 = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0)), Gate(6, pool)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.gate1(self.conv1(x))))
        return x + self.gate2(self.conv2(x))


class NormNet(nn.Module):
    """Two temporal convolutions with a norm over (T, H, W) behind each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make: Any = {
            "group": lambda: nn.GroupNorm(2, 6),
            "instance": lambda: nn.InstanceNorm3d(6),
            "instance_affine": lambda: nn.InstanceNorm3d(6, affine=True),
        }[kind]
        self.conv1, self.norm1 = nn.Conv3d(3, 6, 3, padding=1), make()
        self.conv2, self.norm2 = nn.Conv3d(6, 6, 3, padding=1), make()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return x + self.norm2(self.conv2(x))


class ChannelsLastNorm(nn.Module):
    """Layer norm over the channels alone: no gate, it streams as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv3d(3, 6, 3, padding=1), nn.LayerNorm(6)
        self.conv2 = nn.Conv3d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return self.conv2(F.gelu(x))


class CausalConv3d(nn.Conv3d):
    """MoViNet's: all temporal padding in front."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


class MoViBlock(nn.Module):
    def __init__(self, channels: int, expanded: int, kernel: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv3d(channels, expanded, 1, bias=False), nn.BatchNorm3d(expanded))
        self.deep = CausalConv3d(expanded, expanded, (kernel, 3, 3), padding=(0, 1, 1), groups=expanded, bias=False)
        self.norm = nn.BatchNorm3d(expanded)
        self.se = Gate(expanded, "adaptive_avg")
        self.project = nn.Sequential(nn.Conv3d(expanded, channels, 1, bias=False), nn.BatchNorm3d(channels))
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.deep(F.hardswish(self.expand(x)))))
        return x + self.alpha * self.project(self.se(y))


class MoViNet(nn.Module):
    """Kondratyuk et al. 2021: causal depthwise blocks with squeeze-and-excitation; a score per clip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False), nn.BatchNorm3d(8))
        self.blocks = nn.Sequential(MoViBlock(8, 12, 3), MoViBlock(8, 16, 5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.hardswish(self.stem(x))).mean((2, 3, 4)))


class _MoViTrunk(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stem, self.blocks = model.stem, model.blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.hardswish(self.stem(x)))


class AdaptiveGraph(nn.Module):
    """CTR-GCN's: a mean over time makes a graph of the joints for each channel; every frame is multiplied by it."""

    def __init__(self, how: str, window: int = 0) -> None:
        super().__init__()
        self.how, self.window = how, window
        self.q, self.v = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def scoped(self, window: int) -> nn.Module:
        result = copy.deepcopy(self)
        result.window = window
        return result

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.q(x), self.v(x)
        q = newest_mean(q, self.window) if self.window else q.mean(2)
        graph = torch.tanh(q.unsqueeze(-1) - q.unsqueeze(-2))
        if self.window:
            return torch.einsum("nctuv,nctv->nctu", graph, v)
        if self.how == "einsum":
            return torch.einsum("ncuv,nctv->nctu", graph, v)
        return torch.matmul(v, graph.transpose(2, 3))


class SkeletonNet(nn.Module):
    """Temporal convolutions over joints around a graph."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv1, self.graph = nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), AdaptiveGraph(how)
        self.conv2 = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.graph(self.conv1(x))))


class CumulativeAverage(nn.Module):
    """Mean over all entries so far, as MoViNet's stream buffer and causal global pools compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 1)
        self.fc = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        count = torch.arange(1, x.shape[2] + 1, dtype=x.dtype)
        return self.fc(torch.cumsum(x, dim=2) / count)


_VIDEO = (1, 3, 6, 6, 6)


def _in_scopes(name: str, factory: Any, shape: tuple[int, ...] = _VIDEO) -> list[Entry]:
    """One network in the scopes frame and window."""
    build = seeded(factory, shape)
    entries = []
    for scope, window in (("frame", 1), ("window", shape[2])):
        options = {"pool_scope": scope}
        entries.append(Entry(f"{name}-{scope}", build, (shape,), options=options, reference=gated(window)))
    return entries


def _recompute(name: str, factory: Any) -> Entry:
    def make(model: Any) -> Reference:
        def rest(x: Tensor) -> Tensor:
            if isinstance(model, GatedNet):
                x = F.relu(model.norm(model.gate1(x)))
                return x + model.gate2(model.conv2(x))
            x = F.relu(model.norm1(x))
            return x + model.norm2(model.conv2(x))

        return Reference(model.conv1, (Window(rest),))

    options = {"pool_scope": "recompute"}
    return Entry(f"{name}-recompute", seeded(factory, _VIDEO), (_VIDEO,), "recompute", options, reference=make)


def _movinet(scope: str, window: int) -> Entry:
    reference = gated_split(window, _MoViTrunk, lambda m: lambda x: m.fc(x.mean((2, 3, 4))))
    shape = (1, 3, 8, 8, 8)
    return Entry(
        f"movinet-{scope}", seeded(MoViNet, shape), (shape,), "window", {"pool_scope": scope}, reference=reference
    )


GATED = (
    *(entry for pool in _POOLS for entry in _in_scopes(f"se_{pool}", lambda pool=pool: GatedNet(pool))),
    *(
        entry
        for kind in ("group", "instance", "instance_affine")
        for entry in _in_scopes(f"{kind}_norm", lambda kind=kind: NormNet(kind))
    ),
    *(
        entry
        for how in ("matmul", "einsum")
        for entry in _in_scopes(f"graph_{how}", lambda how=how: SkeletonNet(how), (1, 3, 6, 5))
    ),
    _recompute("se_mean", lambda: GatedNet("mean")),
    _recompute("group_norm", lambda: NormNet("group")),
    Entry("layer_norm", seeded(ChannelsLastNorm, _VIDEO), (_VIDEO,), tight=True),
    _movinet("frame", 1),
    _movinet("window", 8),
    Entry("cumulative_average", seeded(CumulativeAverage, (1, 4, 8)), ((1, 4, 8),), reference=long_clip(2),
          causal=True, nan_start=False),
)  # fmt: skip
