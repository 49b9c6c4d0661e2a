"""The first frame of a stream, which each later one is compared with: a state, exact from the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow
from torch import Tensor, nn

import co3d_compile as co3d

CLIP, FRAMES = 8, 20


class Network(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.key, self.joined = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 4)
        self.cell, self.conv = nn.GRUCell(4, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def difference_of_features(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return m.key(torch.relu(y - y[:, :1]))


def difference_behind_a_convolution(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x.transpose(1, 2))
    return (y - y[:, :, :1]).transpose(1, 2)


def joined_to_each_frame(m: Any, x: Tensor) -> Tensor:
    return m.joined(torch.cat([x, m.key(x[:, :1]).expand_as(x)], -1))


def template(m: Any, x: Tensor) -> Tensor:
    return m.key((m.key(x[:, 0])[:, None] * m.linear(x)).softmax(-1))


def loop_without_a_state(m: Any, x: Tensor) -> Tensor:
    first = m.key(x[:, 0])
    frames = [m.joined(torch.cat([m.linear(frame), first], 1)) for frame in x.unbind(1)]
    return torch.stack(frames, 1)


def loop_with_a_state(m: Any, x: Tensor) -> Tensor:
    first, h, out = m.key(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t] * first, h)
        out.append(h)
    return torch.stack(out, 1)


def loop_from_the_second_frame_on(m: Any, x: Tensor) -> Tensor:
    h = first = m.key(x[:, 0])
    out = []
    for t in range(1, x.shape[1]):
        h = m.cell(x[:, t] * first, h)
        out.append(h)
    return torch.stack(out, 1)


KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "difference": lambda m, x: x - x[:, :1],
    "difference to a selected one": lambda m, x: m.linear(x - x[:, 0][:, None]),
    "difference of features": difference_of_features,
    "difference behind a convolution": difference_behind_a_convolution,
    "joined to each frame": joined_to_each_frame,
    "template": template,
    "nothing else": lambda m, x: m.key(x[:, :1]).expand(-1, x.shape[1], -1),
    "loop without a state": loop_without_a_state,
    "loop with a state": loop_with_a_state,
    "loop from the second frame on": loop_from_the_second_frame_on,
}
OFTEN = ("difference", "template")


@pytest.mark.parametrize("pulse", [1, slow(2)])
@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("name", [name if name in OFTEN else slow(name) for name in KEPT])
def test_the_first_frame_is_a_state(name: str, boundary: str, pulse: int) -> None:
    net, x = Network(KEPT[name]).eval(), torch.randn(2, FRAMES, 4)
    clip = torch.randn(1, CLIP, 4)
    compiled = co3d.compile(net, clip, time_dim=1, boundary=boundary, frames_per_step=pulse)
    assert not compiled.report().recomputed and compiled.info.receptive_field is None
    assert co3d.verify(compiled, net, clip).passed
    session = co3d.StreamSession(compiled, batch=2, threads=1)
    (delay,) = session.info.delays.values()
    steps = [session.step(x[:, t : t + pulse].numpy()) for t in range(0, FRAMES, pulse)]
    got = (np.stack(steps, 1) if pulse == 1 else np.concatenate(steps, 1))[:, delay:]
    with torch.no_grad():
        expected = net(x).numpy()[:, : got.shape[1]]
    interior = slice(1, -1)  # padding is outside of a stream
    np.testing.assert_allclose(got[:, interior], expected[:, interior], atol=1e-5)


@pytest.mark.parametrize("name", ["difference", slow("loop with a state")])
def test_with_windows_it_is_that_of_each_window(name: str) -> None:
    net, x = Network(KEPT[name]).eval(), torch.randn(1, FRAMES, 4)
    compiled = co3d.compile(net, torch.randn(1, CLIP, 4), time_dim=1, recurrence="window")
    assert compiled.report().recomputed and compiled.info.receptive_field == CLIP
    session = co3d.StreamSession(compiled, threads=1)
    for t in range(FRAMES):
        got = session.step(x[:, t].numpy())
    with torch.no_grad():
        np.testing.assert_allclose(got, net(x[:, -CLIP:]).numpy(), atol=1e-5)


# None of them is the first entry of a stream: of a longer clip it would be another one.
OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the middle": lambda m, x: x - x[:, x.shape[1] // 2][:, None],
    "the last": lambda m, x: x - x[:, -1:],
    "the first of the last four": lambda m, x: x - x[:, -4:-3],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_frames_are_those_of_the_window(name: str) -> None:
    net, clip = Network(OTHERS[name]).eval(), torch.randn(1, CLIP, 4)
    compiled = co3d.compile(net, clip, time_dim=1)
    assert compiled.report().recomputed and compiled.info.receptive_field == CLIP
    assert co3d.verify(compiled, net, clip).passed


@pytest.mark.parametrize("name", ["difference of features", "difference behind a convolution"])
def test_a_head_over_a_longer_window_reads_differences_to_the_first(name: str) -> None:
    net, x = Network(lambda m, x: KEPT[name](m, x).mean(1)).eval(), torch.randn(1, FRAMES, 4)
    compiled = co3d.compile(net, torch.randn(1, CLIP, 4), time_dim=1, window=12)
    assert co3d.verify(compiled, net, torch.randn(1, CLIP, 4)).passed
    session = co3d.StreamSession(compiled, threads=1)
    for t in range(FRAMES):
        got = session.step(x[:, t].numpy())
    late = 1 if "convolution" in name else 0
    with torch.no_grad():
        every = KEPT[name](net, x)[:, : FRAMES - late]
    np.testing.assert_allclose(got, every[:, -12:].mean(1).numpy(), atol=1e-5)


def test_with_dense_strides_it_is_that_of_each_window() -> None:
    net = Network(lambda m, x: (y := m.linear(x).transpose(1, 2)[:, :, ::2]) - y[:, :, :1]).eval()
    clip = torch.randn(1, CLIP, 4)
    compiled = co3d.compile(net, clip, time_dim=1, stride_mode="dense")
    assert compiled.report().recomputed and co3d.verify(compiled, net, clip).passed
