"""Real video networks by name, with random weights and the clip shape they are published with.

Usable as factories on the command line, from this folder: ``co3d-compile networks:x3d_s --shape 1x3x13x160x160 ...``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

# A torchvision built for another PyTorch (a CUDA one, say) cannot load its compiled operators and fails on import.
# No video model uses them; without these registrations the import succeeds.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

from pytorchvideo.models.resnet import create_resnet  # noqa: E402
from pytorchvideo.models.x3d import create_x3d  # noqa: E402
from torchvision.models import video as torchvision_video  # noqa: E402


@dataclass(frozen=True)
class Network:
    """A factory and the clip its network is published for: (batch, channels, frames, height, width)."""

    build: Callable[[], nn.Module]
    clip_shape: tuple[int, int, int, int, int]


def x3d_xs() -> nn.Module:
    """X3D-XS, 4 frames of 160 x 160."""
    return create_x3d(input_clip_length=4, input_crop_size=160)


def x3d_s() -> nn.Module:
    """X3D-S, 13 frames of 160 x 160."""
    return create_x3d(input_clip_length=13, input_crop_size=160)


def x3d_m() -> nn.Module:
    """X3D-M, 16 frames of 224 x 224."""
    return create_x3d(input_clip_length=16, input_crop_size=224)


def x3d_l() -> nn.Module:
    """X3D-L, 16 frames of 312 x 312."""
    return create_x3d(input_clip_length=16, input_crop_size=312, depth_factor=5.0)


def slow_r50() -> nn.Module:
    """The slow pathway of SlowFast as a network of its own, ResNet-50, 8 frames of 256 x 256."""
    return create_resnet(stem_conv_kernel_size=(1, 7, 7), head_pool_kernel_size=(8, 7, 7))


def i3d_r50() -> nn.Module:
    """I3D on ResNet-50, 8 frames of 224 x 224, without the temporal pool after the first stage."""
    return create_resnet(
        stem_conv_kernel_size=(5, 7, 7),
        stage_conv_a_kernel_size=(
            (3, 1, 1),
            [(3, 1, 1), (1, 1, 1)],
            [(3, 1, 1), (1, 1, 1)],
            [(1, 1, 1), (3, 1, 1)],
        ),
        head_pool_kernel_size=(8, 7, 7),
    )


def r3d_18() -> nn.Module:
    """3D ResNet-18, 16 frames of 112 x 112, temporal strides of 8 in all."""
    return torchvision_video.r3d_18()


def r2plus1d_18() -> nn.Module:
    """(2+1)D ResNet-18, 16 frames of 112 x 112, temporal strides of 8 in all."""
    return torchvision_video.r2plus1d_18()


NETWORKS = {
    "x3d_xs": Network(x3d_xs, (1, 3, 4, 160, 160)),
    "x3d_s": Network(x3d_s, (1, 3, 13, 160, 160)),
    "x3d_m": Network(x3d_m, (1, 3, 16, 224, 224)),
    "x3d_l": Network(x3d_l, (1, 3, 16, 312, 312)),
    "slow_r50": Network(slow_r50, (1, 3, 8, 256, 256)),
    "i3d_r50": Network(i3d_r50, (1, 3, 8, 224, 224)),
    "r3d_18": Network(r3d_18, (1, 3, 16, 112, 112)),
    "r2plus1d_18": Network(r2plus1d_18, (1, 3, 16, 112, 112)),
}
