"""What is read at the number of each row and at a place in it, ``x[torch.arange(n)[:, None], places]``: it streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import check
from small_graphs import conv, entry
from torch import Tensor, nn


def tokens(m: Any, x: Tensor) -> Tensor:
    """Three tokens of two numbers for each frame, (N, T, 3, 2)."""
    result: Tensor = m.mix(m.conv(x).mT).unflatten(2, (3, 2))
    return result


def best(y: Tensor, count: int) -> Tensor:
    """The places of the tokens with the largest sums."""
    return y.sum(-1).topk(count, -1)[1]


def by_row(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y = tokens(m, x).flatten(0, 1)
    result: Tensor = y[torch.arange(n * t)[:, None], best(y, 2)].reshape(n, t, 4).mT
    return result


def by_frame(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y = tokens(m, x)
    return y[torch.arange(n)[:, None, None], torch.arange(t)[:, None], best(y, 2)].flatten(2).mT


def of_each_channel(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y = tokens(m, x)
    return y.permute(0, 3, 1, 2)[torch.arange(n)[:, None], :, torch.arange(t), best(y, 1)[..., 0]].mT


def places_first(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y = tokens(m, x).flatten(0, 1)
    return y.transpose(0, 1)[best(y, 1)[:, 0], torch.arange(n * t)].reshape(n, t, 2).mT


def from_the_end(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y = tokens(m, x).flatten(0, 1)
    places = (y > 0).int().sum((1, 2), dtype=torch.int32).clamp(max=2) - 3
    return y[torch.arange(n * t, dtype=torch.int32), places].reshape(n, t, 2).mT


def alike(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y = tokens(m, x).flatten(0, 1)
    return y[torch.arange(n * t)[:, None], m.order.expand(n * t, 2)].reshape(n, t, 4).mT


def behind_others(m: Any, x: Tensor) -> Tensor:
    y = tokens(m, x).mT
    return y[:, :, torch.arange(2)[:, None], m.order.expand(2, 2)].flatten(2).mT


class Ordered(nn.Module):
    """The network with an order of tokens in a buffer."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.conv, self.mix, self._forward = conv(padding=1), nn.Linear(4, 6), forward
        self.register_buffer("order", torch.tensor([2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        """Reads some tokens of each frame."""
        result: Tensor = self._forward(self, x)
        return result


ROWS = [by_row, by_frame, of_each_channel, places_first, from_the_end, alike, behind_others]


@pytest.mark.parametrize("forward", ROWS, ids=lambda f: f.__name__)
def test_what_is_read_in_each_row_streams(forward: Any) -> None:
    facts = check(entry(forward.__name__, lambda: Ordered(forward), (1, 4, 12), tight=False), batch=2)
    assert facts.recomputed == () and facts.delays == (1,)
