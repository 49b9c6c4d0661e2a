"""Frames from files, folders, pipes, URLs and live streams, through real encoders, decoders and sockets."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from film import gray, ramp, video

import co3d_compile as co3d
from co3d_compile.errors import LoadError, UsageError
from co3d_compile.media.frame_source import Source
from co3d_compile.media.video import write_video


def levels(source: Source) -> list[float]:
    return [float(frame.image.mean()) for frame in source]


def test_a_file_gives_all_its_frames_with_times_from_its_start(tmp_path: Path) -> None:
    for name in ("v.mp4", "v.mkv", "v.ts", "v.avi"):  # MPEG-TS starts its clock at 1.4 seconds
        with Source(video(tmp_path / name)) as source:
            found = list(source)
        assert (source.live, source.dropped, source.damaged) == (False, 0, 0)
        assert source.fps == pytest.approx(20, abs=0.1)
        assert [frame.index for frame in found] == list(range(40))
        np.testing.assert_allclose([frame.time for frame in found], np.arange(40) / 20, atol=2e-3)
        np.testing.assert_allclose([f.image.mean() for f in found], [i.mean() for i in ramp()], atol=3)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for index, image in enumerate(ramp(12)):
        write_picture(tmp_path / f"frame_{index}.png", image if index else gray(20, 40, 40))
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "frame_5.png").write_bytes(b"damaged")
    with Source(tmp_path, fps=10) as source:
        found = list(source)
    assert (source.total, source.damaged) == (12, 1)
    np.testing.assert_allclose([f.image.mean() for f in found], [20 + 5 * i for i in range(12) if i != 5], atol=3)
    np.testing.assert_allclose([f.time for f in found], [i / 10 for i in range(12) if i != 5])


def write_picture(path: Path, image: Any) -> None:
    with av.open(str(path), "w", format="image2") as file:
        stream: Any = file.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "rgb24"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    code = "from co3d_compile import read_source; print(sum(1 for _ in read_source('-')))"
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, input=video(tmp_path / "v.ts").read_bytes(), capture_output=True, check=True)
    assert piped.stdout.strip() == b"40"
    nothing = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert b"standard input cannot be read" in nothing.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def test_a_url_is_read_like_a_file(server: str, tmp_path: Path) -> None:
    video(tmp_path / "v.mp4")
    with Source(f"{server}/v.mp4") as source:
        assert len(list(source)) == 40 and not source.live and source.dropped == 0
    with pytest.raises(LoadError, match="missing"):
        Source(f"{server}/missing.mp4")


def send(port: int, enough: threading.Event, fps: float = 50.0) -> None:
    """A camera in the network: MPEG-TS over UDP, in real time."""
    with av.open(f"udp://127.0.0.1:{port}?pkt_size=1316", "w", format="mpegts") as out:
        stream: Any = out.add_stream("mpeg2video", rate=Fraction(fps), options={"g": "1"})
        stream.height, stream.width, stream.pix_fmt = *gray(0).shape[:2], "yuv420p"
        while not enough.wait(1 / fps):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(gray(120), format="rgb24")))
        out.mux(stream.encode())


@pytest.mark.slow
def test_a_late_reader_of_a_live_stream_loses_the_oldest_frames() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    enough = threading.Event()
    sender = threading.Thread(target=send, args=(port, enough), daemon=True)
    sender.start()
    try:
        with Source(f"udp://127.0.0.1:{port}?fifo_size=100000&overrun_nonfatal=1") as source:
            assert source.live and source.total is None
            frames = iter(source)
            first = next(frames)
            eventually(lambda: source.dropped > 8)
            indices = [first.index, *(next(frames).index for _ in range(3))]
            assert indices == sorted(set(indices)) and indices[-1] - indices[0] > 8
            source.stop()
    finally:
        enough.set()
        sender.join()


@pytest.mark.slow
def test_a_live_stream_that_comes_back_goes_on_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("co3d_compile.media.frame_source.SECONDS", 0.5)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lost: list[str] = []
    ends: list[threading.Event] = []

    def begin() -> None:
        ends.append(threading.Event())
        threading.Thread(target=send, args=(port, ends[-1]), daemon=True).start()

    begin()
    try:
        with Source(f"udp://127.0.0.1:{port}", reconnect=60) as source:
            source.when_lost = lambda what: (lost.append(what), begin())[0]
            found = []
            for frame in source:
                found.append(frame)
                if len(found) == 5:
                    ends[0].set()
                if frame.away:
                    source.stop()
    finally:
        for end in ends:
            end.set()
    assert len(lost) == 1 and "nothing came for 0.5 seconds; trying again for 60 seconds" in lost[0]
    last, back = next((a, b) for a, b in pairwise(found) if b.away)
    assert 0.4 <= back.away < 30 and back.time - last.time == pytest.approx(back.away, abs=0.2)


def test_a_live_stream_that_stays_away_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("co3d_compile.media.frame_source.SECONDS", 0.3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    enough = threading.Event()
    threading.Thread(target=send, args=(port, enough), daemon=True).start()
    with Source(f"udp://127.0.0.1:{port}", reconnect=0.5) as source:
        enough.set()
        with pytest.raises(LoadError, match=r"nothing came for 0\.3 seconds. It did not come back in 0\.5 seconds"):
            list(source)


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for what must come, however slow the machine; ``seconds``: until it is taken for lost."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_sizes_may_change_on_the_way(tmp_path: Path) -> None:
    parts = []
    for name, height in (("a.ts", 32), ("b.ts", 64)):
        parts.append(write_video(tmp_path / name, [gray(90, height, 2 * height)] * 10, 20).read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with Source(tmp_path / "both.ts") as source:
        shapes = [frame.image.shape for frame in source]
    assert shapes == [(32, 64, 3)] * 10 + [(64, 128, 3)] * 10


def test_damaged_packets_are_left_out_and_counted(tmp_path: Path) -> None:
    content = bytearray(write_video(tmp_path / "v.mkv", [gray(i) for i in range(10, 240, 3)], 20).read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(len(content) // 2, len(content) * 9 // 10, 30):
        content[at] ^= 0xFF
    (tmp_path / "bad.mkv").write_bytes(content)
    with Source(tmp_path / "bad.mkv") as source:
        count = sum(1 for _ in source)
    assert 0 < count < 100


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    for name in ("text.mp4", "missing.mp4", "empty"):
        with pytest.raises(LoadError, match=name):
            list(Source(tmp_path / name))
    with pytest.raises(LoadError, match="no camera 63"):
        Source("63")
    with pytest.raises(UsageError, match="folder"):
        Source(video(tmp_path / "v.mp4"), fps=3)
    with pytest.raises(UsageError, match="no live source"):
        Source(tmp_path / "v.mp4", reconnect=3)


def test_stop_ends_a_source_that_is_in_the_middle(tmp_path: Path) -> None:
    with Source(video(tmp_path / "v.mp4")) as source:
        for count, _ in enumerate(source, 1):
            if count == 3:
                source.stop()
    assert count <= 8  # what was decoded ahead may still come


def test_a_telephone_s_video_is_turned_upright(tmp_path: Path) -> None:
    """The file says by how much: a matrix in the header of the track, here written by hand for a quarter turn."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, :32] = 255  # the left half is bright
    content = bytearray(write_video(tmp_path / "v.mp4", [image] * 4, 20).read_bytes())
    straight = b"".join(v.to_bytes(4, "big", signed=True) for v in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    turned = b"".join(v.to_bytes(4, "big", signed=True) for v in (0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30))
    at = content.index(straight, content.index(b"tkhd"))
    content[at : at + 36] = turned
    (tmp_path / "turned.mp4").write_bytes(content)
    frame = next(iter(co3d.read_source(tmp_path / "turned.mp4")))
    assert frame.image.shape == (64, 32, 3)
    assert frame.image[:30].mean() > 200 and frame.image[34:].mean() < 60, "a quarter turn clockwise: left goes up"


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = video(tmp_path / "v.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with Source(path) as source:
            next(iter(source))
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


def test_a_server_that_keeps_silent_is_told_of_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("co3d_compile.media.frame_source.SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/film.mp4"
        with pytest.raises(LoadError, match=r"nothing came for 0\.3 seconds"):
            Source(url)
