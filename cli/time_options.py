"""The options that say how time is treated: `co3d-compile` compiles with them, other commands that compile too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from co3d_compile.cli.common import MODEL, TIME, Option, option
from co3d_compile.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def window_option(command: F) -> F:
    """``--window``"""
    return option(
        "--window", type=click.IntRange(min=1), group=TIME, metavar="N",
        help="Frames that pools over all time look back on. [default: the clip's own length]",
    )(command)  # fmt: skip


def frames_per_step_option(command: F) -> F:
    """``--frames-per-step``"""
    return option(
        "--frames-per-step", type=click.IntRange(min=1), group=TIME, metavar="P",
        help="Frames that one step takes. [default: the fewest that the strides allow]",
    )(command)  # fmt: skip


def pool_scope_option(command: F) -> F:
    """``--pool-scope``"""
    return option(
        "--pool-scope", type=click.Choice(["frame", "window", "recompute"]), default="frame", show_default=True,
        group=TIME,
        help="What gates (squeeze-and-excitation, norms over time) pool over: the one frame, the newest "
        "window, or the window with all that follows computed again.",
    )(command)  # fmt: skip


def stride_mode_option(command: F) -> F:
    """``--stride-mode``"""
    return option(
        "--stride-mode", type=click.Choice(["step", "dense"]), default="step", show_default=True, group=TIME,
        help="With temporal strides: one result per stride, or one per frame.",
    )(command)  # fmt: skip


def boundary_option(command: F) -> F:
    """``--boundary``"""
    return option(
        "--boundary", type=click.Choice(["stream", "exact"]), default="stream", show_default=True, group=TIME,
        help="exact: the ends of a video are padded as in the clip model (a further input, valid).",
    )(command)  # fmt: skip


def unsupported_option(command: F) -> F:
    """``--unsupported``"""
    return option(
        "--unsupported", type=click.Choice(["window", "error"]), default="window", show_default=True, group=TIME,
        help="What to do where an operator has no meaning on a stream: run it again on a window, or refuse.",
    )(command)  # fmt: skip


def time_dim_option(command: F) -> F:
    """``--time-dim``; `take_time` reads it."""
    return option(
        "--time-dim", "time_dims", type=TimeDimType(), multiple=True, group=TIME, metavar="D",
        help="The time dim of the input, none for one without time. Once for all inputs, or once per input. "
        "[default: 2]",
    )(command)  # fmt: skip


ALL = (
    window_option,
    frames_per_step_option,
    pool_scope_option,
    stride_mode_option,
    boundary_option,
    unsupported_option,
    time_dim_option,
)
NAMES = ("window", "frames_per_step", "pool_scope", "stride_mode", "boundary", "unsupported")


def time_options(command: F) -> F:
    """All of them."""
    for add in reversed(ALL):
        command = add(command)
    return command


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


def take_time(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``co3d.compile`` that these options give; takes the options out of ``options``."""
    dims: tuple[int | None, ...] = options.pop("time_dims") or (2,)
    time_dim = dims[0] if len(dims) == 1 and dims[0] is not None else list(dims)
    return {"time_dim": time_dim, **{name: options.pop(name) for name in NAMES if name in options}}


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
