"""Frames, or results of a loop over frames, joined with their neighbours one by one, as restoration networks do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow
from torch import Tensor, nn

import co3d_compile as co3d

Fuse = Callable[[Any, Sequence[Tensor]], Tensor]
CLIP, FRAMES = 9, 21


class Fusion(nn.Module):
    """Features of each frame, with a state or without, and a function of several of them."""

    def __init__(self, fuse: Fuse, remembers: bool) -> None:
        super().__init__()
        self.fuse, self.remembers = fuse, remembers
        self.features, self.state = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fused features of frames (N, 3, T, H, W), or one picture."""
        found: list[Tensor] = []
        for t in range(x.shape[2]):
            of_frame = self.features(x[:, :, t])
            if self.remembers and found:
                of_frame = of_frame + self.state(found[-1])
            found.append(torch.tanh(of_frame))
        return self.fuse(self, found)


def inner(m: Any, hs: Sequence[Tensor]) -> Tensor:
    return torch.stack([m.out(torch.cat(hs[t - 1 : t + 2], 1)) for t in range(1, len(hs) - 1)], 2)


def stacked(m: Any, hs: Sequence[Tensor]) -> Tensor:
    return torch.stack([m.out(torch.stack(hs[t : t + 3], 2).flatten(1, 2)) for t in range(len(hs) - 2)], 2)


def ends_again(m: Any, hs: Sequence[Tensor]) -> Tensor:
    last = len(hs) - 1
    joined = [torch.cat([hs[max(t - 1, 0)], hs[t], hs[min(t + 1, last)]], 1) for t in range(len(hs))]
    return torch.stack([m.out(j) for j in joined], 2)


def between_zeros(m: Any, hs: Sequence[Tensor]) -> Tensor:
    around = [torch.zeros_like(hs[0]), *hs, torch.zeros_like(hs[0])]
    return torch.stack([m.out(torch.cat(around[t - 1 : t + 2], 1)) for t in range(1, len(around) - 1)], 2)


def reflected(m: Any, hs: Sequence[Tensor]) -> Tensor:
    around = [hs[1], *hs, hs[-2]]
    return torch.stack([m.out(torch.cat(around[t - 1 : t + 2], 1)) for t in range(1, len(around) - 1)], 2)


def behind_zeros(m: Any, hs: Sequence[Tensor]) -> Tensor:
    none = hs[0].new_zeros(hs[0].shape)
    past = [none, none, *hs]
    return torch.stack([m.out(torch.cat(past[t : t + 3], 1)) for t in range(len(hs))], 2)


def twice(m: Any, hs: Sequence[Tensor]) -> Tensor:
    sums = [hs[t - 1] * hs[t] for t in range(1, len(hs))]
    return torch.stack([torch.maximum(sums[t - 1], sums[t]) for t in range(1, len(sums))], 2)


# What is computed; by how many frames an answer is behind; whether the ends of a clip can be had too.
CASES: list[tuple[Fuse, int, bool]] = [
    (inner, 2, True),
    (stacked, 2, True),
    (ends_again, 1, True),
    (between_zeros, 1, True),
    (reflected, 1, False),
    (behind_zeros, 0, True),
    (twice, 2, True),
]
QUICK = (inner, between_zeros)


@pytest.mark.parametrize(("remembers", "boundary"), [(True, "stream"), slow(False, "exact")], ids=["states", "frames"])
@pytest.mark.parametrize(
    ("fuse", "delay", "ends"),
    [case if case[0] in QUICK else slow(*case) for case in CASES],
    ids=[case[0].__name__ for case in CASES],
)
def test_neighbours_in_a_list_are_past_entries(
    fuse: Fuse, delay: int, ends: bool, remembers: bool, boundary: str
) -> None:
    torch.manual_seed(0)
    net = Fusion(fuse, remembers).eval()
    clip, x = torch.randn(1, 3, CLIP, 4, 4), torch.randn(1, 3, FRAMES, 4, 4)
    if boundary == "exact" and not ends:
        with pytest.raises(co3d.UnsupportedError, match="from inside the clip"):
            co3d.compile(net, clip, boundary=boundary)
        return
    compiled = co3d.compile(net, clip, boundary=boundary)
    assert not compiled.report().recomputed
    session = co3d.StreamSession(compiled, threads=1)
    results = [session.step(frame.numpy()) for frame in x.unbind(2)]
    results += session.flush() if boundary == "exact" else []
    with torch.inference_mode():
        wanted = net(x).numpy()
    (behind,) = session.info.delays.values()
    assert behind == delay or boundary == "exact"
    got = np.stack(results, 2)[:, :, behind:]
    inside = slice(0 if boundary == "exact" else 3, wanted.shape[2] if boundary == "exact" else FRAMES - 3)
    np.testing.assert_allclose(got[:, :, : wanted.shape[2]][:, :, inside], wanted[:, :, inside], rtol=1e-4, atol=1e-5)
    assert boundary == "exact" or co3d.verify(compiled, net, clip).passed


@pytest.mark.parametrize(
    "part",
    [lambda y: y[:, 8:20], lambda y: y[:, -24:][:, :12], lambda y: y[:, -24:].chunk(2, 1)[0]],
    ids=["one_slice", "a_slice_of_a_slice", "a_chunk_of_a_slice"],
)
def test_part_of_flattened_states_is_verified(part: Callable[[Tensor], Tensor]) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(part(self.gru(x)[0].flatten(1)))

    net, clip = Head().eval(), torch.randn(1, CLIP, 3)
    assert co3d.verify(co3d.compile(net, clip, time_dim=1), net, clip).passed
