"""Operators that few networks have, through the oracle, behind a convolution over time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check_row
from small_graphs import conv, fn, row
from torch import Tensor, nn
from zoo import Entry

CLIP, VIDEO = (1, 4, 12), (1, 4, 8, 3, 4)


def over_time() -> nn.Module:
    return nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))


def frames(m: Any, x: Tensor) -> Tensor:
    """Each frame as one of a batch."""
    return m.a(x).transpose(1, 2).flatten(0, 1)


def clips(y: Tensor, x: Tensor) -> Tensor:
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def mean_and_variance(m: Any, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(m.a(x), 1, keepdim=True)
    return mean * (variance + 1)


def log_determinant(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).mT[:, :, :3]
    return torch.linalg.slogdet(2 * torch.eye(3) + y[..., None] * y[:, :, None])[1][:, None]


def columns(m: Any, x: Tensor) -> Tensor:
    return clips(F.unfold(frames(m, x), 2, dilation=2), x)


def response(m: Any, x: Tensor) -> Tensor:
    return clips(F.local_response_norm(frames(m, x), 3), x)


def whole_numbers(m: Any, x: Tensor) -> Tensor:
    return torch.where(x > 0, (9 * m.a(x)).to(torch.int32), torch.tensor(3)).float()


def scattered(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return torch.zeros(x.shape[0], 3, *x.shape[2:]).scatter_reduce(1, y.argsort(1) % 3, y, "amax")


def biased(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.t.weight[:, :1], m.t.weight, m.a(x)[0])[None]


def shared_weights(m: Any, x: Tensor) -> Tensor:
    y = frames(m, x).flatten(2)
    return clips(torch.baddbmm(m.t.weight[:1, None], y, m.t.weight[None].expand(y.shape[0], -1, -1)), x)


def behind(name: str, function: Any, shape: tuple[int, ...] = CLIP, delay: int = 1, **parts: Any) -> Any:
    """A row of the table: the network has a convolution over time, ``a``."""
    return row(name, fn(function, a=conv_same if shape is CLIP else over_time, **parts), delay, shape)


def conv_same() -> nn.Module:
    return conv(3, 1, 1, 1)


def table(rows: int, columns: int) -> Any:
    return lambda: nn.Embedding(rows, columns)


TABLE = [
    behind("mean and variance", mean_and_variance),
    behind("columns far apart", columns, VIDEO),
    behind("logarithm of a determinant", log_determinant),
    behind("a vector times a clip", lambda m, x: (m.t.weight[0] @ m.a(x))[:, None], t=table(1, 4)),
    behind("a bias and weights times a clip", biased, t=table(3, 4)),
    behind("weights that are shared", shared_weights, VIDEO, t=table(12, 3)),
    behind("numbers of unlike types", whole_numbers),
    behind("a table of numbers", lambda m, x: m.t.weight[0][m.a(x).argmax(1)][:, None], VIDEO, t=table(1, 4)),
    behind("medians", lambda m, x: m.a(x).quantile(0.5, 1, True)),
    behind("pixels from channels", lambda m, x: F.pixel_shuffle(m.a(x).transpose(1, 2), 2).transpose(1, 2), VIDEO),
    behind("local response", response, VIDEO),
    behind("scattered maxima", scattered, VIDEO),
    behind("an adaptive max pool", lambda m, x: F.adaptive_max_pool3d(m.a(x), (None, 1, 2)), VIDEO),
]


@pytest.mark.parametrize(("case", "delay"), TABLE)
def test_row(case: Entry, delay: int | None) -> None:
    check_row(case, delay)
