"""The contract's readers in other languages: the numbers of Python's session, for every kind of state."""

from __future__ import annotations

import atexit
import ctypes.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo.small import SMALL

import co3d_compile as co3d

EXAMPLES = Path(__file__).parents[1] / "examples"
# Network, options, batch.
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "past entries": ("p3d", {}, 1),
    "states that only move": ("p3d", {"state_io": "renamed"}, 2),
    "flags and counters": ("p3d", {"boundary": "exact"}, 1),
    "recurrent": ("cnn_lstm", {}, 2),
    "several rates": ("audio_visual", {}, 1),
    "several outputs": ("two_heads", {}, 1),
}


@cache
def compiled_row(row: str) -> bytes:
    name, options, _ = ROWS[row]
    entry = SMALL[name]
    options = {**entry.options, **options}
    blob: bytes = co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **options).to_bytes()
    return blob


def node() -> list[str]:
    """The command of the JavaScript reader."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    look = subprocess.run(
        ["node", "-e", "require('onnxruntime-node')"], cwd=EXAMPLES / "node", capture_output=True, text=True
    )
    if look.returncode:
        pytest.skip("onnxruntime-node is not installed: npm install --prefix examples/node, or set NODE_PATH")
    return ["node", str(EXAMPLES / "node" / "stream.js")]


@cache
def cpp() -> list[str]:
    """The command of the C++ reader, built once."""
    home = os.environ.get("ONNXRUNTIME_HOME", "/usr")
    headers = [Path(home, "include"), Path(home, "include", "onnxruntime")]
    found = next((each for each in headers if (each / "onnxruntime_cxx_api.h").exists()), None)
    if found is None:
        pytest.skip("no onnxruntime_cxx_api.h: set ONNXRUNTIME_HOME to a folder with ONNX Runtime's include/ and lib/")
    if shutil.which("g++") is None or not Path("/usr/include/nlohmann/json.hpp").exists():
        pytest.skip("g++ and nlohmann/json (nlohmann-json3-dev) are needed")
    if home == "/usr" and ctypes.util.find_library("onnxruntime") is None:
        pytest.skip("libonnxruntime is not installed")
    folder = tempfile.mkdtemp(prefix="co3d-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = Path(folder, "stream")
    build = ["g++", "-std=c++17", str(EXAMPLES / "cpp" / "stream.cpp"), "-o", str(target), "-I", str(found)]
    build += ["-L", f"{home}/lib", f"-Wl,-rpath,{home}/lib", "-lonnxruntime"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [str(target)]


READERS: dict[str, Callable[[], list[str]]] = {"node": node, "cpp": cpp}


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("reader", READERS)
def test_the_numbers_of_the_session(reader: str, row: str, tmp_path: Path) -> None:
    command, batch = READERS[reader](), ROWS[row][2]
    model, source, target = (tmp_path / name for name in ("model.onnx", "frames.bin", "results.bin"))
    model.write_bytes(compiled_row(row))
    session = co3d.StreamSession(model, batch=batch, threads=1)
    generator = np.random.default_rng(0)
    given, expected = [], []
    for _ in range(session.info.warmup_steps + 4):
        shapes = [(batch, *item.shape[1:]) for item in session.info.inputs]
        frames = [generator.standard_normal(shape, dtype=np.float32) for shape in shapes]
        results = session.step(frames)
        given += frames
        expected += results if isinstance(results, tuple) else (results,)
    source.write_bytes(b"".join(frame.tobytes() for frame in given))
    done = run(command, model, source, target, batch)
    assert done.returncode == 0, done.stderr
    actual = np.fromfile(target, np.float32)
    wanted = np.concatenate([result.ravel() for result in expected])
    np.testing.assert_allclose(actual, wanted, atol=1e-4 * float(wanted.std()))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"no model", None], ids=["empty", "text", "not compiled"])
def test_a_file_that_is_no_compiled_model(reader: str, content: bytes | None, tmp_path: Path) -> None:
    command = READERS[reader]()
    path = tmp_path / "model.onnx"
    path.write_bytes(without_metadata() if content is None else content)
    (tmp_path / "frames.bin").write_bytes(b"")
    done = run(command, path, tmp_path / "frames.bin", tmp_path / "results.bin")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and (content is not None or "co3d-compile" in done.stderr)


def without_metadata() -> bytes:
    import onnx

    model = onnx.load_from_string(compiled_row("past entries"))
    del model.metadata_props[:]
    blob: bytes = model.SerializeToString()
    return blob


@pytest.mark.parametrize(
    "path", [*EXAMPLES.glob("node/*.*js"), *EXAMPLES.glob("cpp/*.cpp")], ids=lambda path: path.name
)
def test_a_reader_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120
