"""Receptive field and warm-up of a network, measured: which frames change an entry of the untouched module.

In double precision, with every frame changed in its own row of one batch, and in a copy whose maxima and
activations are replaced by what no tap can hide behind: sums with the same geometry, a leaky ReLU.
"""

from __future__ import annotations

import math

import torch
from oracle import Check
from torch import Tensor
from zoo.longclip import LongClip, values_at

from .describe import Net
from .entry import reference
from .module import RandomNet

_SEEN = 1e-10  # of the output's spread: rounding in double precision is below, the faintest influence above


def dependence(net: Net, run: Check, module: RandomNet) -> tuple[int, int]:
    """Receptive field in frames and least warm-up in steps."""
    made = reference(net, module, run.clip.clip[0], probe=True)
    clip = LongClip(made, [t.double() for t in run.clip._like], run.dims, False, net.dense)
    pulse, steps = run.pulses[0], run.warmup + 1
    before = run.margin() * pulse
    total = before + steps * pulse + run.margin() * pulse
    clip.run([_changed(net, total)], before)
    begin = before + (steps - 1) * pulse  # first frame of the last step
    field, reach = 0, 0
    for k, what in enumerate(made.outputs):
        value = values_at(clip, what, run.delays[k], run.unit(k), steps - 1, pulse)
        entries = value.movedim(made.time_dims[k], 0) if isinstance(what, int) else value[None]
        for entry in entries:
            hit = _influence(entry)
            if hit:
                field = max(field, hit[-1] - hit[0] + 1)
                reach = max(reach, begin - hit[0])
    return field, math.ceil(reach / pulse)


def _changed(net: Net, frames: int) -> Tensor:
    """Row 0 is a random clip; row i + 1 is the same with frame i changed."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, net.channels, frames, *net.space)
    base = torch.randn(shape, generator=generator, dtype=torch.double)
    noise = torch.randn(shape, generator=generator, dtype=torch.double) * 3
    rows = base.repeat(frames + 1, *(1,) * (base.dim() - 1))
    index = torch.arange(frames)
    rows[index + 1, :, index] += noise[0].movedim(1, 0)
    return rows.movedim(2, net.time_dim)


def _influence(entry: Tensor) -> list[int]:
    """The frames whose change changes this entry."""
    flat = entry.flatten(1)
    spread = max(float(flat.std()), float(flat.abs().mean()), 1e-6)
    return [int(i) for i in ((flat[1:] - flat[0]).abs().amax(1) > _SEEN * spread).nonzero().flatten()]
