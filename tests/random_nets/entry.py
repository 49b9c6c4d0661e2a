"""A description as an entry of the zoo: its clip, its options and its reference for the oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from zoo import Entry, Reference, Window, randomise

from .describe import Net
from .module import RandomNet

SHORTEST = 4  # entries that every tensor of a clip has at least: a pool that covers the clip would be a window
LONGEST = 160


class TooLong(Exception):
    """No reasonable clip is long enough for this network."""


@dataclass(frozen=True)
class RandomEntry(Entry):
    """An entry that is captured at another batch than one."""

    captured: int = 1

    def examples(self, batch: int = 1, seed: int = 1) -> tuple[Any, ...]:
        return super().examples(self.captured, seed)


def entry_of(net: Net) -> RandomEntry:
    """The zoo entry of a network.

    Raises:
        TooLong: Its clip would have to be too long.
    """
    frames = clip_length(net)
    shape = list(torch.empty(1, net.channels, frames, *net.space).movedim(2, net.time_dim).shape)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"stride_mode": "dense" if net.dense else "step"}
    options["pool_scope"] = "window" if net.window_gates else "frame"
    if net.times:
        options["frames_per_step"] = net.pulse() * net.times
    return RandomEntry(
        repr(net),
        lambda: randomise(RandomNet(net), example),
        (tuple(shape),),
        options=options,
        time_dim=net.time_dim,
        reference=lambda module: reference(net, module, frames),
        captured=net.captured,
    )


def clip_length(net: Net) -> int:
    """The least clip, in whole steps, that gives every tensor a few entries; then `extra` frames more."""
    module = RandomNet(net).eval()
    pulse = net.pulse()
    frames = pulse * -(-SHORTEST // pulse)
    while frames <= LONGEST:
        try:
            if min(lengths(module, frames)) >= SHORTEST:
                return frames + net.extra
        except (RuntimeError, IndexError):
            pass  # a kernel does not fit, a maximum has nothing to look at
        frames += max(pulse, frames // 8 // pulse * pulse)
    raise TooLong(f"{LONGEST} frames")


def lengths(module: RandomNet, frames: int) -> list[int]:
    """Entries of each tensor of a clip."""
    net = module.net
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    clip = torch.zeros(1, net.channels, frames, *net.space, dtype=dtype).movedim(2, net.time_dim)
    with torch.no_grad():
        return [tensor.shape[2] for tensor in module.tensors(clip)]


def reference(net: Net, module: RandomNet, frames: int, probe: bool = False) -> Reference:
    """The untouched module on a long clip, its gates over one entry or over the newest clip."""
    entries = lengths(module, frames)
    model = copy.deepcopy(module)
    model.gate_lengths = {i: entries[op.inputs[0]] if net.window_gates else 1 for i, op in enumerate(net.ops)}
    if probe:
        model.probe = True
        model.double()
    flows = net.flows()
    outputs = tuple(
        Window(model.head(k), (k,), flows[out.tensor].crop) if out.head else k for k, out in enumerate(net.outputs)
    )
    dims = tuple(net.time_dim if net.restore and not out.head else 2 for out in net.outputs)
    return Reference(model.trunk, outputs, dims)
