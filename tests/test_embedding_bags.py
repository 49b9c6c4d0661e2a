"""Bags of rows of a table: those of one size are a lookup and a reduction; others are as PyTorch exports them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import slow
from torch import Tensor, nn

import co3d_compile as co3d


class Bags(nn.Module):
    """What is in each frame, by numbers: a row of features for a bag of them, and a convolution over time."""

    def __init__(self, shares: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.conv, self.shares = nn.EmbeddingBag(10, 4, **options), nn.Conv1d(4, 4, 3, padding=1), shares

    def forward(self, numbers: Tensor) -> Tensor:
        n, t, c = numbers.shape
        rows = numbers.reshape(n * t, c)
        found = self.bag(rows, per_sample_weights=rows / 10.0 if self.shares else None)
        return self.conv(found.reshape(n, t, 4).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "streams"),
    [
        ({"mode": "sum"}, True),
        ({"mode": "mean"}, True),
        ({"mode": "max"}, True),
        ({"mode": "sum", "shares": True}, True),
        slow({"mode": "sum", "padding_idx": 1}, False),
    ],
    ids=str,
)
def test_bags(options: dict[str, Any], streams: bool) -> None:
    model, clip = Bags(**options).eval(), torch.randint(0, 10, (1, 8, 3))
    compiled = co3d.compile(model, clip, time_dim=1)
    assert (not compiled.info.recomputed) == streams
    result = co3d.verify(compiled, model, clip)
    assert result.passed, result.reason
