"""What is part of a window as the network has it: padding over time, strides without a common step, entries that meet
those of other frames, pieces of a clip each of which a layer with a state starts anew."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from marks import few
from torch import Tensor, nn
from torch.nn import functional as F

import co3d_compile as co3d

CLIP, CHANNELS = 8, 3


class Layers(nn.Module):
    """A few layers, and what joins them; x is (N, C, T)."""

    def __init__(self, forward: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self._forward = forward
        self.linear = nn.Linear(CHANNELS * (CLIP + 2), 4)
        self.kernel = nn.Parameter(torch.randn(CHANNELS, CLIP))
        self.gru, self.cell = nn.GRU(CHANNELS, 5, batch_first=True), nn.GRUCell(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        """What the function computes."""
        return self._forward(self, x)


def long_convolution(m: Layers, x: Tensor) -> Tensor:
    """A kernel as long as the clip, by Fourier transforms of twice its length: nothing wraps around."""
    product = torch.fft.rfft(x, n=2 * CLIP) * torch.fft.rfft(m.kernel, n=2 * CLIP)
    return torch.fft.irfft(product, n=2 * CLIP)[..., :CLIP]


def zeros_in_front(m: Layers, x: Tensor) -> Tensor:
    return m.linear(F.pad(x, (2, 0)).flatten(1))


def zeros_joined(m: Layers, x: Tensor) -> Tensor:
    return m.linear(torch.cat([x, x.new_zeros(x.shape[0], CHANNELS, 2)], 2).flatten(1))


def first_again(m: Layers, x: Tensor) -> Tensor:
    return m.linear(F.pad(x, (2, 0), mode="replicate").flatten(1))


def reflected(m: Layers, x: Tensor) -> Tensor:
    return m.linear(F.pad(x, (1, 1), mode="reflect").flatten(1))


def attention(m: Layers, x: Tensor) -> Tensor:
    tokens = F.pad(x, (1, 0)).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, -1]


def sorted_frames(m: Layers, x: Tensor) -> Tensor:
    return F.pad(x, (0, 3)).sort(2)[0]


def _slower(x: Tensor) -> Tensor:
    """The first half of the clip, each frame twice."""
    return x.repeat_interleave(2, 2)[:, :, :CLIP]


def slower_added(m: Layers, x: Tensor) -> Tensor:
    return _slower(x) + x


def slower_beside(m: Layers, x: Tensor) -> Tensor:
    return torch.cat([_slower(x), x], 1)


def slower_asks(m: Layers, x: Tensor) -> Tensor:
    q, k = (y.transpose(1, 2).unsqueeze(2) for y in (_slower(x), x))
    return F.scaled_dot_product_attention(q, k, k).squeeze(2)


def halves_added(m: Layers, x: Tensor) -> Tensor:
    return x + x.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)


def states_of_pieces(m: Layers, x: Tensor) -> Tensor:
    """Each piece of two frames starts anew."""
    return torch.stack([m.gru(piece)[1][-1] for piece in x.transpose(1, 2).split(2, 1)], 1)


def states_of_pieces_that_overlap(m: Layers, x: Tensor) -> Tensor:
    """Each piece starts anew, though one is nearly the next one."""
    return torch.stack([m.gru(x[:, :, i : i + CLIP - 3].transpose(1, 2))[1][-1] for i in (0, 1, 3)], 1)


def sums_of_pieces(m: Layers, x: Tensor) -> Tensor:
    """A running sum starts anew with each piece."""
    return torch.cat([piece.cumsum(2) for piece in x.split(4, 2)], 2)


def loops_over_pieces(m: Layers, x: Tensor) -> Tensor:
    """The same with a cell, in pieces of four frames."""
    states = [x.new_zeros(len(x), 5) for _ in range(2)]
    for i in range(2):
        for t in range(4):
            states[i] = m.cell(x[:, :, 4 * i + t], states[i])
    return torch.stack(states, 1)


@pytest.mark.parametrize(
    "forward",
    few(
        [
            *(long_convolution, zeros_in_front, zeros_joined, first_again, reflected, attention, sorted_frames),
            *(slower_added, slower_beside, slower_asks, halves_added, states_of_pieces, loops_over_pieces),
            *(states_of_pieces_that_overlap, sums_of_pieces),
        ],
        *(
            zeros_in_front,
            attention,
            slower_added,
            slower_asks,
            states_of_pieces,
            states_of_pieces_that_overlap,
            sums_of_pieces,
        ),
    ),
    ids=lambda f: f.__name__,
)
def test_a_window_is_what_the_network_has_of_it(forward: Callable[[Layers, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, x = Layers(forward).eval(), torch.randn(1, CHANNELS, 3 * CLIP)
    compiled = co3d.compile(net, torch.randn(1, CHANNELS, CLIP))
    assert compiled.info.receptive_field == CLIP and compiled.report().recomputed
    session = co3d.StreamSession(compiled, threads=1)
    (pulse,) = compiled.info.frames_per_step.values()
    results = [session.step(frames.squeeze(2).numpy()) for frames in x.split(pulse, 2)]
    ends = range(CLIP, 3 * CLIP + 1, pulse)
    with torch.inference_mode():
        wanted = [net(x[:, :, end - CLIP : end]).numpy() for end in ends]
    found = np.reshape(results[-len(wanted) :], np.shape(wanted))
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-4, atol=1e-5)


def test_a_convolution_behind_the_same_padding_slides() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv1d(CHANNELS, 2, 3), nn.Linear(CHANNELS * (CLIP + 2), 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            padded = F.pad(x, (2, 0))
            return self.conv(padded), self.linear(padded.flatten(1))

    compiled = co3d.compile(Both().eval(), torch.randn(1, CHANNELS, CLIP))
    assert [r["operator"] for r in compiled.report().recomputed] == ["aten.linear"]


class Pyramid(nn.Module):
    """Pools over several lengths of time, resampled to one: a temporal pyramid."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.mix, self.lengths = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 1, 1), lengths

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features beside those of each length."""
        y = self.conv(x)
        parts = [self.mix(F.max_pool1d(y, k)) for k in self.lengths]
        return torch.cat([y, *(F.interpolate(p, size=y.shape[2], mode="linear", align_corners=True) for p in parts)], 1)


@pytest.mark.parametrize(
    ("lengths", "frames"), [((2, 3, 5, 7), 1), ((2, 4), 4)], ids=["no common step", "steps of four"]
)
def test_strides_without_a_common_step_are_part_of_the_window(lengths: tuple[int, ...], frames: int) -> None:
    """Whole entries of all four would come every 210 frames, and a clip has 24."""
    net, clip = Pyramid(lengths).eval(), torch.randn(1, 3, 24)
    compiled = co3d.compile(net, clip)
    assert list(compiled.info.frames_per_step.values()) == [frames]
    assert co3d.verify(compiled, net, clip).passed
