"""Gates over time replaced for the two scopes that can stream (DESIGN section 1, Gates).

`pool_scope="frame"` and `"window"` change what is computed, so their oracle is the module with the pool
replaced. `scoped` makes that module; each network with gates keeps its pool in a `TimeMean`, `TimeMax` or norm
module, or is pytorchvideo's X3D.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Reference, Window


def newest_mean(frames: Tensor, window: int) -> Tensor:
    """Mean over the newest `window` entries at every entry of dim 2."""
    padded = F.pad(frames.movedim(2, -1), (window - 1, 0))
    return padded.unfold(-1, window, 1).mean(-1).movedim(-1, 2)


def newest_max(frames: Tensor, window: int) -> Tensor:
    """Maximum over the newest `window` entries at every entry of dim 2."""
    padded = F.pad(frames.movedim(2, -1), (window - 1, 0), value=-torch.inf)
    return padded.unfold(-1, window, 1).amax(-1).movedim(-1, 2)


class ScopedPool(nn.Module):
    """A pool over (T, H, W) in scope frame (window 1) or window, one result per entry."""

    def __init__(self, kind: str, window: int) -> None:
        super().__init__()
        self.kind, self.window = kind, window

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return newest_mean(x.mean((3, 4), keepdim=True), self.window)
        return newest_max(x.amax((3, 4), keepdim=True), self.window)


class ScopedNorm(nn.Module):
    """A group or instance norm whose statistics cover the newest `window` entries."""

    def __init__(self, groups: int, norm: Any, window: int) -> None:
        super().__init__()
        self.groups, self.norm, self.window = groups, norm, window

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        grouped = x.view(n, self.groups, c // self.groups, t, h, w).transpose(2, 3)  # time at dim 2
        mean = newest_mean(grouped.mean((3, 4, 5), keepdim=True), self.window)
        square = newest_mean(grouped.double().square().mean((3, 4, 5), keepdim=True), self.window)
        variance = (square - mean.double().square()).float()
        normed = (grouped - mean) / (variance + self.norm.eps).sqrt()
        normed = normed.transpose(2, 3).reshape(x.shape)
        if self.norm.weight is None:
            return normed
        return normed * self.norm.weight.view(1, c, 1, 1, 1) + self.norm.bias.view(1, c, 1, 1, 1)


class _ScopedSqueeze(nn.Module):
    """fvcore's squeeze-and-excitation with its mean over (T, H, W) replaced."""

    def __init__(self, block: nn.Module, window: int) -> None:
        super().__init__()
        self.block, self.pool = block, ScopedPool("mean", window)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.block(self.pool(x))


def _replacement(module: Any, window: int) -> nn.Module | None:
    if type(module).__name__ == "SqueezeExcitation":
        return _ScopedSqueeze(module.block, window)
    if isinstance(module, nn.AdaptiveAvgPool3d):
        return ScopedPool("mean", window)
    if isinstance(module, nn.AdaptiveMaxPool3d):
        return ScopedPool("max", window)
    if isinstance(module, nn.GroupNorm):
        return ScopedNorm(module.num_groups, module, window)
    if isinstance(module, nn.InstanceNorm3d):
        return ScopedNorm(module.num_features, module, window)
    return getattr(module, "scoped", lambda _: None)(window)


def scoped(module: nn.Module, window: int) -> nn.Module:
    """A copy of the module whose gates cover the newest `window` entries (1: scope frame).

    Replaces squeeze-and-excitation, adaptive pools, group and instance norms, and any module that has a method
    `scoped(window)`.
    """
    result = copy.deepcopy(module)
    for name, child in list(result.named_modules()):
        replaced = _replacement(child, window)
        if replaced is not None:
            parent = result.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], replaced)
    return result


def gated(window: int, *time_dims: int) -> Callable[[nn.Module], Reference]:
    """Reference of a model whose outputs keep their time axis, with its gates replaced."""
    dims = time_dims or (2,)
    return lambda module: Reference(scoped(module, window), tuple(range(len(dims))), dims)


def gated_split(
    window: int, trunk: Callable[[Any], nn.Module], head: Callable[[Any], Callable[[Tensor], Tensor]]
) -> Callable[[nn.Module], Reference]:
    """Reference of a model that is `head(trunk(x))`, with the trunk's gates replaced."""
    return lambda module: Reference(scoped(trunk(module), window), (Window(head(module)),))
