"""Steps of any number of frames, and dense strides: a result for each frame."""

from __future__ import annotations

import pytest
import torch
from oracle import check
from small_graphs import conv, entry, fn, of, up
from torch import nn
from zoo import Entry, Graph, Reference, Window

import co3d_compile as co3d

DENSE = [
    entry("dense conv", of(conv(3, 1, 2, 1), nn.ReLU(), conv(3, 1, 1, 1))),
    entry("dense pools", of(nn.MaxPool1d(3, 2, 1), conv(3, 1, 2, 1), nn.AvgPool1d(2))),
    entry("dense shortcut", fn(lambda m, x: m.short(x) + m.conv(x), conv=lambda: conv(3, 1, 2, 1),
                               short=lambda: conv(1, 1, 2))),
    entry("dense crop", fn(lambda m, x: m.b(m.a(x)[:, :, 1:]), a=lambda: conv(3, 1, 2, 1), b=conv)),
    entry("dense window", fn(lambda m, x: m.conv(x).mean(2), conv=lambda: conv(3, 1, 2, 1)), expect="window",
          reference=lambda m: Reference(m.conv, (Window(lambda y: y.mean(2)),))),
]  # fmt: skip


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.parametrize("pulse", [1, 5])
def test_dense_strides_equal_every_phase(case: Entry, pulse: int) -> None:
    check(case, options={"stride_mode": "dense", "frames_per_step": pulse})


PULSES = [(entry("stride 1", of(conv(3, 1, 1, 1), nn.ReLU(), conv(5, 2, 1, 4))), (1, 2, 3, 8)),
          (entry("stride 4", of(conv(3, 1, 2, 1), nn.ReLU(), conv(3, 1, 2, 1))), (4, 8, 12)),
          (entry("strided slice", fn(lambda m, x: m.conv(x[:, :, 1::2]), conv=conv)), (2, 4, 6)),
          (entry("up and down", of(conv(4, 1, 2, 1), up(4, 2, 1))), (2, 4, 6))]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "pulse"),
    [pytest.param(case, pulse, id=f"{case.name}-{pulse}".replace(" ", "-")) for case, n in PULSES for pulse in n],
)
def test_any_pulse(case: Entry, pulse: int) -> None:
    assert check(case, options={"frames_per_step": pulse}, batch=2).frames_per_step == (pulse,)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (nn.Upsample(scale_factor=2), [(1, 2, 8)]),
        (nn.ConvTranspose1d(2, 2, 2, stride=2), [(1, 2, 8)]),
        (nn.Sequential(nn.Conv1d(2, 2, 3, 2, 1), nn.ConvTranspose1d(2, 2, 3, 1, 1)), [(1, 2, 8)]),
        (Graph(lambda net, a, b: a.mean(2) + b.mean(2)), [(1, 2, 4), (1, 2, 8)]),
    ],
    ids=["nearest", "transposed", "transposed behind a stride", "two rates"],
)
def test_what_has_no_dense_form_is_refused(model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(co3d.Co3dError, match="no meaning"):
        co3d.compile(model, tuple(torch.zeros(s) for s in shapes), stride_mode="dense")
