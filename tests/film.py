"""Videos in which brightness tells the frame's number, and models whose results tell which frames they are about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.media.video import Image, VideoFrame, write_video


def gray(level: float, height: int = 32, width: int = 48) -> Image:
    """A picture of one gray."""
    return np.full((height, width, 3), level, np.uint8)


def ramp(count: int = 40, first: int = 20, step: int = 5) -> list[Image]:
    """Pictures that get brighter by ``step`` at each frame."""
    return [gray(first + step * index) for index in range(count)]


def video(path: Path, count: int = 40, fps: float = 20.0) -> Path:
    """A file of ``ramp``."""
    return write_video(path, ramp(count), fps)


def frames(count: int = 40, fps: float = 20.0) -> Iterator[VideoFrame]:
    """The same frames without a file."""
    for index, image in enumerate(ramp(count)):
        yield VideoFrame(image, index / fps, index)


class Brightness(nn.Module):
    """Two classes, (N, 2): mean brightness b of the newest entry that a window of ``clip`` reads, and 1 - b.

    A symmetric temporal kernel that takes its middle tap alone delays by ``padding`` frames without changing values.
    """

    def __init__(self, taps: int = 5, stride: int = 1, dense: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 1, (taps, 1, 1), (stride, 1, 1), (taps // 2, 0, 0), bias=False)
        self.dense = dense
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, :, taps // 2] = 1 / 3

    def forward(self, clip: Tensor) -> Tensor:
        level = self.conv(clip).mean((3, 4))
        level = level if self.dense else level[:, :, -1]
        return torch.cat([level, 1 - level], 1)


def compiled(model: nn.Module | None = None, shape: tuple[int, ...] = (1, 3, 8, 16, 16), **options: object) -> bytes:
    """A compiled model as bytes."""
    network = (model or Brightness()).eval()
    return co3d.compile(network, (torch.rand(shape),), **options).to_bytes()  # type: ignore[arg-type]


def level_of(index: int) -> float:
    """The brightness of frame ``index`` of a ramp, from 0 to 1."""
    return (20 + 5 * index) / 255
