"""Sums and products of all entries so far, in the dtype that PyTorch gives them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from marks import slow
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d

FRAMES = 320
"""So many that the sum of small numbers outgrows their dtype."""


def _differences(x: Tensor) -> Tensor:
    """As many as frames: the first one twice."""
    found = x[:, :, 1:] - x[:, :, :-1]
    return torch.cat([found[:, :, :1], found], 2)


def _hysteresis(x: Tensor) -> Tensor:
    """Set above five, and until what comes is not above two."""
    flag, flags = torch.zeros_like(x[:, :, 0], dtype=torch.bool), []
    for frame in x.unbind(2):
        flag = (frame > 5) | (flag & (frame > 2))
        flags.append(flag)
    return torch.stack(flags, 2)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "what is true": (lambda x: (x > 3).cumsum(2).float(), torch.float32),
    "small numbers": (lambda x: x.cumsum(2).float(), torch.uint8),
    "whole numbers as others": (lambda x: x.cumsum(2, dtype=torch.float32), torch.int32),
    "half precision": (lambda x: x.half().cumsum(2, dtype=torch.float32), torch.float32),
    "a product": (lambda x: (1 + (x - 4) / 100).cumprod(2), torch.float32),
    "a product of what is true": (lambda x: (x < 7).cumprod(2).float(), torch.uint8),
    "of differences, the first frame repeated": (
        lambda x: torch.diff(x, dim=2, prepend=x[:, :, :1]).abs().cumsum(2),
        torch.float32,
    ),
    "of differences, the first of them repeated": (lambda x: _differences(x).abs().cumsum(2), torch.float32),
    "of the entry before, the first one repeated": (
        lambda x: (torch.cat([x[:, :, :1], x[:, :, :-1]], 2) * x).cumsum(2),
        torch.float32,
    ),
    "a flag with hysteresis": (lambda x: _hysteresis(x).float(), torch.float32),
    "behind a delay": (lambda x: (1 + (x[:, :, 2:] - x[:, :, :-2]) / 100).cumprod(2), torch.float32),
}


@pytest.mark.parametrize(
    "options", [slow({}), slow({"frames_per_step": 4}), {"boundary": "exact"}], ids=["one", "four", "exact"]
)
@pytest.mark.parametrize("name", CASES)
def test_running_results_go_on_as_in_one_long_clip(name: str, options: dict[str, object]) -> None:
    compute, dtype = CASES[name]
    net = Graph(lambda m, x: compute(x)).eval()
    clips = torch.randint(0, 8, (1, 3, FRAMES), generator=torch.Generator().manual_seed(0)).to(dtype)
    compiled = co3d.compile(net, (clips[:, :, :12],), **options)  # type: ignore[arg-type]
    assert not compiled.info.recomputed
    session, (delay,) = co3d.StreamSession(compiled), compiled.info.delays.values()
    pulse = session.info.frames_per_step["inputs_0"]
    steps = [session.step(clips[:, :, j : j + pulse].numpy()) for j in range(0, FRAMES, pulse)]
    results = [step for step in steps if step is not None]
    streamed = np.concatenate([r.reshape(1, 3, -1) for r in results], 2)
    skipped = streamed.shape[2] - (FRAMES - delay)  # with exact ends what is not due yet is left out
    expected = net(clips).numpy()[:, :, : FRAMES - delay]
    np.testing.assert_allclose(streamed[:, :, skipped:], expected, rtol=1e-3 if "product" in name else 1e-5)


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "a whole clip": lambda x: x.sum(2),
    "all numbers": lambda x: x.sum((1, 2)),
    "channels": lambda x: x.sum(1),
    "what is true": lambda x: (x > 150).sum(2),
    "a few frames": lambda x: x.unfold(2, 5, 1).sum(-1),
    "true in a few frames": lambda x: (x > 150).unfold(2, 5, 1).sum(-1),
    "an average": lambda x: x.mean(2, dtype=torch.float32),
    "neighbours": lambda x: torch.stack([x[:, :, 1:], x[:, :, :-1]]).sum(0),
}


@pytest.mark.parametrize("name", SUMS)
def test_small_numbers_are_summed_up_as_large_ones(name: str) -> None:
    net = Graph(lambda m, x: SUMS[name](x).float()).eval()
    clip = torch.randint(100, 255, (1, 3, 12), dtype=torch.uint8)
    compiled = co3d.compile(net, (clip,))
    session, frames = co3d.StreamSession(compiled), [clip[:, :, i].numpy() for i in range(12)]
    last = [session.step(frame) for frame in frames][-1]
    expected = net(clip).numpy()
    np.testing.assert_allclose(last, expected if last.shape == expected.shape else expected[..., -1], rtol=1e-6)
    assert not compiled.info.recomputed


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_rounding_of_a_network_that_sums_in_half_precision_is_its_own(factor: float) -> None:
    """What is off by more than halves round is found all the same."""
    wrong = nn.Parameter(torch.tensor(1.0))
    net = Graph(lambda m, x: (m.a(x) * m.by).half().cumsum(2).float()).eval()
    net.a, net.by = nn.Conv1d(4, 4, 1), wrong
    clip = torch.randn(1, 4, 32)
    compiled = co3d.compile(net, (clip,))
    wrong.data *= factor
    found = co3d.verify(compiled, net, (clip,))
    assert found.passed == (factor == 1.0) and found.relative_error < (5e-3 if factor == 1.0 else 1.0)
