"""The contract's readers in other languages, as processes: what they need, and how they are called."""

from __future__ import annotations

import atexit
import ctypes.util
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


class Missing(Exception):
    """Something that a target needs is not installed."""


class Refusal(Exception):
    """A reader refuses a file."""


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@cache
def node() -> list[str]:
    """The command of the JavaScript reader."""
    if shutil.which("node") is None:
        raise Missing("node is not installed")
    if run(["node", "-e", "require(process.argv[1])", str(EXAMPLES / "node/node_modules/onnxruntime-node")]).returncode:
        look = ["node", "-e", "require('onnxruntime-node')"]
        if subprocess.run(look, cwd=EXAMPLES / "node", capture_output=True).returncode:
            raise Missing("onnxruntime-node is not installed: npm install --prefix examples/node, or set NODE_PATH")
    return ["node", str(EXAMPLES / "node" / "stream.js")]


def web_packages() -> Path:
    """Where onnxruntime-web is installed."""
    for folder in (EXAMPLES / "web/node_modules", *map(Path, os.environ.get("NODE_PATH", "nowhere").split(":"))):
        if (folder / "onnxruntime-web" / "dist").is_dir():
            return folder
    raise Missing("onnxruntime-web is not installed: npm install --prefix examples/web, or set NODE_PATH")


@cache
def wasm() -> list[str]:
    """The command of the same reader with the browser's package, onnxruntime-web, in Node.js."""
    if shutil.which("node") is None:
        raise Missing("node is not installed")
    package, folder = web_packages() / "onnxruntime-web", _folder()
    for name in ("stream.js", "reader.mjs"):
        shutil.copyfile(EXAMPLES / "node" / name, folder / name)
    stand_in = folder / "node_modules" / "onnxruntime-node"
    stand_in.mkdir(parents=True)
    (stand_in / "index.js").write_text(f"module.exports = require({json.dumps(str(package))});\n")
    return ["node", str(folder / "stream.js")]


@cache
def cpp() -> list[str]:
    """The command of the C++ reader, built once."""
    home = os.environ.get("ONNXRUNTIME_HOME", "/usr")
    headers = [Path(home, "include"), Path(home, "include", "onnxruntime")]
    found = next((each for each in headers if (each / "onnxruntime_cxx_api.h").exists()), None)
    if found is None:
        raise Missing(
            "no onnxruntime_cxx_api.h: set ONNXRUNTIME_HOME to a folder with ONNX Runtime's include/ and lib/"
        )
    if shutil.which("g++") is None or not Path("/usr/include/nlohmann/json.hpp").exists():
        raise Missing("g++ and nlohmann/json (nlohmann-json3-dev) are needed")
    if home == "/usr" and ctypes.util.find_library("onnxruntime") is None:
        raise Missing("libonnxruntime is not installed")
    target = _folder() / "stream"
    build = ["g++", "-std=c++17", str(EXAMPLES / "cpp" / "stream.cpp"), "-o", str(target), "-I", str(found)]
    build += ["-L", f"{home}/lib", f"-Wl,-rpath,{home}/lib", "-lonnxruntime"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [str(target)]


def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="co3d-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
