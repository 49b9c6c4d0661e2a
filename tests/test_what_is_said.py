"""What is said of a file, and what it keeps, where the numbers alone would be right either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_graphs import conv, fn
from test_bisection import difference, perturb
from torch import Tensor, nn

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


def test_the_mean_of_flattened_features_keeps_one_number_of_each_frame() -> None:
    module = fn(lambda m, x: m.conv(x).flatten(2).mean(2), conv=lambda: nn.Conv3d(3, 4, 3, padding=1))().eval()
    states = co3d.compile(module, (torch.randn(1, 3, 8, 6, 6),)).info.states
    assert [s.shape for s in states] == [("N", 3, 6, 6), ("N", 3, 6, 6), ("N", 7, 4)]


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
