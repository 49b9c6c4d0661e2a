"""Loops over frames whose first state is computed from the first frame, in a way of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def started_by_a_layer(m: Any, x: Tensor) -> Tensor:
    h, out = torch.tanh(m.to_state(x[:, 0])), []
    for frame in x.unbind(1):
        h = m.gru(frame, h)
        out.append(m.head(h))
    return torch.stack(out, 1)


def both_states_started_by_layers(m: Any, x: Tensor) -> Tensor:
    h, c = torch.tanh(m.to_state(x[:, 0])), m.to_cell(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        h, c = m.lstm(x[:, t], (h, c))
        out.append(h)
    return torch.stack(out, 1)


def another_first_turn(m: Any, x: Tensor) -> Tensor:
    h, out = None, []
    for t in range(x.shape[1]):
        y = torch.relu(m.to_state(x[:, t]))
        h = y if h is None else torch.maximum(0.5 * h, y) + m.to_cell(x[:, t])
        out.append(h)
    return torch.stack(out, 1)


def change_of_features(m: Any, x: Tensor) -> Tensor:
    """A turn hands on what it has computed of its frame alone, beside a state."""
    before = m.to_state(x[:, 0])
    total, out = torch.zeros_like(before), [before]
    for t in range(1, x.shape[1]):
        now = m.to_state(x[:, t])
        total = 0.8 * total + (now - before).abs()
        before = now
        out.append(total)
    return torch.stack(out, 1)
