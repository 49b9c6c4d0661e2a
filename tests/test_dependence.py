"""Which entries of a result depend on which of the input: what is tracked, operator by operator, and what is measured.

Measured is by drawing each entry anew, in float64. What is tracked may never be less; on these rows it is no more.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from zoo import Graph

from co3d_compile.analysis.locality import dependences
from co3d_compile.capture.capture_model import capture
from co3d_compile.ir.options import Options
from co3d_compile.ir.resized_graph import in_float64

T = 8
BAND = (torch.arange(T)[:, None] - torch.arange(T)).abs() < 2
WEIGHTS = torch.linspace(0.5, 1.5, T * T).view(T, T) * BAND
COLUMNS = torch.tensor([2, 0, 1, 1, 4, 7, 6, 5])
LOWER = torch.where(BAND, 0.0, -torch.inf)


def _scores(x: Tensor) -> Tensor:
    return x.mT @ x


def _attention(x: Tensor, scores: Tensor) -> Tensor:
    return (scores.softmax(-1) @ x.mT).mT


def _written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    y[:, :, 0] = x[:, :, 3]
    return y


def _rows_by_two_indices(x: Tensor) -> Tensor:
    rows = torch.arange(12.0).view(3, 4)
    return rows[(x[:, 0] > 0).long() + (x[:, 1] > 0).long(), (x[:, 2] > 0).long()][:, None]


def _counted(x: Tensor) -> Tensor:
    """How often each of four values is there, at each time."""
    index = (x > 0).to(torch.uint8).add(1).clamp(0, 3).long()
    return torch.zeros(1, 4, T).scatter_add(1, index, torch.ones_like(x))


def _next_to(x: Tensor) -> Tensor:
    """Written at an entry or at the one behind it."""
    index = (torch.arange(T) + (x > 0).to(torch.uint8)).flip(1)
    return torch.zeros(1, 4, T + 2).scatter_add(2, index.long(), x)[:, :, :T]


def _quotient(x: Tensor) -> Tensor:
    """Written at the entry that a count of quarters is in."""
    quarters = 4 * torch.arange(T) + 3 * (x > 0).to(torch.uint8)
    return torch.zeros(1, 4, T).scatter_add(2, quarters // 4, x)


def _zeros_between(x: Tensor) -> Tensor:
    """Zeros are padded in, moved about, added, and summed over with the entries that are none."""
    y = F.pad(x, (2, 0)) - F.pad(x, (0, 2)) * torch.zeros(T + 2)
    even = (torch.arange(T + 2) % 2).expand(1, 4, T + 2)
    return (y[:, :, 1:] * even[:, :, 1:]).unfold(2, 2, 1).sum(-1)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "views and pieces": lambda x: torch.cat([*x.flip(2).roll(1, 2).split(3, 2)], 2)[:, :, 1:].repeat(1, 2, 1),
    "a pad and a pool": lambda x: F.avg_pool1d(F.pad(x, (1, 2), value=0.5), 3, 2),
    "up-sampling": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "picked entries": lambda x: x[:, :, COLUMNS].index_select(1, torch.tensor([0, 2])),
    "one triangle": lambda x: (torch.ones(T, T).tril(-1) * x[:, :1]).sum(-1, keepdim=True).mT,
    "written over": _written,
    "rows of a table": lambda x: F.embedding((x[:, 0] > 0).long(), torch.arange(6.0).view(2, 3)).mT,
    "rows by two indices": _rows_by_two_indices,
    "counted": _counted,
    "written next to": _next_to,
    "written at a quotient": _quotient,
    "zeros between": _zeros_between,
    "where": lambda x: torch.where(COLUMNS > 3, x, x.flip(2)),
    "filled": lambda x: x.masked_fill(COLUMNS > 3, 1.0) + x.masked_fill(COLUMNS < 6, 0.0).flip(2),
    "zero divided": lambda x: (x * (COLUMNS > 3)) / (x.flip(2).abs() + 1.0),
    "a sum of zeros divided": lambda x: (x[:, :, None] * (BAND & (COLUMNS[:, None] > 3))).sum(-1, True).squeeze(-1)
    / (x.flip(2).abs() + 1.0),
    "zeros that stay": lambda x: (x * (COLUMNS > 3)).abs().sqrt().tanh().neg() + 0.0,
    "sum of both": lambda x: (x[:, :, None] * BAND).sum(-1) + (x[:, :, None] * BAND.flip(1)).mean(-1),
    "norm": lambda x: (x[:, :, None] * BAND).norm(dim=-1),
    "maximum": lambda x: (x[:, :, None] + LOWER).amax(-1),
    "exponential": lambda x: (x[:, :, None] + LOWER).exp().sum(-1),
    "rectified": lambda x: (x[:, :, None] + -1e6 * ~BAND).relu().sum(-1) + (x[:, :, None] + LOWER).relu().amax(-1),
    "sums so far": lambda x: x.cumsum(2)[:, :, -1:] + x.flip(2).cumsum(2)[:, :, -1:],
    "places sorted": lambda x: x.sort(1).values + x.argsort(1).to(x),
    "norms of an entry": lambda x: F.layer_norm(x.mT, (4,)).mT + x.var(1, keepdim=True),
    "banded weights": lambda x: x @ WEIGHTS + F.linear(x, WEIGHTS.T.contiguous(), torch.ones(T)),
    "banded matrices": lambda x: torch.addmm(x[0].flip(1), x[0], WEIGHTS)[None] + torch.bmm(x, WEIGHTS[None]),
    "added to its own product": lambda x: torch.addmm(y := x[0], y, WEIGHTS)[None],
    "a convolution": lambda x: F.conv1d(x, torch.ones(2, 4, 3), torch.ones(2), padding=2, dilation=2),
    "a transposed one": lambda x: F.conv_transpose1d(x, torch.ones(4, 2, 3), stride=2),
    "attention, masked": lambda x: _attention(x, _scores(x) + LOWER),
    "attention, masked and less": lambda x: _attention(x, (_scores(x) + LOWER).double().float() - x[:, :1].mT),
    "attention, filled": lambda x: _attention(x, _scores(x).masked_fill(~BAND, -1e9)),
    "attention, weighed": lambda x: _attention(x, torch.where(BAND, _scores(x), torch.tensor(-1e9))),
    "attention, multiplied": lambda x: (_scores(x) * BAND @ x.mT).mT,
    "attention in one operator": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, attn_mask=BAND).mT,
    "attention, a mask added": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, attn_mask=LOWER).mT,
    "attention, causal": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, is_causal=True).mT,
    "a shape alone": lambda x: torch.empty_like(x).copy_(x.roll(1, 2)) * torch.full_like(x.flip(2), 2.0),
    "over all of it": lambda x: x.softmax(2) + x[:, :, x[0, 0].argsort()],
}  # fmt: skip


def _divided(x: Tensor) -> Tensor:
    flags = (x > 0).to(torch.uint8)
    return torch.zeros(1, 4, T + 1).scatter_add(2, ((torch.arange(T) + flags) // (flags + 1)).long(), x)


# What is not known to read or write a few entries is taken to do so with all.
UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "written at a quotient": _divided,
    "written anywhere": lambda x: torch.zeros(1, 4, T).scatter(2, x.long().clamp(0, T - 1), x),
    "read anywhere": lambda x: x[:, :, x[0, 0].long().clamp(0, T - 1)],
    "picked anywhere": lambda x: x.gather(2, x.long().clamp(0, T - 1)),
    "a mask that is computed": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, x.mT @ x).mT,
    "an operator of no kind": lambda x: torch.linalg.inv(x[:, :, :4] + x[:, :, 4:]),
}


def tracked(module: GraphModule, x: Tensor) -> Tensor:
    (found,) = dependences(module, [x], [2], 2)
    return torch.stack([found.columns[n] for n in range(T)])


def test_of_many_numbers_those_at_both_ends_and_in_the_middle_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("co3d_compile.analysis.locality.MANY", 0)
    x = torch.randn(1, 4, 16)
    (found,) = dependences(capture(Graph(lambda m, x: x * 2).eval(), (x,), Options()).module, [x], [2], 2)
    assert list(found.columns) == [0, 1, *range(4, 12), 14, 15]


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_everything(name: str) -> None:
    module, x = Graph(lambda m, x: UNKNOWN[name](x)).eval(), torch.randn(1, 4, T)
    assert tracked(in_float64(capture(module, (x,), Options()).module), x.double()).all()


@pytest.mark.parametrize("name", ROWS)
def test_what_is_tracked_is_what_is_measured(name: str) -> None:
    module, x = Graph(lambda m, x: ROWS[name](x)).eval(), torch.randn(1, 4, T)
    graph = in_float64(capture(module, (x,), Options()).module)
    found = tracked(graph, x.double())
    measured = torch.zeros_like(found)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        x = torch.randn(1, 4, T, generator=generator, dtype=torch.float64)
        for n in range(T):
            other = x.index_copy(2, torch.tensor([n]), torch.randn(1, 4, 1, generator=generator, dtype=torch.float64))
            measured[n] |= (graph(x)[0] != graph(other)[0]).movedim(2, 0).flatten(1).any(1)
    assert found.tolist() == measured.tolist()
