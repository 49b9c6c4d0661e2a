"""Where frames come from: a video file, a camera, a URL, a folder of pictures, a pipe. Decoded in a thread by PyAV."""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from co3d_compile.errors import LoadError, UsageError
from co3d_compile.media.video import Image, VideoFrame, picture, pyav, reason
from co3d_compile.support.plain_types import JsonObject

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

T = TypeVar("T")
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
PUSHING = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "udp", "tcp"}  # what does not wait for its reader
CAMERAS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
WAITING = 4  # decoded frames that wait for the model
SECONDS = 10.0  # that a URL may keep silent
RECENT = 64  # frames by which it is known when the next one is due
AGAIN = 1.0  # seconds between two tries to get a source back


class Source:
    """Frames of a video, decoded ahead in a thread. Iterate over it once; use it in a ``with`` block.

    A file or pipe waits for its reader. A camera or network stream does not: when the reader is slow the oldest
    frame that waits is dropped and counted, so that what comes next is always near the present.

    Args:
        source: A video file, a folder of pictures (in the order of their names), a URL, the number of a camera, or
            ``-`` for a video on standard input.
        fps: Pictures per second of a folder.
        reconnect: Seconds for which a live source that ends or breaks off is tried again. The first frame behind that
            says how long it was away (``VideoFrame.away``), and its time goes on by as much.

    Attributes:
        name: What to call it in messages.
        live: Whether frames come by themselves, at their own pace.
        fps: Frames per second, as far as the source says; None otherwise.
        total: How many frames there should be, as the file claims; None if it does not say. Only for display.
        dropped: Frames dropped because the reader was slow.
        damaged: Packets or pictures that could not be decoded and were left out.
        while_waiting: Called ten times a second, in the thread that iterates, while no frame comes.
        when_lost: Called there with what happened, in words, when a live source is lost and tried again.

    Raises:
        LoadError: It cannot be opened, or has no video; while iterating: it broke off, and did not come back.
        UsageError: ``reconnect`` for a source that is not live.
    """

    def __init__(self, source: str | Path, fps: float | None = None, *, reconnect: float | None = None) -> None:
        self.name = "standard input" if str(source) == "-" else str(source)
        self.fps: float | None = None
        self.total: int | None = None
        self.damaged = 0
        self.while_waiting: Callable[[], None] | None = None
        self.when_lost: Callable[[str], None] | None = None
        self._reconnect = reconnect
        self._lost: deque[str] = deque()
        self._av = pyav()
        self._folder: list[Path] = []
        self._container: InputContainer | None = None
        self._stopped = False
        self._how: tuple[str | FileIO, JsonObject] = str(source), {}
        self.live = self._open(str(source), fps)
        if reconnect is not None and not self.live:
            self._let_go()
            raise UsageError(f"{self.name} is no live source: it cannot come back when it has ended.")
        self._channel = _Channel(WAITING, drops=self.live)
        self._thread = threading.Thread(target=self._work, name=f"decoder of {self.name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._channel.dropped

    def __iter__(self) -> Iterator[VideoFrame]:
        away = 0.0
        while True:
            item = self._channel.get(0.1)
            while self._lost and self.when_lost is not None:
                self.when_lost(self._lost.popleft())
            if isinstance(item, VideoFrame):
                yield replace(item, away=item.away - away)
                away = item.away
            elif isinstance(item, BaseException):
                raise item
            elif item is _END or self._stopped:
                return
            elif self.while_waiting is not None:
                self.while_waiting()

    def stop(self) -> None:
        """Ends the iteration after the current frame. May be called from a signal handler or another thread."""
        self._stopped = True

    def close(self) -> None:
        """Stops, and waits a moment for the decoder to close the source."""
        self.stop()
        self._thread.join(1.0)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, source: str, fps: float | None) -> bool:
        """Opens the source; returns whether it is live."""
        path = Path(source)
        if path.is_dir():
            self._open_folder(path, fps)
            return False
        if fps is not None:
            raise UsageError(f"A frame rate can be given for a folder of pictures, not for {self.name}.")
        scheme = source.split("://", 1)[0].lower() if "://" in source else ""
        camera = f"/dev/video{source}" if source.isascii() and source.isdigit() and not path.exists() else source
        file: str | FileIO = source
        how: JsonObject = {}
        if camera != source or _is_device(path):
            file, how["format"] = _camera(camera, source)
            self.name = source if camera == source else f"camera {source}"
        elif source == "-":
            file = _standard_input()
        elif scheme and scheme != "file":
            how = {"options": {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}, "timeout": SECONDS}
        self._how = file, how
        self._container = container = self._open_container(file, how)
        stream = container.streams.video[0]
        self.fps = float(stream.average_rate) if stream.average_rate else None
        self.total = _claimed_frames(container, stream)
        return camera != source or _is_device(path) or scheme in PUSHING or (bool(scheme) and self.total is None)

    def _open_folder(self, path: Path, fps: float | None) -> None:
        self._folder = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=_natural)
        if not self._folder:
            raise LoadError(f"{path} holds no pictures.", hint=f"Known are {', '.join(sorted(PICTURES))}.")
        self.fps, self.total = fps, len(self._folder)

    def _open_container(self, file: str | FileIO, how: JsonObject) -> InputContainer:
        try:
            container: InputContainer = _aside(lambda: self._av.open(file, **how))
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            hint = None
            if self.name == "standard input":
                hint = "A pipe needs a format that can be read from front to back, such as MPEG-TS or Matroska."
            elif "://" in self.name:
                hint = "Is the address right, and does it answer from here?"
            raise LoadError(f"{self.name} cannot be read as a video: {_why(error)}.", hint=hint) from error
        if not container.streams.video:
            container.close()
            raise LoadError(f"{self.name} has no video stream.")
        container.streams.video[0].thread_type = "AUTO"
        return container

    def _work(self) -> None:
        """Decodes until the end, the first error or ``stop``, in the thread."""
        end: object = _END
        try:
            for index, (image, seconds, away) in enumerate(self._pictures()):
                if not self._channel.put(VideoFrame(image, seconds, index, away), lambda: self._stopped):
                    break
            else:
                end = self._verdict()
        except LoadError as error:
            end = error
        except Exception as error:  # whatever the decoder meets belongs to the reader of this source
            end = LoadError(f"{self.name} broke off: {_why(error)}.")
        finally:
            self._let_go()
            self._channel.end(end)

    def _verdict(self) -> object:
        if self._channel.count:
            return _END
        problem = "nothing in it could be decoded" if self.damaged else "it has no frames"
        return LoadError(f"{self.name} cannot be read as a video: {problem}.")

    def _pictures(self) -> Iterator[tuple[Image, float, float]]:
        """Yields pictures, their seconds from the first one, and the seconds for which a live source was away."""
        clock, away, before, until = _Clock(self.fps or 30), 0.0, 0.0, 0.0
        # When a frame of time 0 would have come: the last frame of a stream may come late, with the end of it.
        begun: deque[float] = deque(maxlen=RECENT)
        while True:
            lost = "it has ended"
            try:
                for image, seconds in self._decode_folder() if self._folder else self._decode(clock):
                    begun.append(time.monotonic() - seconds)
                    yield image, seconds, before + away
                    before, away = before + away, 0.0
            except Exception as error:
                if self._reconnect is None:
                    raise
                lost = _why(error)
            if self._reconnect is None or self._stopped:
                return
            if not away:
                until = time.monotonic() + self._reconnect
                self._lost.append(f"{self.name} was lost: {lost}; trying again for {self._reconnect:g} seconds")
            if not self._open_again(lost, until):
                return
            now = time.monotonic()
            missing = max(0.0, now - min(begun, default=now) - clock.last)
            away, clock = away + missing, clock.behind(missing)

    def _open_again(self, lost: str, until: float) -> bool:
        """Opens a live source that was lost, once it is there again; returns False where the source is stopped.

        Raises:
            LoadError: It did not come back in time.
        """
        self._let_go()
        file, how = self._how
        while not self._stopped:
            left = until - time.monotonic()
            if left <= 0:
                raise LoadError(f"{self.name} broke off: {lost}. It did not come back in {self._reconnect:g} seconds.")
            with suppress(LoadError):
                self._container = self._open_container(file, {**how, "timeout": (min(SECONDS, left), SECONDS)})
                return True
            time.sleep(min(AGAIN, left))
        return False

    def _let_go(self) -> None:
        with suppress(Exception):
            if self._container is not None:
                self._container.close()

    def _decode_folder(self) -> Iterator[tuple[Image, float]]:
        for index, path in enumerate(self._folder):
            try:
                with self._av.open(str(path)) as container:
                    yield picture(next(container.decode(video=0))), index / (self.fps or 30)
            except (self._av.error.FFmpegError, OSError, StopIteration, IndexError):
                self.damaged += 1

    def _decode(self, clock: _Clock) -> Iterator[tuple[Image, float]]:
        """Yields the pictures with their seconds by this clock."""
        assert self._container is not None
        stream = self._container.streams.video[0]
        for packet in self._container.demux(stream):
            try:
                frames = packet.decode()
            except self._av.error.FFmpegError:
                self.damaged += 1
                continue
            for frame in frames:
                yield picture(frame), clock(frame.time)


