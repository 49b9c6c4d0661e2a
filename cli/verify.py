"""``co3d verify MODEL.onnx --against MODEL``: a compiled file beside the untouched model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from co3d_compile.cli.common import (
    COUNT,
    FILE,
    OUTPUT,
    SOURCE,
    Command,
    Options,
    Report,
    json_option,
    option,
    print_json,
    stdout,
    verbose_option,
)
from co3d_compile.cli.error_chart import errors_chart
from co3d_compile.cli.model_options import against_option, load_model, model_options
from co3d_compile.cli.output_file import Output, keep_apart
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import facts_table, reason, show, verification
from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import UsageError, VerificationError
from co3d_compile.runtime.stored_metadata import read_contract
from co3d_compile.support.readable_numbers import bytes_text, plural

LONG = 10_000
EPILOG = """\b
What is checked:
  States start at NaN. From the step on that the file names as warmed up,
  every value must be finite and equal to what the model itself gives at that
  place of one long clip; errors are in standard deviations of the output. If
  values are wrong, intermediate results are compared too, until the first
  operator is found whose inputs are right and whose result is not.

\b
Examples:
  Random frames:
    co3d verify model.onnx --against model.pt2
  A model from code, with its weights:
    co3d verify model.onnx --against package.module:factory \\
        --weights weights.pth
  The frames that co3d run would feed, and the error over time as a picture:
    co3d verify model.onnx --against model.pt2 --video video.mp4 \\
        --plot errors.svg
  Does anything build up over time?
    co3d verify model.onnx --against model.pt2 --long

\b
Exit codes:
  0    it agrees
  1    a package is missing, or a bug
  2    wrong use; the file is of another model; the video is too short
  3    it differs, or there is nothing to compare with
  4    the file, the model or the video cannot be read
  5    --video, and the model takes no pictures
  6    the plot cannot be written
  130  stopped with Ctrl-C (143: with SIGTERM)"""


@click.command(cls=Command, name="verify", epilog=EPILOG, context_settings={"max_content_width": 110})
@click.argument("compiled", metavar="MODEL.onnx", type=FILE)
@against_option
@model_options
@option(
    "--video",
    metavar="FILE",
    group=SOURCE,
    help="Compare on a video instead of random frames, prepared as the file says, as co3d run does.",
)
@option(
    "--steps",
    type=COUNT,
    metavar="N",
    group=SOURCE,
    help="Steps to run behind the warm-up. Up to 32 are all compared, of more nine segments from the first to the "
    "last. [default: a few, with --video 32]",
)
@option("--long", "is_long", is_flag=True, group=SOURCE, help=f"A long run, to see drift: --steps {LONG}.")
@option("--seed", type=int, default=0, show_default=True, group=SOURCE, metavar="S", help="Seed of the random frames.")
@option(
    "--plot",
    type=FILE,
    group=OUTPUT,
    metavar="OUT.svg",
    help="Write the error over time as a picture: .svg, .png or .html. Also if the file differs.",
)
@option(
    "--bisect/--no-bisect",
    default=True,
    show_default=True,
    group=OUTPUT,
    help="If values are wrong, look for the first operator that differs.",
)
@json_option
@verbose_option
def command(compiled: Path, against: str, plot: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Compare a compiled model with the original.

    MODEL.onnx runs in ONNX Runtime beside the model it was compiled from, and every result is compared.
    """
    how = {name: options.pop(name) for name in ("video", "steps", "is_long", "seed", "bisect")}
    keep_apart([plot], model=compiled, original=against, video=how["video"], weights=options["weights"])
    _check(plot, how)
    info, weights = read_contract(compiled), options["weights"]
    with Progress(verbose) as progress:
        progress("load")
        loaded = load_model(against, options, info)
        found = _verify(compiled, info, loaded, how, progress)
        if plot is not None:
            found.plot(plot, f"{compiled.name} against {against}")
    result: Report = found.to_dict()
    result["notes"] = [*loaded.notes, *result["notes"]]
    if as_json:
        print_json({**result, "model": str(compiled), "against": against, "video": how["video"]})
    else:
        _print(result, compiled, f"{against} ({loaded.kind})", how, plot)
    if not result["passed"]:
        drawn = loaded.kind.startswith("factory") and weights is None
        hint = "Are the weights the same? Without --weights a factory mostly draws new ones." if drawn else None
        raise VerificationError(f"{compiled} differs from {against}: {reason(result)}", hint=hint)


