"""The examples run, and say what their pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
