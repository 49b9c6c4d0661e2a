"""X3D by continual-inference's own modules: a second opinion that shares no code with the compiler."""

from __future__ import annotations

from typing import Any

import continual as co
from torch import Tensor, nn


def _continual(module: nn.Module) -> nn.Module:
    """A convolution of the model as its continual counterpart, every other layer as it is."""
    if isinstance(module, nn.Conv3d):
        return co.Conv3d.build_from(module)
    return co.forward_stepping(module)


class _FrameGate(nn.Module):
    """Squeeze-and-excitation over one frame: what CoX3D does, and our scope "frame"."""

    def __init__(self, squeeze: Any) -> None:
        super().__init__()
        self.block = squeeze.block

    def forward(self, x: Tensor) -> Tensor:
        return x * self.block(x.mean((3, 4), keepdim=True))


class _Rest(nn.Module):
    """What follows the pool in the head of an X3D."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.pool, self.head = head.pool, head

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool.post_act(self.pool.post_conv(x))
        x = self.head.proj(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        x = x if self.head.activation is None else self.head.activation(x)
        return self.head.output_pool(x).flatten(3)


def _co_layers(*modules: nn.Module | None) -> list[nn.Module]:
    return [_continual(module) for module in modules if module is not None]


def _co_block(block: Any) -> nn.Module:
    """A residual block: the shortcut is a delay, as long as the branch's own."""
    b = block.branch2
    norm, gate = (b.norm_b[0], b.norm_b[1]) if isinstance(b.norm_b, nn.Sequential) else (b.norm_b, None)
    gates = [] if not hasattr(gate, "block") else [co.forward_stepping(_FrameGate(gate))]
    branch = co.Sequential(
        *_co_layers(b.conv_a, b.norm_a, b.act_a, b.conv_b, norm), *gates, *_co_layers(b.act_b, b.conv_c, b.norm_c)
    )
    if block.branch1_conv is None:
        joined: nn.Module = co.Residual(branch, residual_shrink=False)
    else:
        shortcut = co.Sequential(*_co_layers(block.branch1_conv, block.branch1_norm))
        joined = co.BroadcastReduce(shortcut, branch, reduce="sum")
    return co.Sequential(joined, _continual(block.activation))


def continual_x3d(model: Any) -> nn.Module:
    """CoX3D with the weights of a pytorchvideo X3D; while it warms up a step gives no tensor."""
    stem, *stages, head = model.blocks
    layers = _co_layers(stem.conv.conv_t, stem.conv.conv_xy, stem.norm, stem.activation)
    blocks = [_co_block(block) for stage in stages for block in stage.res_blocks]
    pool = head.pool
    net = co.Sequential(*layers, *blocks, *_co_layers(pool.pre_conv, pool.pre_norm, pool.pre_act))
    clip, *space = pool.pool.kernel_size
    net.append(co.AvgPool3d((clip, *space), stride=1))

    net.append(co.forward_stepping(_Rest(head)))
    return net.eval()
