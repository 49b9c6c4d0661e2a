"""What is said of a file, and what it keeps, where the numbers alone would be right either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_graphs import conv, fn
from test_bisection import difference, perturb
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d


def _heads(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return y.sort(2).values[:, :, -1], m.b(y * torch.sigmoid(y.mean(2, True)))


def test_a_window_in_front_of_a_gate_is_said() -> None:
    """That there is a gate is found out behind the window, and the network is looked through again."""
    module = fn(_heads, a=lambda: conv(padding=1), b=lambda: conv(padding=1))().eval()
    clip = (torch.randn(1, 4, 8),)
    assert [row["operator"] for row in co3d.compile(module, clip).report().recomputed] == ["aten.sort"]
    with pytest.raises(co3d.UnsupportedError, match=r"aten\.sort"):
        co3d.compile(module, clip, unsupported="error")


def test_operators_are_counted() -> None:
    actions = co3d.compile(nn.Sequential(conv(), nn.ReLU(), conv(), conv()), (torch.randn(1, 4, 12),)).report().actions
    assert actions == [{"operator": "aten.conv1d", "count": 3, "action": "continual"}]


def test_the_mean_of_flattened_features_keeps_one_number_of_each_frame() -> None:
    layers = {"conv": lambda: nn.Conv3d(3, 4, 3, padding=1), "head": lambda: nn.Linear(4, 2)}
    module = fn(lambda m, x: m.head(m.conv(x).flatten(2).mean(2)), **layers)().eval()
    states = co3d.compile(module, (torch.randn(1, 3, 8, 6, 6),)).info.states
    assert [s.shape for s in states] == [("N", 3, 6, 6), ("N", 3, 6, 6), ("N", 7, 4)]


def test_a_gate_whose_weight_begins_with_zero_is_a_gate() -> None:
    """As in CTR-GCN, whose adaptive graph is multiplied by a zero that is learned; large numbers saturate its tanh."""
    model = Graph(lambda m, x: x * (1 + m.scale(torch.tanh(50 * x.mean(2, True)))), scale=nn.Conv1d(4, 4, 1, groups=4))
    nn.init.zeros_(model.scale.weight)
    clip = torch.randn(1, 4, 8)
    compiled = co3d.compile(model.eval(), clip)
    assert not compiled.info.recomputed and len(compiled.report().gates) == 1
    assert co3d.verify(compiled, model, clip).passed


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["x"], ["x_out"]),
        (["y", "x"], ["y", "x_out"]),
        (["x", "x_out"], ["x_out1", "x_out"]),
        (["valid"], ["valid"]),
    ],
)
def test_outputs_have_names_of_their_own(keys: list[str], names: list[str]) -> None:
    """A network gives a dict in which a key is the name of an input, or that of the flags of a stream with ends."""

    class Named(nn.Conv1d):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {key: super(Named, self).forward(x) for key in keys}

    model = Named(4, 4, 3, padding=1).eval()
    compiled = co3d.compile(model, torch.randn(1, 4, 8), boundary="exact")
    assert [o.name for o in compiled.info.outputs] == names
    assert co3d.verify(compiled, model, torch.randn(1, 4, 8)).passed


def test_a_head_over_nine_places_is_on_the_window_that_is_said() -> None:
    layers = (
        nn.Conv3d(3, 4, 3, padding=1),
        nn.AdaptiveAvgPool3d((1, 3, 3)),
        nn.Conv3d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    module, clip = nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 6, 6)
    compiled = co3d.compile(module, (clip,))
    assert compiled.info.window == 8
    assert [n.op_type for n in compiled.model.graph].count("Conv") == 2
    assert all(len(v.shape) <= 4 for n in compiled.model.graph for v in n.outputs if v.shape is not None)
    assert co3d.verify(compiled, module, (clip,)).passed


def test_a_recurrent_layer_costs_its_weights_at_each_frame() -> None:
    report = co3d.compile(nn.LSTM(4, 3, batch_first=True), (torch.randn(1, 8, 4),), time_dim=1).report()
    assert report.gmac_step == pytest.approx(4 * 3 * (4 + 3) / 1e9)
    assert report.gmac_clip == pytest.approx(8 * 4 * 3 * (4 + 3) / 1e9)


def test_the_operator_whose_weights_were_changed_is_named(tmp_path: Path) -> None:
    module = fn(lambda m, x: x + m.b(m.a(x).relu()), a=lambda: conv(padding=1), b=lambda: conv(padding=1))().eval()
    clip = (torch.randn(1, 4, 16),)
    path = tmp_path / "model.onnx"
    co3d.compile(module, clip).save(path)
    perturb(path, "b/")
    what = difference(path, module, clip)
    assert (what.operator, what.module_path) == ("aten.conv1d", "b")


def _every_kind(m: Any, x: Tensor) -> Any:
    low = m.down(F.pad(m.a(x), (2, 0))[:, :, :-2])
    y = m.up(low) + x
    y = y * y.mean(2, True).sigmoid()
    kept = m.lstm(y.mT)[0].mT
    return kept[:, :, -1], m.b(y)[:, :, 3], y.softmax(2)


# Operator, what was done, how many entries its operands wait, the frames that it reads, its delay, multiply-adds and
# bytes of state in a step, values in the file.
SURVEY = [
    ("input", "", (), 0, 0, 0, 0, 0, 0),
    ("aten.conv1d", "continual", (0,), -1, 1, 1, 96, 32, 2),
    ("aten.constant_pad_nd", "", (0,), -3, -1, -1, 0, 0, 2),
    ("aten.slice", "", (0,), -3, -1, -1, 0, 0, 2),
    ("aten.conv1d", "continual", (0,), -4, 0, 0, 48, 16, 1),
    ("aten.upsample_linear1d", "", (0,), -6, 1, 1, 0, 16, 2),
    ("aten.add", "operand delayed by 1", (0, 1), -6, 1, 1, 0, 8, 2),
    ("aten.mean", "gate over one frame", (0,), -6, 1, 1, 0, 0, 2),
    ("aten.sigmoid", "", (0,), -6, 1, 1, 0, 0, 2),
    ("aten.mul", "", (0, 0), -6, 1, 1, 0, 0, 2),
    ("aten.transpose", "", (0,), -6, 1, 1, 0, 0, 2),
    ("aten.lstm", "carries its state", (0,), None, None, 1, 256, 40, 0),
    ("getitem", "", (0,), None, None, 1, 0, 0, 2),
    ("aten.transpose", "", (0,), None, None, 1, 0, 0, 2),
    ("aten.select", "", (0,), None, None, 1, 0, 0, 2),
    ("aten.conv1d", "continual", (0,), -6, 5, 5, 48, 224, 0),
    ("aten.select", "", (0,), -6, 5, 5, 0, 0, 0),
    ("aten.softmax", "on a window", (0,), -21, 1, 1, 0, 0, 1),
]


def test_what_each_operator_has_seen_and_where_its_entries_are() -> None:
    layers = {
        "a": lambda: conv(padding=1), "b": lambda: conv(3, 2), "down": lambda: conv(3, 1, 2, 1),
        "up": lambda: nn.Upsample(scale_factor=2.0, mode="linear"), "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    }  # fmt: skip
    rows = co3d.compile(fn(_every_kind, **layers)().eval(), (torch.randn(1, 4, 16),)).program.notes.survey
    assert [
        (r.operator, r.done, r.held, r.first, r.last, r.delay, r.macs_step, r.state_bytes, len(r.values)) for r in rows
    ] == SURVEY
    assert [r.field for r in rows] == [None if r[3] is None else r[4] - r[3] + 1 for r in SURVEY]


@pytest.mark.parametrize(("frames_per_step", "past"), [(1, (13, 11)), (2, (12, 10))])
def test_all_readers_of_a_tensor_share_one_queue(frames_per_step: int, past: tuple[int, int]) -> None:
    """A convolution, and a window; that of the input waits for the other one, which is two entries later."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.b(y), y.mean(2) + x.mean(2)

    module = fn(forward, a=lambda: conv(5, padding=2), b=lambda: conv(5))().eval()
    info = co3d.compile(module, (torch.randn(1, 4, 12),), frames_per_step=frames_per_step).info
    assert [(s.input, s.shape) for s in info.states] == [
        ("state.a.0", ("N", past[0], 4)),
        ("state.b.0", ("N", past[1], 4)),
    ]


