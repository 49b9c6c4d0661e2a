"""Loops over frames that average, filter and carry along, with the starts that people give them."""

from __future__ import annotations

from typing import Any

import torch
from loop_network import zeros
from torch import Tensor


def moving_average(m: Any, x: Tensor) -> Tensor:
    average, out = zeros(x, 4), []
    for t in range(x.shape[1]):
        average = 0.9 * average + 0.1 * x[:, t]
        out.append(m.embed(x[:, t] - average))
    return torch.stack(out, 1)


def smoothed_from_the_first_frame(m: Any, x: Tensor) -> Tensor:
    """The first frame is the start, and the first result."""
    y = m.embed(x)
    h = y[:, 0]
    out = [h]
    for t in range(1, x.shape[1]):
        h = 0.7 * h + 0.3 * y[:, t]
        out.append(h)
    return torch.stack(out, 1)


def less_the_background(m: Any, x: Tensor) -> Tensor:
    """The first frame is the start, and is read by the first turn too."""
    background, out = x[:, 0], []
    for t in range(x.shape[1]):
        out.append(m.embed(x[:, t] - background))
        background = 0.9 * background + 0.1 * x[:, t]
    return torch.stack(out, 1)


def filter_of_order_two(m: Any, x: Tensor) -> Tensor:
    """Two values before are handed on, which start from zeros in the shape of a frame."""
    before = earlier = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        y = x[:, t] + 0.3 * before - 0.2 * earlier
        out.append(m.embed(y))
        before, earlier = y, before
    return torch.stack(out, 1)


def filter_in_transposed_form(m: Any, x: Tensor) -> Tensor:
    """What each value leaves for the next two is handed on: the last ones are read by nobody."""
    first = second = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        y = 0.3 * x[:, t] + first
        first = 0.2 * x[:, t] + 0.5 * y + second
        second = 0.1 * x[:, t] - 0.2 * y
        out.append(m.embed(y))
    return torch.stack(out, 1)


def mean_and_variance_so_far(m: Any, x: Tensor) -> Tensor:
    """By Welford's method, which divides by a number that is another one in each turn."""
    mean = square = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        difference = x[:, t] - mean
        mean = mean + difference / (t + 1)
        square = square + difference * (x[:, t] - mean)
        out.append(m.embed(mean + square / (t + 1)))
    return torch.stack(out, 1)


def spiking(m: Any, x: Tensor) -> Tensor:
    """A leaky neuron; what it starts from is a number, so that the first turn has other operators."""
    potential, out = 0.0, []
    for t in range(x.shape[1]):
        potential = potential + (m.embed(x[:, t]) - potential) / 2.0
        spike = (potential >= 0.1).to(x.dtype)  # type: ignore[attr-defined]
        potential = potential * (1 - spike)
        out.append(spike)
    return torch.stack(out, 1)


def carried_along(m: Any, x: Tensor) -> Tensor:
    """What is handed on is moved by two frames that follow each other, but for the first one."""
    h, out = zeros(x, 4), []
    for t in range(x.shape[1]):
        if t > 0:
            h = h + torch.tanh(m.embed(x[:, t] - x[:, t - 1]))
        h = torch.tanh(m.mix(torch.cat([x[:, t], h], -1)))
        out.append(h)
    return torch.stack(out, 1)


def turning(m: Any, x: Tensor) -> Tensor:
    """A linear recurrence over complex numbers, from zeros on."""
    z = torch.complex(x, m.embed(x)[..., : x.shape[2]])
    turn, states = 0.5 * torch.exp(1j * m.embed.weight[0, 0]), [torch.zeros(x.shape[0], x.shape[2], dtype=torch.cfloat)]
    for frame in z.unbind(1):
        states.append(turn * states[-1] + frame)
    return torch.view_as_real(torch.stack(states[1:], 1)).flatten(2)


def on_each_frame_twice(m: Any, x: Tensor) -> Tensor:
    y, h, out = x.repeat_interleave(2, 1), zeros(x, 5), []
    for t in range(y.shape[1]):
        h = m.gru(y[:, t], h)
        out.append(h)
    return torch.stack(out, 1)[:, 1::2]
