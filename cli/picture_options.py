"""The options that say how a picture becomes a frame: `co3d-compile` stores them, `co3d run` may override them."""

from __future__ import annotations

from typing import Any

import click

from co3d_compile.cli.common import FILE, PICTURE, Options, Report, option, together

NOT_SAID = (
    "note: the model's file does not say how pictures are prepared; values from 0 to 1 are assumed. "
    "co3d-compile --size --mean --std stores it"
)
NAMES = ("size", "mean", "std", "value_range", "channels", "layout", "fps")


class SizeType(click.ParamType[Any]):
    """A size: ``182`` or ``128x171``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        parts = str(value).lower().split("x")
        if not 1 <= len(parts) <= 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
            self.fail(f"{value!r} is neither a shorter side, such as 182, nor HEIGHTxWIDTH.", param, ctx)
        return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)


class NumbersType(click.ParamType[Any]):
    """Numbers for all channels or for each: ``0.45`` or ``0.485,0.456,0.406``."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 0.485,0.456,0.406.", param, ctx)


# What `NAMES` names, and the file of labels.
picture_options = together(
    option("--size", type=SizeType(), group=PICTURE, metavar="SIZE",
           help="Scale the shorter side to so many pixels, or the picture to HEIGHTxWIDTH; then the middle of "
           "the model's own size is cut out. [default: the model's]"),
    option("--mean", type=NumbersType(), group=PICTURE, metavar="M[,M,M]",
           help="Mean of the training, taken off, in units of the value range. [default: 0]"),
    option("--std", type=NumbersType(), group=PICTURE, metavar="S[,S,S]",
           help="Standard deviation of the training, divided by. [default: 1]"),
    option("--value-range", type=NumbersType(), group=PICTURE, metavar="LOW,HIGH",
           help="What black and white become, before mean and std. [default: 0,1]"),
    option("--channels", type=click.Choice(["rgb", "bgr", "gray"]), group=PICTURE,
           help="Order of the colours. [default: from the model's input]"),
    option("--layout", group=PICTURE, metavar="NCTHW",
           help="Dims of one clip. [default: from the model's input]"),
    option("--fps", type=click.FloatRange(0, 1000, min_open=True), group=PICTURE, metavar="FPS",
           help="Frames per second that the model was trained at. [default: whatever the video has]"),
    option("--labels", type=FILE, group=PICTURE, metavar="FILE",
           help="Names of the classes: a line for each, or JSON."),
)  # fmt: skip


def take_pictures(options: Options) -> tuple[Report | None, tuple[str, ...] | None]:
    """Takes preprocessing and labels out of ``options``, as given (None: not). Checks what it can."""
    from co3d_compile.media.class_labels import read_labels

    given = {name: value for name in NAMES if (value := options.pop(name)) is not None}
    labels = options.pop("labels")
    names = None if labels is None else read_labels(labels)
    if given:
        from co3d_compile.media.preprocess import Preprocess

        Preprocess(1, **given)
    return given or None, names
