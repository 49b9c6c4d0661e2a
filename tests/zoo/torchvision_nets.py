"""torchvision's video networks, as they are and without temporal strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import video as tv
from torchvision.models.video import mvit as tv_mvit
from torchvision.models.video import resnet as tv_resnet
from torchvision.models.video.swin_transformer import SwinTransformer3d

from . import Reference, Window, by_clip, split
from .row import Real


class _Stem(nn.Sequential):
    """torchvision's basic stem with fewer channels."""

    def __init__(self, split_stem: bool = False) -> None:
        if split_stem:
            first = (nn.Conv3d(3, 6, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), nn.BatchNorm3d(6), nn.ReLU(True))
            second = (nn.Conv3d(6, 8, (3, 1, 1), 1, (1, 0, 0), bias=False), nn.BatchNorm3d(8), nn.ReLU(True))
            super().__init__(*first, *second)
        else:
            conv = nn.Conv3d(3, 8, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
            super().__init__(conv, nn.BatchNorm3d(8), nn.ReLU(True))


class _SmallVideoResNet(tv_resnet.VideoResNet):
    """torchvision's VideoResNet with 8 to 24 channels."""

    def __init__(self, makers: list[Any], split_stem: bool) -> None:
        super().__init__(tv_resnet.BasicBlock, makers, [1, 1, 1, 1], partial(_Stem, split_stem), num_classes=10)
        self.inplanes = 8
        self.layer1 = self._make_layer(tv_resnet.BasicBlock, makers[0], 8, 2)
        self.layer2 = self._make_layer(tv_resnet.BasicBlock, makers[1], 12, 1, stride=2)
        self.layer3 = self._make_layer(tv_resnet.BasicBlock, makers[2], 16, 1, stride=2)
        self.layer4 = self._make_layer(tv_resnet.BasicBlock, makers[3], 24, 1, stride=2)
        self.fc = nn.Linear(24, 10)


_MAKERS: dict[str, list[Any]] = {
    "r3d_18": [tv_resnet.Conv3DSimple] * 4,
    "mc3_18": [tv_resnet.Conv3DSimple] + [tv_resnet.Conv3DNoTemporal] * 3,
    "r2plus1d_18": [tv_resnet.Conv2Plus1D] * 4,
}


def _without_temporal_stride(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, *module.stride[1:])
    return model


def _video_resnet(name: str, stride: bool, small: bool) -> nn.Module:
    if small:
        model: nn.Module = _SmallVideoResNet(_MAKERS[name], name == "r2plus1d_18")
    else:
        model = getattr(tv, name)()
    return model if stride else _without_temporal_stride(model)


def _tv_trunk(model: Any) -> nn.Sequential:
    return nn.Sequential(model.stem, model.layer1, model.layer2, model.layer3, model.layer4)


def _tv_head(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: model.fc(model.avgpool(x).flatten(1))


def _video_resnet_row(name: str, stride: bool) -> Real:
    return Real(
        name + ("" if stride else "-stride1"),
        partial(_video_resnet, name, stride),
        ((1, 3, 16, 112, 112),),
        ((1, 3, 16, 24, 24),),
        split(_tv_trunk, _tv_head),
    )


def _s3d(small: bool) -> nn.Module:
    if not small:
        return tv.s3d()
    model: Any = tv.s3d(num_classes=10)
    model.avgpool.kernel_size = (2, 1, 1)  # 7x7 pixels are what 224 leave
    return model


def _s3d_trunk(model: Any) -> Callable[[Tensor], Tensor]:
    """With the pool, which slides over pairs of entries."""
    return lambda x: model.classifier(model.avgpool(model.features(x)))


def _s3d_head(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x.mean((2, 3, 4))


def _mvit(small: bool) -> nn.Module:
    if not small:
        return tv.mvit_v1_b()
    config = tv_mvit.MSBlockConfig
    blocks = [
        config(1, 16, 16, [], [3, 3, 3], [], [1, 4, 4]),
        config(1, 16, 32, [], [3, 3, 3], [], [1, 2, 2]),
        config(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
    ]
    return tv_mvit.MViT(
        spatial_size=(32, 32),
        temporal_size=16,
        block_setting=blocks,
        residual_pool=False,
        residual_with_cls_embed=True,
        rel_pos_embed=False,
        proj_after_attn=False,
        num_classes=10,
    )


def _mvit_reference(model: Any) -> Reference:
    """The patch embedding streams; position embedding and attention are fixed to the clip's entries."""
    rest = _AfterPatches(model)
    return Reference(model.conv_proj, (Window(rest),))


class _AfterPatches:
    """MViT's own forward behind its patch embedding."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, patches: Tensor) -> Tensor:
        conv, self.model.conv_proj = self.model.conv_proj, nn.Identity()
        try:
            return self.model(patches)
        finally:
            self.model.conv_proj = conv


def _swin(small: bool) -> nn.Module:
    if not small:
        return tv.swin3d_t()
    return SwinTransformer3d(
        patch_size=[2, 4, 4],
        embed_dim=12,
        depths=[2],
        num_heads=[2],
        window_size=[4, 4, 4],
        num_classes=10,
    )


TORCHVISION = (
    *(_video_resnet_row(name, stride=True) for name in _MAKERS),
    *(_video_resnet_row(name, stride=False) for name in ("r3d_18", "r2plus1d_18")),  # MC3 has none
    Real("s3d", _s3d, ((1, 3, 32, 224, 224),), ((1, 3, 24, 32, 32),), split(_s3d_trunk, _s3d_head)),
    Real("mvit_v1_b", _mvit, ((1, 3, 16, 224, 224),), ((1, 3, 16, 32, 32),), _mvit_reference, "recompute"),
    Real("swin3d_t", _swin, ((1, 3, 16, 224, 224),), ((1, 3, 16, 32, 32),), by_clip(stride=2), "recompute"),
)
