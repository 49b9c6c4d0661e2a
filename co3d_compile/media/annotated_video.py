"""Draws predictions into the pictures of a video, and writes it. Needs PyAV and Pillow."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from co3d_compile.errors import Co3dError
from co3d_compile.media.event_bar import SPAN, draw_events, shortened
from co3d_compile.media.events import Event, EventFinder
from co3d_compile.media.video import Image, VideoFrame, VideoWriter, resize
from co3d_compile.support.install_hint import install_command

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.ImageFont import FreeTypeFont, ImageFont

    from co3d_compile.media.predictor import Prediction

LONGEST = 1280  # pixels of the longer side; larger pictures are made smaller
SMALLEST = 320  # pixels of the shorter side; on smaller ones no text can be read
BAR, GROUND, TEXT, DIM = (64, 156, 255), (16, 18, 22), (245, 246, 248), (165, 170, 178)


class AnnotatedVideo:
    """A video file with the frames of a source, each with the prediction that speaks of it.

    A prediction comes later than its frame by the model's delay, so frames wait until theirs is there. All pictures
    have the size of the first one: of another size (a stream may change it) they are fitted in, with bars.

    Args:
        path: The file to write, by its ending: mp4, mkv, ….
        fps: The frame rate that players are told; each frame keeps its own time.
        top: How many classes are drawn.
        events: Finds the events that are drawn as a bar over the last half minute. Default: no bar.
    """

    def __init__(self, path: str | Path, fps: float = 30.0, top: int = 3, events: EventFinder | None = None) -> None:
        pillow()
        self._writer = VideoWriter(path, fps)
        self._top, self._finder = top, events
        self._events: list[Event] = []
        self._waiting: deque[VideoFrame] = deque()
        self._shown: Prediction | None = None
        self._size: tuple[int, int] | None = None

    def add(self, frame: VideoFrame | None, predictions: list[Prediction]) -> None:
        """Takes the next frame (None: there is none any more) and the predictions that it brought."""
        if frame is not None:
            self._size = self._size or video_size(*frame.image.shape[:2])
            self._waiting.append(VideoFrame(fitted(frame.image, *self._size), frame.time, frame.index))
        for prediction in predictions:
            self._write_before(prediction.frame)
            self._shown = prediction
            if self._finder is not None:
                self._events += self._finder.add(prediction)

    def close(self) -> None:
        """Writes what waits, and finishes the file."""
        try:
            self._write_before(None)
        finally:
            self._writer.close()

    def __enter__(self) -> AnnotatedVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_before(self, index: int | None) -> None:
        while self._waiting and (index is None or self._waiting[0].index < index):
            frame = self._waiting.popleft()
            self._events = [event for event in self._events if event.end > frame.time - SPAN]
            events = None if self._finder is None else [*self._events, *self._finder.now()]
            picture = annotated(frame.image, self._shown, frame.time, self._top, events)
            self._writer.write(picture, frame.time)


def annotated(
    image: Image,
    prediction: Prediction | None,
    seconds: float,
    top: int = 3,
    events: Sequence[Event] | None = None,
) -> Image:
    """Draws the time, and bars for the best classes, into the lower left corner of a copy of a picture.

    ``events`` stand in a bar over the last half minute at the upper edge.
    """
    draw_module, image_module = pillow().ImageDraw, pillow().Image
    canvas = image_module.fromarray(image)
    ranked = prediction.top(top) if prediction is not None else []
    unit = max(10, round(min(image.shape[:2]) / 22))
    width, line = min(image.shape[1], 19 * unit), round(1.7 * unit)
    height = line * (len(ranked) + 1) + unit
    left, upper = 0, max(0, image.shape[0] - height)
    panel = image_module.new("RGB", (width, min(height, image.shape[0])), GROUND)
    canvas.paste(
        image_module.blend(canvas.crop((left, upper, width, upper + panel.height)), panel, 0.72), (left, upper)
    )
    draw = draw_module.Draw(canvas)
    font, small = _font(unit), _font(max(8, round(0.8 * unit)))
    margin, y = round(0.6 * unit), upper + round(0.5 * unit)
    starting = prediction is None or prediction.warmup
    draw.text((margin, y), f"{seconds:.2f} s" + ("   warming up" if starting else ""), DIM, small)
    for rank in ranked:
        y += line
        share = min(max(rank.score, 0.0), 1.0) if np.isfinite(rank.score) else 0.0
        color = DIM if starting else BAR
        base = y + line - round(0.35 * unit)
        draw.rectangle((margin, base, margin + round(share * (width - 2 * margin)), base + round(0.2 * unit)), color)
        number = f"{rank.score:.2f}"
        draw.text((width - margin - draw.textlength(number, font), y), number, DIM if starting else TEXT, font)
        room = width - 3 * margin - draw.textlength(number, font)
        draw.text((margin, y), shortened(rank.label, draw, font, room), DIM if starting else TEXT, font)
    if events is not None:
        draw_events(draw, canvas.size, events, seconds, small, line)
    return np.asarray(canvas)


def fitted(image: Image, height: int, width: int) -> Image:
    """Scales a picture into this size, its aspect kept, with black bars where it does not fill it."""
    if image.shape[:2] == (height, width):
        return image
    scale = min(height / image.shape[0], width / image.shape[1])
    tall, wide = (
        min(max(2, round(side * scale)), most) for side, most in zip(image.shape, (height, width), strict=False)
    )
    result = np.zeros((height, width, 3), np.uint8)
    top, left = (height - tall) // 2, (width - wide) // 2
    result[top : top + tall, left : left + wide] = resize(image, tall, wide)
    return result


def video_size(height: int, width: int) -> tuple[int, int]:
    """Chooses even sides for the annotated video: the source's own, unless it is too large, or too small for text."""
    scale = min(max(1.0, SMALLEST / min(height, width)), LONGEST / max(height, width))
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def pillow() -> ModuleType:
    """Imports Pillow, or says how to get it."""
    try:
        import PIL
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise Co3dError("Drawing into pictures needs Pillow.", hint=install_command("co3d-compile[video]")) from error
    return PIL


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont | ImageFont:
    font: FreeTypeFont | ImageFont = pillow().ImageFont.load_default(size)
    return font
