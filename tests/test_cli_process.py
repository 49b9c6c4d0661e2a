"""The command in a process of its own: stopped by signals, with a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from marks import long
from model_files import files, save_export, use_folder
from test_cli import REPORT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


STALL = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import co3d_compile as co3d

when = sys.argv[1]

def stall(*_, **__):
    print("here", file=sys.__stderr__, flush=True)
    time.sleep(60)

def save(path):
    path.write_bytes(b"half")
    if when == "write":
        stall()

def compile(*_, progress, **__):
    if when == "compile":
        stall()
    return SimpleNamespace(save=save)

co3d.compile = compile
from co3d_compile.cli.compile import main
sys.argv = ["co3d-compile", "m.bin", "-o", "out.onnx"]
main()
"""


BAR = f"""
import sys, time
from types import SimpleNamespace
import co3d_compile as co3d

def compile(*_, progress, **__):
    for done in range(3):
        progress("capture", done, 3)
        time.sleep(0.2)
    print("a library prints")
    return SimpleNamespace(
        save=lambda path: path.write_bytes(b"onnx"), report=lambda: SimpleNamespace(to_dict=lambda: {REPORT!r})
    )

co3d.compile = compile
from co3d_compile.cli.compile import main
sys.argv = ["co3d-compile", "m.bin", "-o", "out.onnx", "--no-verify", "--json"]
main()
"""


WHEN = {
    "ctrl-c at compile": ("compile", signal.SIGINT),
    "term at write": ("write", signal.SIGTERM),
    "term at compile": long("compile", signal.SIGTERM),
    "ctrl-c at write": long("write", signal.SIGINT),
}


@pytest.mark.slow
@pytest.mark.parametrize(("when", "number"), WHEN.values(), ids=WHEN)
def test_stopped(when: str, number: signal.Signals) -> None:
    save_export()
    process = subprocess.Popen([sys.executable, "-c", STALL, when], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    if when == "write":
        assert len(files()) == 2
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(120) == 128 + number
    assert rest == f"stopped by {number.name}; nothing was written\n"
    assert files() == {"m.bin"}


@pytest.mark.slow
def test_a_bar_on_a_terminal() -> None:
    """In a process of its own, with a terminal for stderr: the bar comes and goes, stdout holds only the report."""
    save_export()
    read, write_end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", BAR], stdout=subprocess.PIPE, stderr=write_end, text=True)
    os.close(write_end)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(read, 4096):
            shown += chunk.decode(errors="replace")
    stdout = process.communicate(timeout=300)[0]
    assert process.returncode == 0, shown
    assert json.loads(stdout)["output"] == "out.onnx"
    assert "capture" in shown and "a library prints" not in shown
