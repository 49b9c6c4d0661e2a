"""The options that say how time is treated: `co3d-compile` compiles with them, other commands that compile too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
from click.core import ParameterSource

from co3d_compile.cli.common import COUNT, MODEL, TIME, F, Option, Options, Report, option, together
from co3d_compile.errors import UsageError


class TimeDimType(click.ParamType[Any]):
    """A dim, or ``none`` for an input without time."""

    name = "dim"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or isinstance(value, int) or value.lower() == "none":
            return value if isinstance(value, int) else None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a dim (2 for N, C, T, H, W) nor none.", param, ctx)


class DelayType(click.ParamType[Any]):
    """A delay: ``14`` frames, or ``0.5s``."""

    name = "delay"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value).strip()
        try:
            number = float(text.removesuffix("s")) if text.endswith("s") else int(text)
            if number >= 0:
                return text if text.endswith("s") else int(number)
        except ValueError:
            pass
        self.fail(f"{value!r} is neither a number of frames, such as 14, nor seconds, such as 0.5s.", param, ctx)


def frames_of(delay: int | str | None, fps: float | None) -> int | None:
    """Counts the frames of a delay, rounded down.

    Raises:
        UsageError: It is in seconds, and nothing says how long a frame is.
    """
    if not isinstance(delay, str):
        return delay
    if fps is None:
        raise UsageError(f"--max-delay {delay} is in seconds, and no rate is given.", hint="Give --fps, or frames.")
    return int(float(delay.removesuffix("s")) * fps + 1e-6)


def choice(name: str, values: Sequence[str], help: str) -> Callable[[F], F]:
    """Makes an option with a few values, the first of which is the default."""
    return option(name, type=click.Choice(values), default=values[0], show_default=True, group=TIME, help=help)


window_option = option(
    "--window", type=COUNT, group=TIME, metavar="N",
    help="Frames that pools over all time look back on. [default: the clip's own length]",
)  # fmt: skip
frames_per_step_option = option(
    "--frames-per-step", type=COUNT, group=TIME, metavar="P",
    help="Frames that one step takes. [default: the fewest that the strides allow]",
)  # fmt: skip
stride_mode_option = choice(
    "--stride-mode", ("step", "dense"), "With temporal strides: one result per stride, or one per frame."
)
time_dim_option = option(
    "--time-dim", "time_dims", type=TimeDimType(), multiple=True, group=TIME, metavar="D",
    help="The time dim of the input, none for one without time. Once for all inputs, or once per input. "
         "[default: 2; where the network takes dim 1 for its sequence, this is said]",
)  # fmt: skip
time_options = together(
    window_option,
    frames_per_step_option,
    choice("--pool-scope", ("frame", "window", "recompute"),
           "What gates (squeeze-and-excitation, norms over time) pool over: the one frame, the newest window, or the "
           "window with all that follows computed again."),
    stride_mode_option,
    option("--max-delay", type=DelayType(), group=TIME, metavar="N|SECONDSs",
           help="Frames that an answer may be late, or seconds such as 0.5s where --fps is given: layers read less of "
                "the future until it is so. [default: the network's own delay]"),
    choice("--delay-by", ("fold", "shift", "drop"),
           "How they do: last taps are added to the last one left, kernels stand later, or taps are left out."),
    choice("--box-frame", ("middle", "newest"),
           "Which entry boxes belong to of the window whose features they are cut out of."),
    choice("--boundary", ("stream", "exact"),
           "exact: the ends of a video are padded as in the clip model (a further input, valid)."),
    choice("--recurrence", ("state", "window"),
           "Recurrent layers, and loops that hand values on, run on with the stream, or start again with each window."),
    choice("--unsupported", ("window", "error"),
           "What to do where an operator has no meaning on a stream: run it again on a window, or refuse."),
    time_dim_option,
)  # fmt: skip
_HOW = ("window", "frames_per_step", "pool_scope", "stride_mode", "boundary", "unsupported", "recurrence")
NAMES = (*_HOW, "max_delay", "delay_by", "box_frame")


def refuse_options(model: str) -> None:
    """Refuses the options of a model that is still to be compiled, where a compiled file was given.

    Raises:
        UsageError: One stands on the command line.
    """
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        if not isinstance(parameter, Option) or parameter.group not in (MODEL, TIME) or parameter.name is None:
            continue
        if ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            what = f"{parameter.opts[0]} is for a model that is not compiled yet, and {model} is compiled."
            raise UsageError(what, hint="Give the model that it was compiled from.")


def take_time(options: Options, fps: float | None = None) -> Report:
    """Collects the arguments of ``co3d.compile`` that these options give; takes the options out of ``options``.

    Args:
        options: Those of the command line.
        fps: Frames per second, if that is known.
    """
    dims: tuple[int | None, ...] = options.pop("time_dims")
    time_dim = list(dims) or None if len(dims) != 1 or dims[0] is None else dims[0]
    given = {name: options.pop(name) for name in NAMES if name in options}
    if "max_delay" in given:
        given["max_delay"] = frames_of(given["max_delay"], fps)
    return {"time_dim": time_dim, **given}
