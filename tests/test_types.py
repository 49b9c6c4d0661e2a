"""What type checkers see of an installed package: a user's script under ``mypy --strict``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import numpy as np
import numpy.typing as npt

import co3d_compile as co3d
from co3d_compile.cli.main import main
from co3d_compile.passes import insert

session = co3d.StreamSession("model.onnx")
frame: npt.NDArray[np.float32] = np.zeros((1, 3, 8, 8), np.float32)
scores: npt.NDArray[np.float32] = session.step_one(frame)
by_name: dict[str, npt.NDArray[np.float32]] = session.run({"x": frame})
delays: dict[str, int] = session.info.delays
labels: list[str] = [best.label for p in co3d.predict("model.onnx", co3d.read_source("video.mp4")) for best in p.top(3)]
text: str = session.step_one(frame)  # wrong
session.run([frame])  # wrong
insert("no graph")  # wrong
main(1, 2) + 1
co3d.no_such_name  # wrong
"""
# What PyTorch and its family look like is not asked here, and would take a minute.
CONFIG = """\
[mypy]
[mypy-torch.*,onnx.*,onnx_ir.*,onnxscript.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_a_script_is_checked_against_the_package_as_it_is_installed(tmp_path: Path) -> None:
    """Right lines pass and wrong ones do not: modules that are not found would be Any, and everything right."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if "# wrong" in line}
    found = {int(number) for number in re.findall(r"^script\.py:(\d+): error", done.stdout, re.MULTILINE)}
    assert found == wrong, done.stdout + done.stderr
