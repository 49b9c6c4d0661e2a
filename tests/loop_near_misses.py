"""Loops over frames that are no layers with state: each answer depends on where its clip begins or ends."""

from __future__ import annotations

from typing import Any

import torch
from loop_network import zeros
from torch import Tensor


def backwards(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 5), []
    for t in reversed(range(x.shape[1])):
        h = m.gru(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def discounted_by_its_index(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 5)
    for t in range(x.shape[1]):
        h = m.gru(x[:, t] * 0.9**t, h)
    return h


def started_by_all_frames(m: Any, x: Tensor) -> Tensor:
    h = m.embed(x.mean(1))
    for t in range(x.shape[1]):
        h = m.layers[0](x[:, t], h)
    return h


def summed(m: Any, x: Tensor) -> Tensor:
    total = zeros(x, 4)
    for t in range(x.shape[1]):
        total = total + m.embed(x[:, t]).relu()
    return total / x.shape[1]


def last_mean_so_far(m: Any, x: Tensor) -> Tensor:
    mean = zeros(x, 4)
    for t in range(x.shape[1]):
        mean = mean + (m.embed(x[:, t]) - mean) / (t + 1)
    return mean


def share_of_the_clip(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(x[:, t] * (t / x.shape[1]), h)
        out.append(h)
    return torch.stack(out, 1)


def largest(m: Any, x: Tensor) -> Tensor:
    h, best = zeros(x, 4), zeros(x, 4)
    for t in range(x.shape[1]):
        h = torch.tanh(m.mix(torch.cat([x[:, t], x[:, t]], -1)))
        best = torch.maximum(best, h)
    return best


def refined(m: Any, x: Tensor) -> Tensor:
    y = x.mean(1)
    for _ in range(6):
        y = y + torch.tanh(m.embed(y))
    return y


def positions(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 4)
    for t in range(x.shape[1]):
        h = m.layers[0](x[:, t] + m.places[t], h)
    return h


def beside_empty_places(m: Any, x: Tensor) -> Tensor:
    empty = torch.cat([zeros(x, 1, 4)] * x.shape[1], 1)
    return torch.stack([m.embed(x[:, t]) * m.embed(empty[:, t]) for t in range(x.shape[1])], 1)


def weighed_after_all_frames(m: Any, x: Tensor) -> Tensor:
    """Lists of frames get a dim in front, and meet weights that have one behind."""
    h, frames = m.embed(x.mean(1)), [zeros(x, 4) for _ in range(3)]
    for t in range(x.shape[1]):
        feature, last = m.to_d(x[:, t]), torch.stack(frames[-3:])
        weights = torch.stack([(frame * m.embed(feature)).sum(1) for frame in last])
        h = torch.tanh((last * weights.reshape(*weights.shape, 1).softmax(0)).sum(0) + feature + h)
        frames.append(h)
    return h


def started_by_the_length(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 5) + x.shape[1] / 10
    for t in range(x.shape[1]):
        h = m.gru(x[:, t], h)
    return h


def longer_at_each_turn(m: Any, x: Tensor) -> Tensor:
    """The last turn is the only one that is as long."""
    seen, rows = x[:, :0], []
    for t in range(x.shape[1]):
        seen = torch.cat([seen, m.embed(x[:, t : t + 1])], 1)
        rows.append((seen.softmax(1) * seen).sum(1))
    return torch.stack(rows, 1).amax(1)


NEAR_MISSES = {
    f.__name__: f
    for f in (
        backwards,
        discounted_by_its_index,
        started_by_all_frames,
        summed,
        last_mean_so_far,
        share_of_the_clip,
        largest,
        refined,
        positions,
        beside_empty_places,
        weighed_after_all_frames,
        longer_at_each_turn,
        started_by_the_length,
    )
}
