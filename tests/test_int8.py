"""Convolutions in 8 bits: calibrated on a stream, near the untouched network, and a file like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from film import video
from torch import nn

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow

CLIP = torch.zeros(1, 3, 8, 24, 24)
RANDOM = np.random.default_rng(0)
FRAMES = [RANDOM.standard_normal((1, 3, 24, 24), dtype=np.float32) for _ in range(30)]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1), nn.AdaptiveAvgPool3d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)).eval()


def test_near_the_untouched_network() -> None:
    """It computes in 8 bits, is a little off and says so; the states stay as they were."""
    exact = co3d.compile(network(), (CLIP,))
    int8 = exact.to_int8(FRAMES)
    assert "QuantizeLinear" in {node.op_type for node in int8.model.graph}
    assert int8.info.states == exact.info.states and "8 bits" in int8.report().warnings[-1]
    found = verify(int8, network(), (CLIP,))
    assert found.passed and 1e-4 < found.relative_error < 0.5
    assert any("8 bits" in note for note in found.notes)
    assert not verify(int8, network(), (CLIP,), tolerance=1e-4).passed


def test_calibration_follows_the_stream() -> None:
    """States that calibration never saw filled would be cut off at what zeros need."""
    loud = [10 * frame for frame in FRAMES]
    int8 = co3d.compile(network(), (CLIP,)).to_int8(loud)
    exact, near = co3d.StreamSession(co3d.compile(network(), (CLIP,))), co3d.StreamSession(int8)
    pairs = [(exact.step(frame), near.step(frame)) for frame in loud]
    expected, found = (np.stack(side)[exact.info.warmup_steps :] for side in zip(*pairs, strict=True))
    assert np.abs(expected - found).max() < 0.5 * expected.std()


@pytest.mark.parametrize(
    ("options", "frames", "said"),
    [
        ({}, FRAMES[:5], "needs 11 to warm up"),
        ({"boundary": "exact"}, FRAMES, "boundary"),
        ({}, [np.zeros((1, 3, 9, 9), np.float32)], "shape"),
    ],
)
def test_what_cannot_be_quantised(options: dict[str, str], frames: list[np.ndarray], said: str) -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1)) if options else network()
    compiled = co3d.compile(model.eval(), (CLIP,), **options)  # type: ignore[arg-type]
    with pytest.raises(co3d.Co3dError, match=said):
        compiled.to_int8(frames)


def test_on_the_command_line(tmp_path: Path) -> None:
    model, calibrate, out = tmp_path / "m.pt2", tmp_path / "calibrate.mp4", tmp_path / "m.onnx"
    torch.export.save(torch.export.export(network(), (CLIP,)), model)
    video(calibrate)
    words = [str(model), "-o", str(out), "--int8", "--calibrate", str(calibrate), "--size", "24", "--json"]
    done = CliRunner().invoke(compile_command, words)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert 1e-5 < result["verification"]["relative_error"] < 1
    alone = CliRunner().invoke(compile_command, [str(model), "-o", str(out), "--int8"])
    assert alone.exit_code == 2
