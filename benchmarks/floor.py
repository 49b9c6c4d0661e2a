"""The floor: what a frame costs if time costs nothing.

The same network with each temporal kernel cut to its middle tap, as 2D layers without state, on the frames of one step
as a batch of images. No streaming form of the network that keeps its spatial work can be faster, except by better
kernels; its output means nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from torch import nn


class Subsample(nn.Module):
    """A temporal stride over frames that lie in the batch: every ``stride``-th image goes on."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:: self.stride]


class ImageHead(nn.Module):
    """pytorchvideo's head over images: pool, project every position, activate, average."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.pool = image_network(head.pool)
        self.proj = head.proj
        self.activation = head.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(self.pool(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (x if self.activation is None else self.activation(x)).mean((2, 3))


def image_network(module: nn.Module) -> nn.Module:
    """A copy of a 3D network in which every layer works on images, temporal strides excepted."""
    module = copy.deepcopy(module)
    converted = _convert(module)
    if converted is not module:
        return converted
    for name, child in module.named_children():
        setattr(module, name, image_network(child))
    return module


def _convert(module: nn.Module) -> nn.Module:
    """The 2D layer for one 3D layer; the module itself where nothing is to be done or only its children change."""
    match module:
        case nn.Conv3d():
            return _convolution(module)
        case nn.BatchNorm3d():
            return _batch_norm(module)
        case nn.MaxPool3d():
            _refuse_temporal_pool(module.kernel_size)
            return nn.MaxPool2d(_spatial(module.kernel_size), _spatial(module.stride), _spatial(module.padding))
        case nn.AvgPool3d():
            return nn.AvgPool2d(_spatial(module.kernel_size), _spatial(module.stride), _spatial(module.padding))
        case nn.AdaptiveAvgPool3d():
            return nn.AdaptiveAvgPool2d(_spatial(module.output_size))
        case nn.Module() if type(module).__name__ == "ResNetBasicHead":  # pytorchvideo's
            return ImageHead(module)
        case SqueezeExcitation():
            module.is_3d = False
    return module


def _convolution(conv: nn.Conv3d) -> nn.Module:
    flat = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        _spatial(conv.kernel_size),
        _spatial(conv.stride),
        _spatial(conv.padding),
        _spatial(conv.dilation),
        conv.groups,
        conv.bias is not None,
    )
    flat.weight = nn.Parameter(conv.weight[:, :, conv.kernel_size[0] // 2].contiguous())
    if conv.bias is not None:
        flat.bias = nn.Parameter(conv.bias)
    return flat if conv.stride[0] == 1 else nn.Sequential(Subsample(conv.stride[0]), flat)


def _batch_norm(norm: nn.BatchNorm3d) -> nn.BatchNorm2d:
    flat = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    flat.load_state_dict(norm.state_dict())
    return flat


def _refuse_temporal_pool(kernel: object) -> None:
    if not isinstance(kernel, tuple) or kernel[0] != 1:
        raise NotImplementedError("the floor of a max pool over time is not written, no network here has one")


def _spatial(size: Any) -> Any:
    """(T, H, W) to (H, W); one number stays one number."""
    return tuple(size[1:]) if isinstance(size, (tuple, list)) else size
