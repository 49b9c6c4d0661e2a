"""What a reader places results by: their delay, how many come per step, where time is in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_graphs import backwards, conv, fn
from torch import Tensor, nn

import co3d_compile as co3d

# What a reader places the results by: the delay, entries per step, frames per entry.
PLACES = [
    ("the last entry by a slice", lambda m, x: m.conv(x)[:, :, -1:].squeeze(2), (1, 1, 1.0)),
    ("an entry by a slice", lambda m, x: m.conv(x)[:, :, 3:4].flatten(1), (1, 1, 1.0)),
    ("the last of a slice", lambda m, x: m.conv(x)[:, :, 3:][:, :, -1], (1, 1, 1.0)),
    ("the last of a strided slice", lambda m, x: m.conv(x)[:, :, 1::2][:, :, -1], (1, 1, 2.0)),
    ("the last of more entries", lambda m, x: F.interpolate(m.conv(x)[:, :, 2:], scale_factor=2)[:, :, -1],
     (2, 1, 0.5)),
    ("the last of a strided convolution", lambda m, x: m.down(m.conv(x)[:, :, 2:])[:, :, -1], (1, 1, 2.0)),
    ("mean of a slice", lambda m, x: m.conv(x)[:, :, 3:].mean(2), (1, 1, 1.0)),
    ("mean of a slice, filled", lambda m, x: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2).mean(2),
     (0, 1, 1.0)),
    ("mean of a slice, padded", lambda m, x: F.pad(x[:, :, 1:], (1, 0)).mean(2), (0, 1, 1.0)),
    ("mean of a pad, cut", lambda m, x: F.pad(x, (1, 0))[:, :, 1:].mean(2), (0, 1, 1.0)),
    ("mean of a pad, cut again", lambda m, x: F.pad(x[:, :, 1:], (2, 0))[:, :, 2:].mean(2), (0, 1, 1.0)),
    ("mean of a slice, convolved", lambda m, x: m.conv(x[:, :, 1:]).mean(2), (1, 1, 1.0)),
    ("mean of a slice, padded and convolved", lambda m, x: m.valid(F.pad(x[:, :, 1:], (1, 1))).mean(2), (1, 1, 1.0)),
    ("mean of a slice, causal", lambda m, x: m.valid(F.pad(x[:, :, 1:], (2, 0))).mean(2), (0, 1, 1.0)),
    ("mean of a slice, filled and convolved", lambda m, x: m.conv(F.pad(x[:, :, 1:], (1, 0))).mean(2), (1, 1, 1.0)),
    ("heads of chunks", lambda m, x: torch.cat([y.mean(2) for y in m.conv(x).chunk(2, 2)], 1), (1, 1, 1.0)),
    ("frames of a split, side by side", lambda m, x: torch.stack([y.squeeze(2) for y in m.conv(x).split(1, 2)], 2),
     (1, 1, 1.0)),
    ("channels to time", lambda m, x: m.conv(x).unflatten(1, (2, 2)).transpose(2, 3).flatten(2), (2, 2, 0.5)),
    ("stacked in time", lambda m, x: torch.stack([x, m.conv(x), x], 3).flatten(2), (3, 3, 1 / 3)),
    ("each entry twice", lambda m, x: m.conv(x).repeat_interleave(2, 2), (2, 2, 0.5)),
    ("each entry twice, by a view", lambda m, x: m.conv(x)[..., None].expand(-1, -1, -1, 2).flatten(2), (2, 2, 0.5)),
    ("entries of a window", lambda m, x: m.conv(x).softmax(2), (1, 8, 1.0)),
    ("gates in pairs", lambda m, x: paired(m.conv(x)), (1, 1, 1.0)),
]  # fmt: skip


def paired(y: Tensor) -> Tensor:
    """Two gates side by side, as the parts of a complex number."""
    mean = F.adaptive_avg_pool1d(y, 1).view(*y.shape[:2], 1, 1)
    return (y[..., None] * torch.cat([mean.sigmoid(), mean.tanh()], 3)).sum(3)


@pytest.mark.parametrize(("name", "forward", "places"), PLACES, ids=[name for name, _, _ in PLACES])
def test_what_a_reader_places_results_by(name: str, forward: Any, places: tuple[int, int, float]) -> None:
    module = fn(forward, conv=lambda: conv(padding=1), down=lambda: conv(3, 1, 2, 1), valid=conv)().eval()
    (output,) = co3d.compile(module, (torch.randn(1, 4, 8),)).info.outputs
    assert (output.delay, output.entries_per_step, output.frames_per_entry) == pytest.approx(places)


# Where time is in what a window gives, also where an operator on it does not say so.
TIMES: list[tuple[str, Any, int | None]] = [
    ("softmax", lambda m, x: m.conv(x).softmax(2), 2),
    ("sorted", lambda m, x: m.conv(x).sort(2).values, 2),
    ("sorted, time in front of channels", lambda m, x: m.conv(x).sort(2).values.mT.relu(), 1),
    ("two of each channel, sorted", lambda m, x: m.conv(x).sort(2).indices.mT.reshape(x.shape[0], -1, 2, 2), 1),
    ("every pair of entries", lambda m, x: (y := m.conv(x)).mT @ y, 1),
    ("list of frames, from the last one on", lambda m, x: backwards(m.conv(x)), 1),
    ("mean of the largest", lambda m, x: m.conv(x).topk(3, 2).values.mean(2), None),
    ("three largest", lambda m, x: m.conv(x).topk(3, 2).values, None),
    (
        "the largest frames",
        lambda m, x: (y := m.conv(x)).gather(2, y.sum(1, True).topk(3, 2).indices.expand(-1, 4, -1)),
        None,
    ),
    ("some of all numbers", lambda m, x: m.conv(x).sort(2).values.flatten(1)[:, 3:19], None),
    ("scores of all entries", lambda m, x: m.fc(m.conv(x).flatten(1)), None),
]


@pytest.mark.parametrize(("name", "forward", "dim"), TIMES, ids=[name for name, _, _ in TIMES])
def test_where_time_is_in_what_a_window_gives(name: str, forward: Any, dim: int | None) -> None:
    module = fn(forward, conv=lambda: conv(padding=1), fc=lambda: nn.Linear(32, 8))().eval()
    (output,) = co3d.compile(module, (torch.randn(1, 4, 8),)).info.outputs
    assert (output.has_time, output.time_dim) == (dim is not None, dim)
    assert output.entries_per_step == (8 if dim is not None else 1)


@pytest.mark.parametrize(("window", "entries"), [(8, 3), (12, 5)])
def test_a_longer_window_gives_what_its_operators_leave_of_it(window: int, entries: int) -> None:
    module = fn(lambda m, x: m.pool(m.conv(x).softmax(2))[:, :, 1:], conv=lambda: conv(padding=1),
                pool=lambda: nn.MaxPool1d(3, 2, 1))().eval()  # fmt: skip
    compiled = co3d.compile(module, (torch.randn(1, 4, 8),), window=window)
    assert compiled.info.outputs[0].entries_per_step == entries
    clip = torch.randn(1, 4, window + 2)
    session = co3d.StreamSession(compiled)
    newest = [session.step(frame.numpy()) for frame in clip.unbind(2)][-1]
    wanted = module.pool(module.conv(clip)[:, :, 1:-1].softmax(2))[:, :, 1:].detach()
    torch.testing.assert_close(torch.from_numpy(newest), wanted, rtol=0, atol=1e-5)
