"""The page in a browser: a fake camera fed from a file, the numbers of Python's session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import co3d_compile as co3d

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS, SIZE = 30, 32
IN_SOFTWARE = ["--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-webgpu-adapter=swiftshader"]
IN_SOFTWARE += ["--ignore-gpu-blocklist"]
# Options of the page, frames per step, taps of the first convolution, what the page must run on.
ROWS = [
    *((f"threads={threads}&provider=wasm", pulse, 3, "wasm") for threads in (1, 2) for pulse in (1, 2)),
    ("provider=webgpu", 1, 4, "webgpu"),
    ("provider=webgpu", 2, 4, "webgpu"),
    # 9 channels, which onnxruntime-web 1.30 gets wrong on WebGPU: either place is fine if the numbers are right.
    ("provider=webgpu", 1, 3, ""),
]


def recorder(found: list[Any], done: threading.Event, files: dict[str, Path]) -> Any:
    """The example's own server, which also takes what the page records."""
    from serve import Handler

    class Recorder(Handler):
        def do_POST(self) -> None:
            found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_: Any) -> None:
            pass

    return partial(Recorder, files=files)


def packages() -> Path:
    """Where onnxruntime-web is installed."""
    for folder in (EXAMPLES / "web" / "node_modules", *map(Path, os.environ.get("NODE_PATH", "nowhere").split(":"))):
        if (folder / "onnxruntime-web" / "dist").is_dir():
            return folder
    pytest.skip("onnxruntime-web is not installed: npm install --prefix examples/web, or set NODE_PATH")


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("Chromium is not installed")


def write_video(path: Path) -> None:
    """A bright square that moves, as raw video."""
    with path.open("wb") as file:
        file.write(b"YUV4MPEG2 W64 H48 F15:1 Ip A1:1 C420jpeg\n")
        for t in range(45):
            luma = np.full((48, 64), 40, np.uint8)
            luma[10:30, t % 45 : t % 45 + 18] = 220
            file.write(b"FRAME\n" + luma.tobytes() + bytes([100]) * (24 * 32) + bytes([150]) * (24 * 32))


@pytest.mark.slow
@pytest.mark.parametrize(("options", "pulse", "taps", "runs_on"), ROWS)
def test_the_page_gives_the_numbers_of_the_session(
    options: str, pulse: int, taps: int, runs_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(
            nn.Conv3d(3, 8, (taps, 3, 3), padding=1),
            nn.ReLU(),
            nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 6)),
    )
    compiled = co3d.compile(network.eval(), (torch.zeros(1, 3, 8, SIZE, SIZE),), frames_per_step=pulse)
    model = compiled.save(tmp_path / "model.onnx")
    write_video(tmp_path / "camera.y4m")
    monkeypatch.syspath_prepend(EXAMPLES / "web")
    files = {"web/model.onnx": model, "web/node_modules": packages()}
    found: list[Any] = []
    done = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), recorder(found, done, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = f"http://127.0.0.1:{server.server_port}/web/index.html?{options}&source=camera&steps={STEPS}&record=/record"
    flags = ["--headless=new", "--no-sandbox", "--no-first-run", f"--user-data-dir={tmp_path}/profile"]
    flags += IN_SOFTWARE if "webgpu" in options else ["--disable-gpu"]
    flags += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream", "--disable-dev-shm-usage"]
    flags += [f"--use-file-for-fake-video-capture={tmp_path}/camera.y4m"]
    process = subprocess.Popen([browser(), *flags, page], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert done.wait(180), "the page did not answer"
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
    (record,) = found
    assert isinstance(record, list) and len(record) == STEPS, record
    assert runs_on in record[0]["provider"]
    inputs = np.array([row["input"] for row in record], np.float32)
    assert len(np.unique(inputs, axis=0)) > STEPS // 3  # the picture moves
    dark, bright = (0 - 0.45) / 0.225, (1 - 0.45) / 0.225
    assert dark - 1e-5 <= inputs.min() < 0 < inputs.max() <= bright + 1e-5
    shape = [1 if size == "N" else size for size in compiled.info.inputs[0].shape]
    session = co3d.StreamSession(model, threads=1)
    expected = [session.step(row.reshape(shape)) for row in inputs]
    for row, wanted in zip(record, expected, strict=True):
        np.testing.assert_allclose(row["output"], np.ravel(wanted), atol=1e-3 * float(np.std(expected)))