def test_a_region_and_a_convolution_share_one_queue() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        near = (torch.arange(x.shape[2])[:, None] - torch.arange(x.shape[2])).abs() < 3
        return (x[:, :, :, None] * near).median(2).values + m.conv(x)  # type: ignore[no-any-return]

    module = fn(forward, conv=lambda: conv(5, padding=2))().eval()
    states = co3d.compile(module, (torch.randn(1, 4, 12),)).info.states
    assert sorted(s.shape for s in states) == [("N", 4, 4), ("N", 10, 4)]


def test_a_head_behind_a_stride_takes_streams_of_any_length() -> None:
    module = nn.Sequential(conv(stride=2, padding=1), nn.Flatten(), nn.Linear(16, 3)).eval()
    assert co3d.compile(module, (torch.randn(1, 4, 8),), boundary="exact").info.length_multiple == 1


@pytest.mark.parametrize(
    ("operator", "forward"),
    [
        ("aten.flip", lambda m, x: m.a(x) - m.a(x).flip(0).sum(0)),
        ("aten.softmax", lambda m, x: m.a(x).softmax(0)),
        ("aten.cumsum", lambda m, x: m.a(x).cumsum(0)),
    ],
)
def test_what_computes_over_several_streams_is_named(operator: str, forward: Any) -> None:
    module = fn(forward, a=lambda: conv(padding=1))().eval()
    said = (
        f"The model fixes its batch at 1 ({operator} in the model computes over several streams): run it with batch=1."
    )
    assert co3d.compile(module, (torch.randn(1, 4, 8),)).report().warnings == [said]


def test_what_counts_the_frames_of_a_stream_costs_at_the_last_operator() -> None:
    module = nn.Sequential(conv(padding=1), nn.ReLU(), conv(padding=1), nn.Tanh()).eval()
    rows = co3d.compile(module, (torch.randn(1, 4, 8),), boundary="exact").program.notes.survey
    assert [row.state_bytes for row in rows] == [0, 32, 0, 32, 16]
