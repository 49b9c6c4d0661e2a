"""The examples run, and say what their pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *args: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_many_cameras(tmp_path: Path) -> None:
    assert "the same answers together and one by one" in run(
        "many_cameras.py", "--out", str(tmp_path), "--frames", "20"
    )


def test_dense_labels(tmp_path: Path) -> None:
    assert "50 labels" in run("dense_labels.py", "--out", str(tmp_path), "--frames", "50")


@pytest.mark.slow
def test_train_and_stream(tmp_path: Path) -> None:
    """After a short training all ways of running the network do better than guessing among four."""
    run("train_and_stream.py", "--out", str(tmp_path), "--steps", "200", "--frames", "800")
    shares = json.loads((tmp_path / "train_and_stream.json").read_text())
    assert len(shares) == 4 and min(shares.values()) > 0.4
    assert (tmp_path / "train_and_stream.png").read_bytes().startswith(b"\x89PNG")


def test_custom_operator() -> None:
    assert "delay 3 frames, receptive field 14, warm-up 13" in run("custom_operator.py")


@pytest.mark.slow
def test_custom_pass() -> None:
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


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, with a small network in place of the X3D-S."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    network = Small().eval()
    monkeypatch.setattr(demo, "make_network", lambda: network)
    monkeypatch.setattr(demo, "on_one_long_clip", lambda _, clip: network.on_one_long_clip(clip))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--frames", "100"])
    demo.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "86 frames after the warm-up, 400 probabilities each: largest difference" in said
    assert "times faster per frame" in said and {"x3d_s.onnx", "moving_shapes.mp4"} <= set(os.listdir(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--frames", "10"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--frames must be at least 100" in capsys.readouterr().err
