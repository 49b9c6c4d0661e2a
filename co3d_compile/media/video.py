"""Video files in and out: decode with PyAV, resize, write an mp4.

Needs the ``video`` extra (PyAV) and numpy; nothing here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from co3d_compile.errors import Co3dError, LoadError, OutputError, UsageError
from co3d_compile.support.install_hint import install_command

if TYPE_CHECKING:
    from types import ModuleType

    from av import VideoFrame as Decoded
    from av import VideoStream
    from PIL.Image import Image as PillowImage

USUAL = (".mp4", ".mkv")
CLOCK = Fraction(1, 90000)  # what times are rounded to where each picture has its own
Image = npt.NDArray[np.uint8]
"""One picture: (height, width, 3), uint8, RGB."""


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame.

    Attributes:
        image: (height, width, 3), uint8, RGB.
        time: Presentation time in seconds from the start of the file's clock.
        index: Position in the stream, from 0.
        away: Seconds before it in which a live source was away (``Source(reconnect=…)``); 0: it follows the one before.
    """

    image: Image
    time: float
    index: int
    away: float = 0.0


Picture: TypeAlias = "VideoFrame | Image | PillowImage"
"""A picture with its time and number, or alone: an array, or an image of Pillow."""


def image_of(picture: Image | PillowImage) -> Image:
    """Makes an array of a picture: (height, width, 3), uint8, RGB.

    Raises:
        UsageError: It is of another kind or shape.
    """
    pillow = sys.modules.get("PIL.Image")  # who has such an image has imported it
    if pillow is not None and isinstance(picture, pillow.Image):
        return np.asarray(picture.convert("RGB"))
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return picture
    kind = type(picture).__name__
    what = f"{picture.dtype} of shape {picture.shape}" if isinstance(picture, np.ndarray) else f"a {kind}"
    raise UsageError(
        f"A picture is an array (height, width, 3) of uint8, RGB, an image of Pillow or a VideoFrame, not {what}.",
        hint="Frames that are prepared already go to a StreamSession.",
    )


def read_frames(source: str | Path) -> Iterator[VideoFrame]:
    """Decodes the first video stream of a file or URL, frame by frame, in presentation order.

    The length that the file declares is not believed: frames are decoded until there are no more.

    Raises:
        LoadError: the source cannot be opened, has no video stream, or is damaged (the frame is named).
    """
    av = pyav()
    index = 0
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise LoadError(f"{source} has no video stream.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            seconds_per_frame = float(1 / (stream.average_rate or 30))
            for frame in container.decode(stream):
                time = frame.time if frame.time is not None else index * seconds_per_frame
                yield VideoFrame(picture(frame), time, index)
                index += 1
    except (av.error.FFmpegError, OSError) as error:
        where = f" at frame {index}" if index else ""
        raise LoadError(f"{source} cannot be read as a video{where}: {reason(error)}.") from error


def picture(frame: Decoded) -> Image:
    """Reads what a decoded frame shows, turned upright as the file says (telephones film sideways)."""
    image = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def resize(image: Image, height: int, width: int) -> Image:
    """Resizes one picture, bilinear: with FFmpeg's scaler, or where PyAV is missing by the same weights in numpy."""
    if image.shape[:2] == (height, width):
        return image
    try:
        import av
    except ImportError:
        rows, columns = _weights(image.shape[0], height), _weights(image.shape[1], width)
        values = np.tensordot(rows, image.astype(np.float32), (1, 0))
        values = np.tensordot(columns, values, (1, 1)).swapaxes(0, 1)
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return np.asarray(frame.reformat(width=width, height=height, interpolation="BILINEAR").to_ndarray(), np.uint8)


def _weights(size: int, wanted: int) -> npt.NDArray[np.float32]:
    """Computes (wanted, size).

    What each pixel of a row is made of, by triangles as wide as the pixels of the smaller row.
    """
    scale = size / wanted
    centers = (np.arange(wanted) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(size)[None] - centers[:, None]) / max(scale, 1.0))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def center_crop(image: Image, height: int, width: int) -> Image:
    """Cuts the middle ``height`` x ``width`` pixels out of a picture that is at least that large."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


class VideoWriter:
    """A video file in the making, as H.264 where the encoder is there and MPEG-4 otherwise.

    The file is complete once ``close`` or the end of the ``with`` block is reached, also after an exception.
    """

    def __init__(self, path: str | Path, fps: float = 30.0) -> None:
        if not fps > 0:
            raise UsageError(f"{fps} is no frame rate.")
        self._av = pyav()
        self._path = Path(path)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        self._stream: VideoStream | None = None
        self._last = -1
        with self._output_errors():
            self._container = self._av.open(str(path), mode="w")

    def write(self, image: Image, time: float | None = None) -> None:
        """Appends one picture.

        Args:
            image: (height, width, 3), uint8, RGB, both sides even and the same for all pictures.
            time: When it is shown, in seconds, later than the picture before. Default: at the frame rate.
        """
        stream = self._stream or self._open_stream(image.shape[0], image.shape[1], timed=time is not None)
        if image.shape != (stream.height, stream.width, 3) or image.dtype != np.uint8:
            raise UsageError(f"{self._path} takes uint8 pictures of one size, not {image.dtype} {image.shape}.")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        if time is not None:
            frame.time_base = CLOCK
            frame.pts = self._last = max(self._last + 1, round(time / CLOCK))
        with self._output_errors():
            self._container.mux(stream.encode(frame))

    def close(self) -> None:
        """Flushes the encoder and finishes the file."""
        stream, self._stream = self._stream, None
        with self._output_errors():
            if stream is not None:
                self._container.mux(stream.encode())
            self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_stream(self, height: int, width: int, timed: bool) -> VideoStream:
        if height % 2 or width % 2:
            raise UsageError(f"A video of {width}x{height} pixels cannot be encoded: both sides must be even.")
        stream: VideoStream = self._container.add_stream(self._codec, rate=self._rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if timed:
            stream.codec_context.time_base = CLOCK
        self._stream = stream
        return stream

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        """Raises OutputError where FFmpeg fails, which opens the file at the first picture or later."""
        try:
            yield
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            hint = None if self._stream or self._path.suffix in USUAL else f"End its name with {' or '.join(USUAL)}."
            raise OutputError(f"{self._path} cannot be written as a video: {reason(error)}.", hint=hint) from error


def write_video(path: str | Path, images: Iterable[Image], fps: float = 30.0) -> Path:
    """Encodes pictures, (height, width, 3), uint8, RGB, into one file. Returns its path."""
    with VideoWriter(path, fps) as writer:
        for image in images:
            writer.write(image)
    return Path(path)


def pyav() -> ModuleType:
    """Imports PyAV, or says how to get it."""
    try:
        import av
        import av.error
    except ImportError as error:
        raise Co3dError("Reading and writing video needs PyAV.", hint=install_command("co3d-compile[video]")) from error
    return av


def reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
