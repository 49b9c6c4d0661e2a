"""Frames that are taken by their number: from either end, by lists, and of windows that are no clip."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import co3d_compile as co3d

CLIP, FRAMES = 10, 24


class Network(nn.Module):
    def __init__(self, taken: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head, self.taken = nn.Linear(4, 4), nn.Linear(4, 2), taken

    def forward(self, x: Tensor) -> Tensor:
        """Returns an answer about some of the frames (N, T, 4)."""
        result: Tensor = self.head(self.taken(torch.relu(self.linear(x))))
        return result


LISTS: dict[str, Callable[[Tensor], Tensor]] = {
    "the last three": lambda y: y[:, [-3, -2, -1]].mean(1),
    "the last one": lambda y: y[:, [-1]].squeeze(1),
    "two before it": lambda y: y[:, [-3, -2]].amax(1),
    "the last one of each clip": lambda y: y[torch.arange(len(y)), torch.full((len(y),), y.shape[1] - 1)],
    "the last one of each clip, channels first": lambda y: y.mT[torch.arange(len(y)), :, [-1] * len(y)],
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_counts_from_the_end_is_a_slice(name: str) -> None:
    net, x = Network(LISTS[name]).eval(), torch.randn(1, FRAMES, 4)
    compiled = co3d.compile(net, torch.randn(1, CLIP, 4), time_dim=1)
    assert not compiled.report().recomputed and compiled.info.inputs[0].shape[0] == "N"
    assert co3d.verify(compiled, net, torch.randn(1, CLIP, 4)).passed
    session = co3d.StreamSession(compiled, threads=1)
    for t in range(FRAMES):
        got = session.step(x[:, t].numpy())
    late = name == "two before it"  # the last frame is not read, and not waited for
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(got), net(torch.cat([x, x[:, :late]], 1)), atol=1e-5)


# What a window of another length has in the place of these frames is not said by a clip alone.
BY_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "four from the front": lambda y: y[:, 2:6].mean(1),
    "of a window's result": lambda y: y.softmax(1)[:, 2:6].mean(1),
    "the last three": lambda y: y[:, -3:].mean(1),
    "the last but two": lambda y: y[:, -3],
    "the second half": lambda y: y[:, y.shape[1] // 2 :].mean(1),
}
BY_EITHER_END: dict[str, Callable[[Tensor], Tensor]] = {
    "the first": lambda y: y[:, 0] + y[:, 3],
    "the last": lambda y: y[:, -1],
    "without two at each end": lambda y: y[:, 2:-2].mean(1),
    "all": lambda y: y.mean(1) + y[:, 0],
}


@pytest.mark.parametrize("name", BY_NUMBER)
def test_a_window_of_another_length_has_no_such_frames(name: str) -> None:
    with pytest.raises(co3d.UsageError, match=r"window=16 has no meaning.*Compile for a clip of that length"):
        co3d.compile(Network(BY_NUMBER[name]).eval(), torch.randn(1, CLIP, 4), time_dim=1, window=16)


def test_a_window_may_be_too_short_for_what_is_cut_off() -> None:
    net = Network(lambda y: y[:, 3:-3].mean(1)).eval()
    with pytest.raises(co3d.UsageError, match="window=6 is too short"):
        co3d.compile(net, torch.randn(1, CLIP, 4), time_dim=1, window=6)


@pytest.mark.parametrize("window", [6, 16])
@pytest.mark.parametrize("name", BY_EITHER_END)
def test_a_window_has_what_is_counted_from_its_ends(name: str, window: int) -> None:
    net, x = Network(BY_EITHER_END[name]).eval(), torch.randn(1, FRAMES, 4)
    session = co3d.StreamSession(co3d.compile(net, torch.randn(1, CLIP, 4), time_dim=1, window=window), threads=1)
    for t in range(FRAMES):
        got = session.step(x[:, t].numpy())
    behind = {"the first": window - 4, "without two at each end": 2}.get(name, 0)  # what is not read is not waited for
    clip = torch.cat([x, torch.zeros(1, behind, 4)], 1)[:, -window:]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(got), net(clip), atol=1e-5)
