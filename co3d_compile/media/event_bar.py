"""The bar of events over time that is drawn into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from co3d_compile.media.events import Event

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font: TypeAlias = FreeTypeFont | ImageFont

SPAN = 30.0  # seconds from the left end to the right end, which is now
GROUND, TEXT = (16, 18, 22), (16, 18, 22)
COLORS = ((64, 156, 255), (255, 178, 64), (96, 208, 128), (240, 110, 130), (180, 140, 255), (90, 205, 215))


def draw_events(
    draw: ImageDraw, size: tuple[int, int], events: Sequence[Event], seconds: float, font: Font, height: int
) -> None:
    """Draws the events of the last half minute along the upper edge, what is seen now at the right end."""
    width = size[0]
    draw.rectangle((0, 0, width, height), GROUND)
    for event in events:
        left, right = (width * (1 + (min(at, seconds) - seconds) / SPAN) for at in (event.begin, event.end))
        if right <= 0 or event.begin > seconds:
            continue
        left, right = max(0.0, left), max(right, left + 1)
        draw.rectangle((left, 1, right, height - 1), COLORS[event.index % len(COLORS)])
        name = shortened(event.label, draw, font, right - left - 4)
        draw.text((left + 2, height // 6), name, TEXT, font)


def shortened(text: str, draw: ImageDraw, font: Font, room: float) -> str:
    """Cuts a text down to as much of its beginning as there is room for."""
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "…", font) > room:
        text = text[:-1]
    return text + "…" if draw.textlength("…", font) <= room else ""
