"""What every command shares: options in groups, one line per mistake, exit codes, signals."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeAlias, TypeVar

import click

from co3d_compile.errors import Co3dError
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.readable_numbers import did_you_mean
from co3d_compile.version import __version__

# The options of a command by their names, and a report as JSON data.
Options: TypeAlias = dict[str, Any]
Report: TypeAlias = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])
INTERNAL_ERROR, USAGE_ERROR, OUTPUT_ERROR, SIGNALLED = 1, 2, 6, 128
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LONGEST = 2000  # characters of an error
# Headings of options in --help, in this order.
MODEL, TIME, OUTPUT, OTHER = "Where the model comes from", "How time is treated", "Output", "Other"
SOURCE, PICTURE = "Where the frames come from", "How a picture becomes a frame"
EVENTS = "What an event is"
PLACE, LIMITS = "Where and how it runs", "What clients may do"
GROUPS = (MODEL, SOURCE, TIME, PICTURE, EVENTS, PLACE, LIMITS, OUTPUT, OTHER)
EXIT_CODES = """\b
Exit codes:
  0    done
  1    a package is missing, or a bug in the compiler
  2    wrong use of the command
  3    the compiled model does not agree with the original
  4    the model cannot be loaded or captured
  5    something in the model is not supported, or a pass failed
  6    the output cannot be written
  130  stopped with Ctrl-C (143: with SIGTERM)"""


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int, state: str = "nothing was written") -> None:
        self.number = number
        self.state = state


class Option(click.Option):
    """An option that is listed under a heading of its group; a number is shown as ``N`` unless it has a word."""

    def __init__(self, *args: Any, group: str = OTHER, **kwargs: Any) -> None:
        if isinstance(kwargs.get("type"), (click.IntRange, click.FloatRange)) and kwargs.get("metavar") is None:
            kwargs["metavar"] = "N"
        super().__init__(*args, **kwargs)
        self.group = group


def option(*names: str, group: str, **kwargs: Any) -> Callable[[F], F]:
    """Makes a ``click.option`` with the heading under which ``--help`` lists it."""
    return click.option(*names, cls=Option, group=group, **kwargs)


def together(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Makes one decorator of several options, in the order in which ``--help`` lists them."""

    def add(command: F) -> F:
        for each in reversed(options):
            command = each(command)
        return command

    return add


FILE = click.Path(path_type=Path)
FILE_OR_STDOUT = click.Path(path_type=Path, allow_dash=True)
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(min=1)
verbose_option = option("-v", "--verbose", count=True, group=OTHER, help="Say more; -vv also shows tracebacks.")
plain_option = option(
    "--plain",
    "model_layout",
    flag_value="plain",
    default="auto",
    group=OTHER,
    help="Run the file as it is, and not in the layout of this machine's kernels where that is faster.",
)
json_option = option("--json", "as_json", is_flag=True, group=OUTPUT, help="Print the report as JSON.")
version_option = click.version_option(__version__, "--version", message="co3d-compile %(version)s", cls=Option)