def read_source(source: str | Path, fps: float | None = None) -> Iterator[VideoFrame]:
    """Yields all frames of a source, see ``Source``."""
    with Source(source, fps) as frames:
        yield from frames


_END = object()


class _Clock:
    """Seconds from the first frame; one interval further where a frame has no time of its own."""

    def __init__(self, fps: float) -> None:
        self.interval = 1 / fps
        self.start: float | None = None
        self.last = -self.interval

    def __call__(self, seconds: float | None) -> float:
        if seconds is None:
            self.last += self.interval
        else:
            if self.start is None:
                self.start = seconds - max(self.last + self.interval, 0.0)
            self.last = seconds - self.start
        return self.last

    def behind(self, away: float) -> _Clock:
        """Goes on so many seconds behind the last frame, whatever the source calls its next one."""
        clock = _Clock(1 / self.interval)
        clock.last = max(self.last, 0.0) + away - self.interval
        return clock


class _Channel:
    """A short queue between two threads. Full, it makes the writer wait, or drops what has waited longest."""

    def __init__(self, size: int, drops: bool) -> None:
        self.dropped = 0
        self.count = 0
        self._size, self._drops = size, drops
        self._items: deque[object] = deque()
        self._changed = threading.Condition()

    def put(self, item: object, given_up: Callable[[], bool]) -> bool:
        """Says whether the reader still wants items."""
        with self._changed:
            while len(self._items) >= self._size and not self._drops and not given_up():
                self._changed.wait(0.1)
            if len(self._items) >= self._size:
                if not self._drops:
                    return False
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self.count += 1
            self._changed.notify_all()
        return not given_up()

    def end(self, item: object) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def get(self, seconds: float) -> object:
        """Takes the next item, or None if there is none for so long."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._items:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
            item = self._items.popleft()
            self._changed.notify_all()
            return item


def _why(error: BaseException) -> str:
    """Says what happened, in words: FFmpeg says "Immediate exit requested" where its time was up."""
    if isinstance(error, getattr(pyav().error, "ExitError", ())):
        return f"nothing came for {SECONDS:g} seconds"
    return reason(error)


def _aside(call: Callable[[], T]) -> T:
    """Calls what may wait inside FFmpeg in a thread: signals are heard at once in this one."""
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, name="opens a source", daemon=True).start()
    return result.result()


def _camera(path: str, given: str) -> tuple[str, str]:
    """Says what PyAV opens for a camera, and by which of FFmpeg's devices."""
    device = CAMERAS.get(sys.platform)
    if device is None:
        raise UsageError(f"Cameras are not known on {sys.platform}.", hint="Give a URL or a file.")
    if sys.platform == "linux" and not os.path.exists(path):
        raise LoadError(f"There is no camera {given}: {path} does not exist.", hint="Is it plugged in?")
    return (path, device) if sys.platform == "linux" else (given, device)


def _standard_input() -> FileIO:
    """Opens it unbuffered: a thread that waits in a buffered read would stop Python from ending."""
    with suppress(OSError, ValueError, AttributeError):
        number = sys.stdin.fileno()
        if not os.isatty(number):
            return os.fdopen(os.dup(number), "rb", buffering=0)
    raise UsageError("Nothing is piped into standard input.", hint="Pipe a video into it, or name a file.")


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.stat().st_mode) and path.name.startswith("video")
    except (OSError, ValueError):
        return False


def _claimed_frames(container: InputContainer, stream: VideoStream) -> int | None:
    if stream.frames:
        return int(stream.frames)
    if container.duration and stream.average_rate and container.duration > 0:
        return max(1, round(float(container.duration / 1e6 * stream.average_rate)))
    return None


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
