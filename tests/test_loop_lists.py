"""Lists of the last frames' features: the steady turns stream, and the first ones, with shorter lists, are a start."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from loop_lists import LISTS
from marks import slow
from torch import nn

import co3d_compile as co3d
from co3d_compile.capture.loops import frames_at_once

CLIP, FRAMES = 8, 20
OFTEN = ("mean_of_a_list",)


def network(name: str) -> nn.Module:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cell = nn.Linear(4, 4), nn.GRUCell(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return LISTS[name](self, x)

    torch.manual_seed(0)
    return Lists().eval()


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("name", [name if name in OFTEN else slow(name) for name in LISTS])
def test_a_list_of_the_last_frames_streams(name: str, boundary: str) -> None:
    net, x = network(name), torch.randn(2, FRAMES, 4)
    compiled = co3d.compile(net, torch.randn(1, CLIP, 4), time_dim=1, boundary=boundary)
    report, session = compiled.report(), co3d.StreamSession(compiled, batch=2, threads=1)
    assert not report.recomputed and report.gmac_step < 0.4 * report.gmac_clip
    assert session.info.receptive_field == (None if "states" in name else 3)
    (delay,) = session.info.delays.values()
    got = np.stack([session.step(x[:, t].numpy()) for t in range(FRAMES)], 1)[:, delay:]
    first = 0 if boundary == "exact" else session.info.warmup_steps - delay
    with torch.no_grad():
        expected = net(x).numpy()[:, : got.shape[1]]
    np.testing.assert_allclose(got[:, first:], expected[:, first:], atol=1e-5)


@pytest.mark.slow
def test_first_turns_are_looked_for_once() -> None:
    """A loop that runs backwards is none; that its last turns are others must not be tried for each of them."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, out = x.new_zeros(x.shape[0], 4), []
            for frame in reversed(x.unbind(1)):
                h = self.cell(frame, h)
                out.append(h)
            return torch.stack(out[::-1], 1)

    with mock.patch.object(frames_at_once, "_rolled", wraps=frames_at_once._rolled) as tried:
        assert co3d.compile(Backwards().eval(), torch.randn(1, 32, 4), time_dim=1).report().recomputed
    assert tried.call_count <= 12
