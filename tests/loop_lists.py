"""Loops that keep a list of features of the last frames, which is shorter in the first turns, in several spellings."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


def mean_of_a_list(m: Any, x: Tensor) -> Tensor:
    q: list[Tensor] = []
    out = []
    for t in range(x.shape[1]):
        q = [*q, m.linear(x[:, t])][-3:]
        out.append(torch.stack(q).mean(0))
    return torch.stack(out, 1)


def mean_of_a_deque(m: Any, x: Tensor) -> Tensor:
    q: deque[Tensor] = deque(maxlen=3)
    out = []
    for frame in x.unbind(1):
        q.append(torch.tanh(m.linear(frame)))
        out.append(torch.stack(list(q), 1).mean(1))
    return torch.stack(out, 1)


def mean_of_what_is_left(m: Any, x: Tensor) -> Tensor:
    q: list[Tensor] = []
    out = []
    for t in range(x.shape[1]):
        q.append(m.linear(x[:, t]))
        if len(q) > 3:
            q.pop(0)
        out.append(sum(q) / len(q))
    return torch.stack(out, 1)


def largest_of_rows(m: Any, x: Tensor) -> Tensor:
    q: list[Tensor] = []
    out = []
    for t in range(x.shape[1]):
        q.append(m.linear(x[:, t])[:, None])
        q = q[1:] if len(q) > 3 else q
        out.append(m.linear(torch.cat(q, 1).amax(1)))
    return torch.stack(out, 1)


def rows_of_a_tensor(m: Any, x: Tensor) -> Tensor:
    q, out = None, []
    for t in range(x.shape[1]):
        row = m.linear(x[:, t])[:, None]
        q = row if q is None else torch.cat([q, row], 1)[:, -3:]
        out.append(q.mean(1))
    return torch.stack(out, 1)


def memory_of_the_last_frames(m: Any, x: Tensor) -> Tensor:
    keys: list[Tensor] = []
    values: list[Tensor] = []
    out = []
    for t in range(x.shape[1]):
        keys, values = [*keys, m.linear(x[:, t])][-3:], [*values, torch.tanh(x[:, t])][-3:]
        weights = torch.softmax((x[:, t, None] * torch.stack(keys, 1)).sum(-1), 1)
        out.append(x[:, t] + (weights[..., None] * torch.stack(values, 1)).sum(1))
    return torch.stack(out, 1)


def full_lists_alone(m: Any, x: Tensor) -> Tensor:
    q: list[Tensor] = []
    out = []
    for t in range(x.shape[1]):
        q = [*q, m.linear(x[:, t])][-3:]
        if len(q) == 3:
            out.append(m.linear(torch.stack(q, 1).amax(1)))
    return torch.stack(out, 1)


def mean_of_the_last_states(m: Any, x: Tensor) -> Tensor:
    h, q, out = x.new_zeros(x.shape[0], 4), [], []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
        q = [*q, h][-3:]
        out.append(torch.stack(q).mean(0))
    return torch.stack(out, 1)


LISTS = {
    f.__name__: f
    for f in (
        mean_of_a_list,
        mean_of_a_deque,
        mean_of_what_is_left,
        largest_of_rows,
        rows_of_a_tensor,
        memory_of_the_last_frames,
        full_lists_alone,
        mean_of_the_last_states,
    )
}