def _check(plot: Path | None, how: Options) -> None:
    """Checks what can be known before the long work."""
    if how["is_long"]:
        if how["steps"] is not None:
            raise UsageError(f"--long is --steps {LONG}.", hint="Give one of them.")
        how["steps"] = LONG
    if plot is not None:
        from co3d_compile.verification.error_plot import check_plot

        check_plot(plot)
        Output(plot)


def _verify(compiled: Path, info: Contract, loaded: Any, how: Options, progress: Progress) -> Any:
    from co3d_compile.verification.verify_model import verify

    def forward(stage: str, done: int, total: int) -> None:
        progress("bisect" if stage == "bisect" else "verify", done, total)

    progress("verify")
    with _frames(info, how) as (frames, steps):
        return verify(
            compiled,
            loaded.program,
            loaded.example_inputs,
            steps=steps,
            frames=frames,
            seed=how["seed"],
            bisect=how["bisect"],
            progress=forward,
        )


@contextlib.contextmanager
def _frames(info: Contract, how: Options) -> Iterator[tuple[Any, int | None]]:
    """Gives the steps of the video, and how many there are to run: no more than it claims to have."""
    if how["video"] is None:
        yield None, how["steps"]
        return
    from co3d_compile.media.frame_source import Source
    from co3d_compile.media.video_steps import Feed

    feed = Feed(info)
    with Source(how["video"]) as source:
        steps = how["steps"]
        if steps is not None and source.total is not None:
            rate = (feed.pictures.preprocess[0].fps or source.fps or 1.0) / (source.fps or 1.0)
            steps = max(1, min(steps, int(source.total * rate) // feed.pulse.frames - info.warmup_steps))
        yield feed.steps(source), steps


def _print(result: Report, compiled: Path, against: str, how: Options, plot: Path | None) -> None:
    frames = how["video"] if how["video"] is not None else f"random (seed {how['seed']})"
    found = result["bisection"]
    table = facts_table(
        ("Model", str(compiled)),
        ("Against", against),
        ("Frames", f"{frames}, {plural(result['streamed'], 'step')}"),
        ("Verification", verification(result)),
        ("Start", _start(result)),
        ("Drift", _drift(result) if result["memory"] else None),
        *(("Note", note) for note in result["notes"]),
        ("Bisection", Text(found["message"], "red") if found else None),
    )
    chart = errors_chart(result["errors"], result["tolerance"]) if result["errors"] else None
    show(stdout(), table, chart, f"{plot} written" if plot is not None else None)


def _start(result: Report) -> str:
    """Says what became of the NaN that the states had."""
    if not result["nan_states"]:
        return "no state could start at NaN"
    at = result["finite_from"]
    became = "and not even the last output was finite" if at is None else f"outputs finite from step {at} on"
    return f"{plural(result['nan_states'], 'state')} at NaN, {became}; the file says from {result['warmup_steps']}"


def _drift(result: Report) -> str:
    """Writes the error at the start and at the end of a long run, and how much memory it takes."""
    from co3d_compile.verification.error_plot import runs
    from co3d_compile.verification.findings import StepError

    parts = runs(tuple(StepError(**e) for e in result["errors"]))
    ends = [(part[0].step, max(e.relative for e in part)) for part in (parts[0], parts[-1])]
    (first, before), (last, behind) = ends
    start, end = (bytes_text(result["memory"][key]) for key in ("start", "end"))
    return f"error {before:.1e} at step {first}, {behind:.1e} at step {last}; memory {start}, then {end}"
