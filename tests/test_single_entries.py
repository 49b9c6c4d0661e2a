"""Operators over time where the clip has a single entry: a slice of one frame, the first turn of a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import few
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d

Operators = Mapping[str, Callable[[Tensor], Tensor]]
GROUPS: dict[str, Operators] = {
    "reduced": {
        "variance": lambda x: x.var(1, unbiased=False) + 1 + x[:, 0],
        "deviation": lambda x: x.std(1, keepdim=True, unbiased=False) + x,
        "norm": lambda x: x.norm(dim=1),
        "normalised": lambda x: F.normalize(x, dim=1),
        "place of the largest": lambda x: x + x.argmax(1, keepdim=True),
        "product": lambda x: x.prod(1),
        "log of a sum": lambda x: x.logsumexp(1),
        "any": lambda x: (x > 0).any(1),
        "mean": lambda x: x.mean(1),
    },
    "accumulated": {
        "sum": lambda x: x.cumsum(1),
        "product": lambda x: x.cumprod(1),
        "largest": lambda x: x.cummax(1).values,
        "logs of sums": lambda x: x.logcumsumexp(1),
    },
    "put in order": {
        "median": lambda x: x.median(1).values,
        "largest": lambda x: x.max(1, keepdim=True).values,
        "sorted": lambda x: x.sort(1).values,
        "top": lambda x: x.topk(1, dim=1).values,
        "flipped": lambda x: x.flip(1),
        "rolled": lambda x: x + x.roll(1, 1),
    },
    "beside constants": {  # the batch is behind the dim in which they are joined
        "zeros": lambda x: torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]]).sum(0),
        "ones": lambda x: torch.stack([x[:, 0], torch.ones_like(x[:, 0])]).cumsum(0)[1],
    },
    "weighed": {
        "softmax": lambda x: x + x.softmax(1),
        "log-softmax": lambda x: x + x.log_softmax(1),
        "layer norm": lambda x: x + F.layer_norm(x.mT, (1,)).mT,
        "attention": lambda x: F.scaled_dot_product_attention(x, 2 * x, x),
        "attention, written": lambda x: (x @ x.mT).softmax(-1) @ (3 * x),
    },
}


@pytest.mark.parametrize("group", few(GROUPS, "weighed"))
def test_over_one_entry(group: str) -> None:
    operators = GROUPS[group]

    def forward(m: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {name: operator(x[:, -1:]) for name, operator in operators.items()}

    net, clip = Graph(forward).eval(), (torch.randn(1, 5, 3),)
    compiled = co3d.compile(net, clip, time_dim=1)
    assert compiled.info.recomputed == ()
    result = co3d.verify(compiled, net, clip)
    assert result.passed, result
    session = co3d.StreamSession(compiled)
    for frame in torch.randn(3, 1, 1, 3):
        for name, value in zip(operators, session.step(frame.numpy()), strict=True):
            np.testing.assert_allclose(value.ravel(), operators[name](frame).numpy().ravel(), rtol=1e-5, err_msg=name)


def test_attention_over_a_cache_that_begins_with_one_entry() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        cache, results = x[:, :0], []
        for frame in x.split(1, 1):
            cache = torch.cat([cache, frame], 1)[:, -2:]
            results.append(F.scaled_dot_product_attention(frame, cache, cache))
        return torch.cat(results, 1)

    net, clip = Graph(forward).eval(), (torch.randn(1, 4, 3),)
    result = co3d.verify(co3d.compile(net, clip, time_dim=1), net, clip)
    assert result.passed, result


def test_what_takes_the_place_of_a_first_entry_is_no_crop() -> None:
    def forward(m: nn.Module, x: Tensor) -> dict[str, Tensor]:
        cleared = x.clone()
        cleared[:, 0] = 0
        differences = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1)
        return {"cleared": cleared.mean(1), "doubled": torch.cat([x[:, :1] * 2, x[:, 1:]], 1).mean(1),
                "differences": differences.abs().mean(1), "cut": x[:, 1:].mean(1)}  # fmt: skip

    compiled = co3d.compile(Graph(forward).eval(), (torch.randn(1, 8, 3),), time_dim=1)
    assert list(compiled.info.delays.values()) == [0, 0, 0, 0]  # each reads the newest frame


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_a_factor_that_is_not_whole_is_none_though_the_length_is(mode: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.2, mode=mode)  # 8 entries of 4

    net, clip = Graph(forward).eval(), torch.randn(1, 3, 4)
    session = co3d.StreamSession(co3d.compile(net, (clip,)))
    for frame in clip.unbind(2):
        got = session.step(frame.numpy())
    np.testing.assert_allclose(got, net(clip), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, -1])
def test_an_entry_that_is_added_to_is_verified(index: int) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = m.conv(x)
        y[:, :, index] += 1
        result: Tensor = m.conv(y)
        return result

    net, clip = Graph(forward, conv=nn.Conv1d(3, 3, 3, padding=1)).eval(), (torch.randn(1, 3, 8),)
    result = co3d.verify(co3d.compile(net, clip), net, clip)
    assert result.passed, result
