"""pytorchvideo's networks, built by its own functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pytorchvideo.models.csn import create_csn
from pytorchvideo.models.r2plus1d import create_r2plus1d
from pytorchvideo.models.resnet import ResStage, create_resnet
from pytorchvideo.models.slowfast import create_slowfast
from pytorchvideo.models.x3d import create_x3d
from torch import Tensor, nn

from . import Reference, Window, split
from .gates import gated_split
from .row import Real

# pytorchvideo: a list of blocks, the last one is the head. X3D's head streams up to its pool.


def _blocks(model: Any) -> nn.Sequential:
    return nn.Sequential(*list(model.blocks)[:-1])


def _x3d_trunk(model: Any) -> nn.Sequential:
    pool = model.blocks[-1].pool
    return nn.Sequential(_blocks(model), pool.pre_conv, pool.pre_norm, pool.pre_act)


def _pool_entries(pool: Any, x: Tensor) -> Tensor:
    """A head's own pool, over as many entries as there are."""
    return F.avg_pool3d(x, (x.shape[2], *pool.kernel_size[1:]), stride=1)


def _project(head: Any, x: Tensor) -> Tensor:
    x = head.proj(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
    x = x if head.activation is None else head.activation(x)
    return head.output_pool(x).flatten(1)


def _x3d_head(model: Any) -> Callable[[Tensor], Tensor]:
    head = model.blocks[-1]
    pool = head.pool
    return lambda x: _project(head, pool.post_act(pool.post_conv(_pool_entries(pool.pool, x))))


def _resnet_head(model: Any) -> Callable[[Tensor], Tensor]:
    head = model.blocks[-1]
    return lambda x: _project(head, _pool_entries(head.pool, x))


_pytorchvideo = split(_blocks, _resnet_head)
_X3D_HEAD = (_x3d_trunk, _x3d_head)


def _x3d(frames: int, size: int, depth: float, small: bool) -> nn.Module:
    if small:
        return create_x3d(
            input_clip_length=frames,
            input_crop_size=32,
            model_num_class=10,
            width_factor=1.0,
            depth_factor=0.5 if depth < 3 else 1.0,
            head_dim_out=32,
        )
    return create_x3d(input_clip_length=frames, input_crop_size=size, depth_factor=depth)


def _x3d_row(name: str, frames: int, size: int, depth: float = 2.2, window: int = 1) -> Real:
    scope = {} if window == 1 else {"pool_scope": "window"}
    return Real(
        name,
        lambda small: _x3d(frames, size, depth, small),
        ((1, 3, frames, size, size),),
        ((1, 3, frames, 32, 32),),
        gated_split(window, *_X3D_HEAD),
        options=scope,
        gain=0.3,
    )


def _short(model: nn.Module) -> nn.Module:
    """With two blocks in each stage: the one with a projection, and one of the others."""
    for module in model.modules():
        if isinstance(module, ResStage):
            module.res_blocks = module.res_blocks[:2]
    return model


def _resnet(
    frames: int, temporal_pool: bool, stem: int, kernels: tuple[Any, ...], small: bool, **more: Any
) -> nn.Module:
    channels = {"stem_dim_out": 8, "model_num_class": 10} if small else {}
    model = create_resnet(
        model_depth=50,
        stem_conv_kernel_size=(stem, 7, 7),
        stage_conv_a_kernel_size=kernels,
        stage1_pool=nn.MaxPool3d if temporal_pool else None,
        head_pool_kernel_size=(frames, 2, 2) if small else (frames, 7, 7),
        **channels,
    )
    return _short(model) if small else model


_ONE, _THREE = (1, 1, 1), (3, 1, 1)
_SLOW = (_ONE, _ONE, _THREE, _THREE)
_C2D = (_ONE,) * 4
_I3D = (_THREE, [_THREE, _ONE], [_THREE, _ONE], [_ONE, _THREE])


def _resnet_row(
    name: str, frames: int, stem: int, kernels: tuple[Any, ...], pool: bool = False, size: int = 224
) -> Real:
    return Real(
        name,
        partial(_resnet, frames // 2 if pool else frames, pool, stem, kernels),
        ((1, 3, frames, size, size),),
        ((1, 3, frames, 64, 64),),
        _pytorchvideo,
    )


def _csn(small: bool) -> nn.Module:
    if small:
        pools = {"stem_pool": nn.MaxPool3d, "head_pool_kernel_size": (4, 2, 2)}
        return _short(create_csn(model_depth=50, stem_dim_out=8, model_num_class=10, **pools))
    return create_csn(model_depth=101, stem_pool=nn.MaxPool3d, head_pool_kernel_size=(4, 7, 7))


def _r2plus1d(small: bool) -> nn.Module:
    if small:
        return _short(create_r2plus1d(stem_dim_out=8, model_num_class=10, head_pool_kernel_size=(4, 2, 2)))
    return create_r2plus1d(dropout_rate=0.5)


# SlowFast: two rates; both pools' windows end at the same step boundary.


def _slowfast(slow: int, small: bool) -> nn.Module:
    alpha = 32 // slow
    more: dict[str, Any] = {"stem_dim_outs": (16, 2), "model_num_class": 10} if small else {}
    space = (2, 2) if small else (7, 7)
    model = create_slowfast(
        model_depth=50,
        slowfast_fusion_conv_kernel_size=(7, 1, 1),
        slowfast_fusion_conv_stride=(alpha, 1, 1),
        head_pool_kernel_sizes=((slow, *space), (32, *space)),
        **more,
    )
    return _short(model) if small else model


def _slowfast_reference(model: Any) -> Reference:
    stages, pools, head = list(model.blocks)[:-2], model.blocks[-2].pool, model.blocks[-1]

    def trunk(clips: list[Tensor]) -> tuple[Tensor, ...]:
        x = list(clips)
        for stage in stages:
            x = stage(x)
        return tuple(x)

    def fn(slow: Tensor, fast: Tensor) -> Tensor:
        pooled = [_pool_entries(pool, x) for pool, x in zip(pools, (slow, fast), strict=True)]
        return _project(head, torch.cat(pooled, 1))

    return Reference(trunk, (Window(fn, (0, 1)),), (2, 2))


def _slowfast_row(name: str, slow: int) -> Real:
    return Real(
        name,
        partial(_slowfast, slow),
        ((1, 3, slow, 256, 256), (1, 3, 32, 256, 256)),
        ((1, 3, slow, 64, 64), (1, 3, 32, 64, 64)),
        _slowfast_reference,
        as_list=True,
    )


X3D = (
    _x3d_row("x3d_xs", 4, 160),
    _x3d_row("x3d_s", 13, 160),
    _x3d_row("x3d_m", 16, 224),
    _x3d_row("x3d_l", 16, 312, depth=5.0),
    _x3d_row("x3d_s-window", 13, 160, window=13),
)
RESNETS = (
    _resnet_row("slow_r50", 8, 1, _SLOW, pool=False, size=256),
    _resnet_row("c2d_r50", 8, 1, _C2D, pool=True),
    _resnet_row("i3d_r50", 8, 5, _I3D, pool=True),
    _resnet_row("i3d_r50-stride1", 8, 5, _I3D, pool=False),
    Real("csn_r101", _csn, ((1, 3, 32, 224, 224),), ((1, 3, 32, 64, 64),), _pytorchvideo),
    Real("r2plus1d_r50", _r2plus1d, ((1, 3, 16, 224, 224),), ((1, 3, 16, 64, 64),), _pytorchvideo, gain=0.3),
    _slowfast_row("slowfast_r50_8x8", 8),
    _slowfast_row("slowfast_r50_4x16", 4),
)