class OneLineMain(click.Command):
    """A command that answers a mistake on the command line with one line instead of click's three."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except click.ClickException as error:
            say(f"error: {_mistake(error, self)}")
            code = USAGE_ERROR
        except click.Abort:  # Ctrl-C before the command has begun, while its module is imported
            code = say_why(Stopped(signal.SIGINT))
        sys.exit(code if isinstance(code, int) else 0)


class Command(OneLineMain):
    """A command whose errors become one line and an exit code, and whose options stand in groups.

    Every command has an option ``verbose``: given twice it shows tracebacks and what the libraries say.
    """

    def invoke(self, ctx: click.Context) -> Any:
        verbose = ctx.params.get("verbose", 0)
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  closed by whoever started this
        ctx.meta[__name__] = sys.stdout, sys.stderr
        try:
            with stoppable(), quiet(verbose):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            hush()
            ctx.exit(SIGNALLED + signal.SIGPIPE)
        except BaseException as error:
            if verbose >= 2:
                traceback.print_exc()
            ctx.exit(say_why(error))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        given = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        options = [(getattr(each, "group", OTHER), each.get_help_record(ctx)) for each in given]
        own = [group for group, _ in options if group != OTHER]
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in (*GROUPS[:-1], *own, OTHER)}
        for group, record in options:
            if record is not None:
                groups[group].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def explain(error: BaseException) -> tuple[str, int]:
    """Says what to tell the user about an exception, and the exit code."""
    if isinstance(error, Stopped):
        return f"stopped by {signal.Signals(error.number).name}; {error.state}", SIGNALLED + error.number
    if isinstance(error, Co3dError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory", INTERNAL_ERROR
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The output cannot be written: {error.strerror}.", OUTPUT_ERROR
    if isinstance(error, SystemError) and isinstance(error.__cause__, Stopped):  # code in C that a signal fell into
        return explain(error.__cause__)
    if isinstance(error, ModuleNotFoundError) and (extra := _extra(error.name)):
        return f"This needs {error.name}, which is not installed. {install_command(extra)}", INTERNAL_ERROR
    what = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return f"internal: {what} (a bug in co3d-compile; -vv shows where, please report it)", INTERNAL_ERROR


def _extra(module: str | None) -> str | None:
    """Says what to install for a package of which a module is missing; None: it is none of ours."""
    from co3d_compile.cli.features import FEATURES

    package = (module or "").split(".")[0]
    return next((install for _, packages, install in FEATURES if package in packages), None)


def say_why(error: BaseException) -> int:
    """Says why a command ends, which is no error if it was told to; returns the exit code."""
    message, code = explain(error)
    say(message if code > SIGNALLED else f"error: {message}")
    return code


def say(message: str) -> None:
    """Prints one line on stderr, however much a file from elsewhere has put into it."""
    line = " ".join(message.splitlines())
    click.echo(line if len(line) <= LONGEST else line[: LONGEST - 2] + " …", err=True)


def _mistake(error: click.ClickException, command: click.Command) -> str:
    """Says what is wrong with a command line, and where help is."""
    ctx = error.ctx if isinstance(error, click.UsageError) and error.ctx else None
    message, where = error.format_message(), f"{ctx.command_path if ctx else command.name} --help"
    if ctx and isinstance(error, click.NoSuchOption):
        names = [name for parameter in ctx.command.get_params(ctx) for name in parameter.opts]
        message = f"There is no option {error.option_name!r}. {did_you_mean(error.option_name, names) or ''}".rstrip()
    end = "" if message.endswith((".", "?")) else "."
    return message if where in message else f"{message}{end} Try {where}."


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns signals that end the process into `Stopped`, so that temporary files are removed on the way out."""

    def stop(number: int) -> NoReturn:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    with on_signals(stop):
        yield


@contextlib.contextmanager
def on_signals(handle: Callable[[int], object]) -> Iterator[None]:
    """Has the signals that end a process call this instead; in the main thread, elsewhere they are someone else's."""
    mine = ENDING if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, lambda number, _: handle(number)) for number in mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def quiet(verbose: int) -> Iterator[None]:
    """Keeps what libraries log, warn and print off the user's screen; what matters stands in the report.

    torch.export prints whole graphs. With -v prints are shown, on stderr: stdout is for the report.
    """
    shown: TextIO = sys.stderr if verbose else io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), warnings.catch_warnings():
        if verbose >= 2:
            yield
            return
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def stdout() -> TextIO:
    """Finds the real stdout, past `quiet`."""
    stream: TextIO = click.get_current_context().meta[__name__][0]
    return stream


def stderr() -> TextIO:
    """Finds the real stderr, past `quiet`."""
    stream: TextIO = click.get_current_context().meta[__name__][1]
    return stream


def hush() -> None:
    """Lets what is still written to standard output go nowhere: nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout().fileno())


def print_json(data: Any) -> None:
    """Prints strict JSON on stdout: what is not finite is null."""
    click.echo(json.dumps(_finite(data), indent=2, allow_nan=False), file=stdout())


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def join(items: Sequence[object]) -> str:
    """Joins items by commas."""
    return ", ".join(map(str, items))
