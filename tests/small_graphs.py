"""Small graphs on one dim of features, and rows of tables of them: what a network is called, and its delay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Entry, Graph, randomise

CLIP = (1, 4, 24)


def conv(
    kernel: int = 3, dilation: int = 1, stride: int = 1, padding: int | str = 0, c: int = 4, **more: Any
) -> nn.Conv1d:
    return nn.Conv1d(c, more.pop("out", 4), kernel, stride, padding, dilation, **more)


def up(kernel: int, stride: int, padding: int = 0, output_padding: int = 0, dilation: int = 1) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(4, 4, kernel, stride, padding, output_padding, dilation=dilation)


def entry(name: str, factory: Callable[[], nn.Module], *shapes: tuple[int, ...], **fields: Any) -> Entry:
    clips = shapes or (CLIP,)
    generator = torch.Generator().manual_seed(5)
    examples = [torch.randn(shape, generator=generator) for shape in clips]
    return Entry(name, lambda: randomise(factory(), *examples), clips, **{"tight": True, **fields})


def row(name: str, factory: Callable[[], nn.Module], delay: int | None, *shapes: Any, **fields: Any) -> Any:
    return pytest.param(entry(name, factory, *shapes, **fields), delay, id=name.replace(" ", "-"))


def of(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def fn(forward: Callable[..., Any], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Graph(forward, **{name: make() for name, make in layers.items()})


def backwards(x: Tensor) -> Tensor:
    """A loop that runs from the last frame to the first one, (N, C, T) to (N, T, C)."""
    total, results = x[:, :, -1], []
    for t in reversed(range(x.shape[2])):
        total = 0.5 * total + x[:, :, t].tanh()
        results.insert(0, total)
    return torch.stack(results, 1)
