"""The demo's network: X3D-S with random weights that answer to what moves, and what its stream must equal."""

from __future__ import annotations

import copy
from typing import Any

import torch
from fvcore.nn.squeeze_excitation import SqueezeExcitation
from networks import NETWORKS
from torch import Tensor, nn


def calibrated_x3d_s(clips: Tensor, spread: float = 1.5, seed: int = 0) -> nn.Module:
    """X3D-S with seeded random weights whose answers vary from one of ``clips`` (N, 3, 13, 160, 160) to the next.

    Nothing is trained. Batch norm gets the statistics of these clips in place of none at all, as a trained network has
    those of its data; the last layer is scaled so that each class has mean 0 and standard deviation ``spread``.
    """
    torch.manual_seed(seed)
    network = NETWORKS["x3d_s"].build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None  # a plain average over all passes
            if not module.weight.any():  # pytorchvideo starts the last one of each block at zero: no block would act
                nn.init.constant_(module.weight, 0.25)
    head: Any = network.get_submodule("blocks.5")
    projection = head.proj
    with torch.no_grad():
        network(clips)
        network.eval()
        answers: list[Tensor] = []
        hook = projection.register_forward_hook(lambda _module, _inputs, output: answers.append(output.flatten(1)))
        network(clips)
        hook.remove()
        scale = spread / answers[0].std(0)
        projection.weight.mul_(scale[:, None])
        projection.bias.copy_((projection.bias - answers[0].mean(0)) * scale)
    return network


def on_one_long_clip(network: nn.Module, video: Tensor) -> Tensor:
    """Run the untouched network over a whole video (1, 3, T, 160, 160) at once: (1, classes, T - 12) probabilities.

    Two things have no meaning on a clip of another length and are replaced, as the stream defines them: the gates look
    at one frame instead of the mean of all, and the answers at the end are not averaged over time.
    """
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, SqueezeExcitation):
            module.forward = _GatePerFrame(module.block).forward
    head: Any = network.get_submodule("blocks.5")
    head.output_pool = None
    with torch.inference_mode():
        return network(video).flatten(2)


class _GatePerFrame(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x * self.block(x.mean((3, 4), keepdim=True))
