"""``co3d run --show`` on a real display (Xvfb): what the window shows, and every way to close it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import display
import numpy as np
import pytest
from film import compiled

from co3d_compile.media.video import Image, write_video

CO3D = [sys.executable, "-m", "co3d_compile.cli.main", "run", "m.onnx", "--show", "--csv", "out.csv", "--json"]
RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
SIZE = 320, 400  # large enough not to be enlarged for its text, small enough for the screen
FILES = {"long.mp4": (400, SIZE), "short.mp4": (20, SIZE), "pipe.mkv": (20, SIZE), "tall.mp4": (20, (960, 540))}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(display.missing() is not None, reason=str(display.missing())),
]
Act = Callable[[display.Display, int, subprocess.Popen[str]], None]


def bands(height: int, width: int) -> Image:
    """Above red, below green, on the right blue."""
    image = np.full((height, width, 3), GREEN, np.uint8)
    image[: height // 4], image[:, width * 7 // 8 :] = RED, BLUE
    return image


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[display.Display]:
    with display.display(tmp_path_factory.mktemp("screen")) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("window")
    (place / "m.onnx").write_bytes(compiled(preprocess={"size": 16}))
    for name, (count, size) in FILES.items():
        write_video(place / name, [bands(*size)] * count, 20)
    return place


def shows(screen: Image, height: int, width: int) -> bool:
    """Whether the picture of the video, this large, stands in the upper left corner of the screen."""
    places = {(0.1, 0.2): RED, (0.4, 0.2): GREEN, (0.4, 0.95): BLUE}
    near = all(np.allclose(screen[int(y * height), int(x * width)], c, atol=12) for (y, x), c in places.items())
    return near and not screen[height + 1 :].any() and not screen[:, width + 1 :].any()


def until(what: Callable[[], bool]) -> None:
    for _ in range(1200):  # a guard
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def key(name: str, *, shift: bool = False) -> Act:
    return lambda screen, window, _: screen.press(window, name, shift)


WAYS: dict[str, tuple[str, tuple[int, int], Act | None, int]] = {
    "q": ("long.mp4", SIZE, key("q"), 0),
    "q with caps lock": ("long.mp4", SIZE, key("q", shift=True), 0),
    "escape": ("long.mp4", SIZE, key("Escape"), 0),
    "the close button": ("long.mp4", SIZE, lambda screen, window, _: screen.close_button(window), 0),
    "Ctrl-C": ("long.mp4", SIZE, lambda _, __, process: process.send_signal(signal.SIGINT), 130),
    "the end": ("short.mp4", SIZE, None, 0),
    "q while the source keeps silent": ("-", SIZE, key("q"), 0),
    "a picture higher than the screen": ("tall.mp4", (408, 230), None, 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_window_shows_the_video_and_closes(way: str, screen: display.Display, folder: Path, tmp_path: Path) -> None:
    source, size, act, code = WAYS[way]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(
            [*CO3D, "--source", source], text=True, cwd=folder, env={**os.environ, "DISPLAY": screen.name},
            stdin=subprocess.PIPE, stdout=out, stderr=err,
        )  # fmt: skip
    try:
        assert process.stdin is not None
        process.stdin.buffer.write((folder / "pipe.mkv").read_bytes() if source == "-" else b"")
        process.stdin.flush()
        until(lambda: shows(screen.picture(), *size))
        if act is not None:
            (window,) = screen.windows()
            time.sleep(1.5 if source == "-" else 0.3)  # some predictions, or all of them
            act(screen, window, process)
        assert process.wait(60) == code
        assert screen.windows() == []
    finally:
        process.kill()
        process.communicate()
    said = (tmp_path / "err").read_text().splitlines()
    stopped = [
        "finishing … (again: end without files)",
        "stopped by SIGINT; what was written is complete up to there",
    ]
    assert said == ([] if code == 0 else stopped)
    result = json.loads((tmp_path / "out").read_text())
    rows = (folder / "out.csv").read_text().splitlines()[1:]
    assert len(rows) == result["predictions"] > 0  # the frame at which the window was closed is written too
    assert (result["frames"] < 300) if source == "long.mp4" else (result["frames"] <= 20)


def test_a_display_that_does_not_answer_is_told_of(folder: Path) -> None:
    environment = {**os.environ, "DISPLAY": "127.0.0.1:1"}
    command = [*CO3D, "--source", "short.mp4"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: --show cannot open a window")
    assert result.stderr.count("\n") == 1
