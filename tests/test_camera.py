"""A camera by its number: FFmpeg opens a V4L2 device that ``camera.c`` stands in for."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from film import compiled

from co3d_compile.media.video import read_frames

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"),
]


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which there is a /dev/video7."""
    library = tmp_path_factory.mktemp("camera") / "camera.so"
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-o", str(library), str(HERE / "camera.c"), "-ldl"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    path.write_bytes(compiled(preprocess={"size": 16}, labels=["bright", "dark"]))
    return path


def command(model: Path, source: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "co3d_compile.cli.main", "run", str(model), "--source", source, *more]


@pytest.mark.parametrize("source", ["7", "/dev/video7"])
def test_a_camera_that_is_unplugged(source: str, camera: dict[str, str], model: Path, tmp_path: Path) -> None:
    """All its frames are answered, and the files are whole."""
    call = command(model, source, "--csv", "out.csv", "--save", "out.mp4")
    done = subprocess.run(call, cwd=tmp_path, env={**camera, "CAMERA_FRAMES": "60"}, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    name = f"camera {source}" if source.isdigit() else source
    assert f"error: {name} broke off: No such device" in done.stderr and "Traceback" not in done.stderr
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        seconds = [float(row["time"]) for row in csv.DictReader(file)]
    assert len(seconds) > 20 and seconds == sorted(seconds)
    assert len(list(read_frames(tmp_path / "out.mp4"))) >= len(seconds)


def test_a_camera_that_is_plugged_in_again(camera: dict[str, str], model: Path, tmp_path: Path) -> None:
    """The states are kept: it was away for less than an answer sees."""
    call = command(model, "7", "--reconnect", "20", "--frames", "100", "--fps", "2", "--json")
    done = subprocess.run(call, cwd=tmp_path, env={**camera, "CAMERA_FRAMES": "60"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost, back = done.stderr.splitlines()
    assert "camera 7 was lost: No such device; trying again for 20 seconds" in lost
    assert (
        "back after 0." in back and "the states are kept" in back and "frames that an answer sees are missing" in back
    )
    said = json.loads(done.stdout)
    assert (said["frames"], said["returns"]) == (100, 1) and 0 < said["seconds_away"] < 1


def test_ctrl_c_ends_a_camera(camera: dict[str, str], model: Path, tmp_path: Path) -> None:
    call = command(model, "7", "--csv", "out.csv", "--jsonl", "-")
    process = subprocess.Popen(
        call, cwd=tmp_path, env=camera, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline().startswith("{")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "what was written is complete up to there" in said, said
    assert len((tmp_path / "out.csv").read_text().splitlines()) > 20
