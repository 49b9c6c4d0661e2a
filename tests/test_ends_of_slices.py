"""Slices from the end of the clip, and frames by their number, with exact ends: of streams of one length, or of any."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import few
from small_graphs import conv
from torch import Tensor, nn

import co3d_compile as co3d

CLIP, LENGTHS = 8, (8, 6, 12)


class Cut(nn.Module):
    """A convolution over time, and what is cut out of its result."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lstm, self.cut = conv(padding=1), nn.LSTM(4, 4, batch_first=True), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(self.conv(x))


class Remembered(Cut):
    """The last state of a recurrent layer behind it."""

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.lstm(super().forward(x).transpose(1, 2))[1][0]
        return last[0]


ANY: dict[str, nn.Module] = {
    "both ends": Cut(lambda y: y[:, :, 1:-2]),
    "as long as another": Cut(lambda y: F.pad(y, (3, 0))[:, :, : y.shape[2]]),
    "a copy": Cut(lambda y: y[:, :, :-2].contiguous()),
    "a part of a split": Cut(lambda y: y.split([2, y.shape[2] - 2], 2)[1]),
    "a part of a split, copied": Cut(lambda y: F.relu(y.split([2, y.shape[2] - 2], 2)[1].contiguous())),
    "the last": Cut(lambda y: y[:, :, -1]),
    "the mean of the last": Cut(lambda y: y[:, :, -4:].mean(2)),
    "an edge": Cut(lambda y: torch.cat([y[:, :, :1], y], 2)),
    "the entry behind the edge": Cut(lambda y: torch.cat([y[:, :, 1:][:, :, 0].unsqueeze(2), y], 2)),
    "the edge of another place": Cut(lambda y: torch.cat([y[:, :, 1:2][:, 0].unsqueeze(1), y[:, 1].unsqueeze(1)], 2)),
    "an edge of parts": Cut(lambda y: torch.cat([torch.cat([y[:, 1:, 1:2], y[:, :1, :1]], 1), y], 2)),
    "beside the first": Cut(lambda y: y - y[:, :, :1]),
    "remembered": Remembered(lambda y: y[:, :, 2:]),
}
EDGES = "the entry behind the edge", "the edge of another place"
ALONE: dict[str, nn.Module] = {
    "the last, as a slice": Cut(lambda y: y[:, :, -1:]),
    "the last, as a list": Cut(lambda y: y[:, :, [-1]]),
    "the last two": Cut(lambda y: y[:, :, -2:]),
    "the last half": Cut(lambda y: y[:, :, y.shape[2] // 2 :]),
    "the first": Cut(lambda y: y[:, :, :1]),
    "the first four": Cut(lambda y: y[:, :, :4]),
    "in the middle": Cut(lambda y: y[:, :, 2:6]),
    "the last ones, remembered": Remembered(lambda y: y[:, :, -4:]),
}


def whole(compiled: co3d.CompiledModel, x: Tensor, like: Tensor) -> np.ndarray[Any, Any]:
    """The streamed and flushed result, as the network gives it."""
    session = co3d.StreamSession(compiled, threads=1)
    results = [session.step(frame.numpy()) for frame in x.unbind(2)] + session.flush()
    (output,) = session.info.outputs
    if not output.has_time:
        return np.asarray(results[-1])
    return np.stack(results[output.delay : output.delay + like.shape[2]], 2)


@pytest.mark.parametrize("name", few({**ANY, **ALONE}, "both ends", "the last two", "the last, as a list", *EDGES))
def test_slices(name: str) -> None:
    model = {**ANY, **ALONE}[name].eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = co3d.compile(model, (torch.zeros(1, 4, CLIP),), boundary="exact")
    said = [str(w.message) for w in caught if "as long as the clip alone" in str(w.message)]
    assert bool(said) == (name in ALONE), said
    assert co3d.verify(compiled, model, (torch.randn(1, 4, CLIP),)).passed
    for length in LENGTHS:
        x = torch.randn(1, 4, length)
        with torch.no_grad():
            expected = model(x)
        if name in ALONE and length != CLIP:
            with pytest.raises(co3d.SessionError, match=f"after {length} frames.* in streams of {CLIP} frames alone"):
                whole(compiled, x, expected)
        else:
            np.testing.assert_allclose(whole(compiled, x, expected), expected.numpy(), atol=1e-5)
