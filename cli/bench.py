"""``co3d bench MODEL``: milliseconds per frame, the clip model beside what it compiles to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from co3d_compile.bench.timing import COMPILED, SIDES, bench_file
from co3d_compile.cli.common import (
    COUNT,
    FILE,
    OTHER,
    OUTPUT,
    Command,
    Report,
    join,
    json_option,
    option,
    print_json,
    stdout,
    verbose_option,
)
from co3d_compile.cli.model_options import is_source, load_model, model_options
from co3d_compile.cli.output_file import Output, keep_apart
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import facts_table, rows_table, show
from co3d_compile.cli.time_options import (
    frames_per_step_option,
    refuse_options,
    stride_mode_option,
    take_time,
    time_dim_option,
)
from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.runtime.stored_metadata import read_contract
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.readable_numbers import bytes_text, number_text, plural

CHARTS = (".svg", ".png", ".pdf")


@click.command(cls=Command, name="bench")
@click.argument("model")
@option(
    "--sides",
    metavar="LIST",
    group=OTHER,
    help=f"What to time, separated by commas, of {', '.join(SIDES)}. [default: all]",
)
@option("--rounds", type=COUNT, default=3, show_default=True, group=OTHER, help="Turns of each side.")
@option(
    "--seconds",
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    group=OTHER,
    help="Seconds of one turn.",
)
@option("--threads", type=COUNT, default=2, show_default=True, group=OTHER, help="CPU threads of each side.")
@stride_mode_option
@frames_per_step_option
@time_dim_option
@option(
    "--chart",
    type=FILE,
    group=OUTPUT,
    metavar="OUT.svg",
    help="Draw the milliseconds; .png and .pdf work too. Needs matplotlib.",
)
@model_options
@json_option
@verbose_option
def command(model: str, sides: str | None, chart: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Time a clip model, and what it compiles to, side by side.

    MODEL is what co3d-compile takes, or a compiled file, which is timed alone. Each side runs in a process of its own,
    and the sides take turns. Times are per new frame. Nothing else should run meanwhile.

    \b
    Examples:
      co3d bench model.pt2
      co3d bench model.pt2 --sides clip,step,floor --rounds 10 --chart times.svg
      co3d bench model.onnx --threads 4
    """
    keep_apart([chart], model=model, weights=options["weights"])
    drawing = _drawing(chart)
    timing = {key: options.pop(key) for key in ("rounds", "seconds", "threads")}
    how = take_time(options)
    with Progress(verbose, announced=True) as progress:
        progress("load")
        if is_source(model):
            loaded = load_model(model, options)
            from co3d_compile.bench.bench_model import bench

            wanted = [side.strip() for side in sides.split(",")] if sides else list(SIDES)
            result = bench(loaded.program, loaded.example_inputs, sides=wanted, progress=progress, **timing, **how)
        else:
            _check_compiled(model, sides)
            result = bench_file(Path(model), progress=progress, **timing)
    result = {"model": model, **result}
    if drawing is not None:
        with drawing.writing() as file:
            _draw(result, file)
    if as_json:
        print_json(result)
    else:
        _show(result)


def _check_compiled(model: str, sides: str | None) -> None:
    """Refuses what asks for more than to time the compiled file alone."""
    read_contract(Path(model))
    refuse_options(model)
    if sides not in (None, "step"):
        raise UsageError(
            f"{model} is compiled: it is timed alone, without --sides.",
            hint="Give the model that it was compiled from to time other sides.",
        )


def _show(result: Report) -> None:
    whole = next((name for name in ("clip", "pytorch") if name in result["sides"]), "clip")
    clip, floor = (result["sides"].get(name, {}).get("median") for name in (whole, "floor"))
    compared = [f"faster than {whole}"] * bool(clip) + ["of floor"] * bool(floor)
    rows = rows_table("Milliseconds per frame", "side", "median", "quartiles", *compared, "memory")
    for name, side in result["sides"].items():
        low, high = side["quartiles"]
        rows.add_row(
            name,
            f"{side['median']:.2f}",
            f"{low:.2f} to {high:.2f}",
            *([f"{clip / side['median']:.1f}x" if name not in (whole, "floor") else ""] if clip else []),
            *([f"{side['median'] / floor:.2f}" if name in COMPILED else ""] if floor else []),
            bytes_text(side["memory"]),
        )
    box, left_out = result["machine"], result["left_out"]
    why = {text: [name for name, reason in left_out.items() if reason == text] for text in left_out.values()}
    facts = facts_table(
        ("Over the fastest clip", _times(result["ratios"].get("fastest clip/step"))),
        ("Multiply-adds", result.get("work")),
        ("State", bytes_text(result["state_bytes"]) if "work" in result else None),
        *((f"No {join(names)}", text) for text, names in why.items()),
        ("Machine", f"{box['cpu']}, {plural(box['threads'], 'thread')} of {plural(box['cores'], 'core')}"),
        ("Versions", join([f"{name} {number}" for name, number in box["versions"].items()])),
        (
            "Columns",
            "median: half of all calls were faster; quartiles: a quarter was, three quarters were; "
            f"{'of floor: how near to the least that a step could take; ' if floor else ''}"
            "memory: of the process, over an empty one",
        ),
        ("Sides", join([f"{name}: {SIDES[name]}" for name in result["sides"] if name in SIDES])),
        ("Timed", f"{plural(result['rounds'], 'round')} of {result['seconds']:g} s"),
    )
    show(stdout(), rows, facts)


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.1f}x"


def _drawing(chart: Path | None) -> Output | None:
    """Says where the chart is to be written, if one is wanted.

    All that can be wrong with it is told before the timing.
    """
    if chart is None:
        return None
    if chart.suffix.lower() not in CHARTS:
        raise UsageError(f"{chart} is no name for a chart.", hint=f"It must end with {', '.join(CHARTS)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise Co3dError("--chart needs matplotlib.", hint=install_command("co3d-compile[plot]")) from error
    return Output(chart)


def _draw(result: Report, file: Path) -> None:
    from matplotlib.figure import Figure

    names = list(result["sides"])
    medians = [result["sides"][name]["median"] for name in names]
    figure = Figure(figsize=(7, 0.6 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, medians, color=["#3b82c4" if n in COMPILED else "#9aa0a8" for n in names])
    axes.bar_label(bars, [number_text(value) for value in medians], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per frame")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format=file.suffix.lower().removeprefix("."))
