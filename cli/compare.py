"""``co3d compare MODEL.onnx --against MODEL --source VIDEO``: the stream beside the sliding window."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from co3d_compile.cli.common import (
    COUNT,
    FILE,
    OUTPUT,
    SOURCE,
    TIME,
    Command,
    Options,
    Report,
    join,
    json_option,
    option,
    print_json,
    stdout,
    verbose_option,
)
from co3d_compile.cli.model_options import against_option, load_model, model_options
from co3d_compile.cli.output_file import Output, keep_apart
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import facts_table, rows_table, show
from co3d_compile.errors import Co3dWarning
from co3d_compile.media.frame_source import Source
from co3d_compile.runtime.stored_metadata import read_contract

if TYPE_CHECKING:
    from co3d_compile.side_by_side.comparison import Comparison
    from co3d_compile.side_by_side.segments import Segment

EPILOG = """\b
What is compared:
  Each answer of the stream with that of the clip model on the clip that ends
  with the newest frame that the answer is about. They differ by design: each
  layer of the sliding window reads zeros beyond the ends of its clip.

\b
Examples:
  Scores over time:
    co3d compare model.onnx --against model.pt2 --source video.mp4 \\
        --plot scores.png
  Which window is right most often:
    co3d compare model.onnx --against model.pt2 --source video.mp4 \\
        --window 16 --window 64 --labels truth.csv

\b
Exit codes:
  0    compared, however alike they are
  1    a package is missing, or a bug
  2    wrong use; the file is of another model; the video is too short
  4    the file, the model, the video or the labels cannot be read
  5    the model takes no pictures, or gives no class scores
  6    the plot cannot be written
  130  stopped with Ctrl-C (143: with SIGTERM)"""


@click.command(cls=Command, name="compare", epilog=EPILOG, context_settings={"max_content_width": 100})
@click.argument("compiled", metavar="MODEL.onnx", type=FILE)
@against_option
@model_options
@option("--source", required=True, group=SOURCE, metavar="VIDEO", help="A video file, as for co3d run.")
@option(
    "--labels",
    type=FILE,
    group=SOURCE,
    metavar="FILE.csv",
    help="What is true: a CSV file with the columns label, begin and end (seconds). Says how often each is right.",
)
@option("--frames", type=COUNT, group=SOURCE, metavar="N", help="Stop after N frames of the source.")
@option(
    "--every",
    type=COUNT,
    default=1,
    show_default=True,
    group=SOURCE,
    metavar="K",
    help="Compare each K-th answer: the sliding window takes its time.",
)
@option(
    "--window",
    "windows",
    type=COUNT,
    multiple=True,
    group=TIME,
    metavar="N",
    help="Compile it with this window too, and show it beside; may be repeated.",
)
@option("--output-name", group=OUTPUT, metavar="NAME", help="The output to read. [default: the first]")
@option(
    "--plot", type=FILE, group=OUTPUT, metavar="OUT.png", help="Write the scores over time as a picture: .png or .svg."
)
@json_option
@verbose_option
def command(compiled: Path, against: str, plot: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Run the stream beside your sliding window on a video.

    The sliding window is the clip model, on a whole clip for every answer.

    It shows how far their answers agree, how long both take, and, with --labels, how often each is right.
    """
    given = {name: options.pop(name) for name in ("source", "labels", "frames", "every", "windows", "output_name")}
    keep_apart([plot], model=compiled, original=against, video=given["source"], labels=given["labels"])
    if plot is not None:
        from co3d_compile.verification.error_plot import PICTURES, check_plot

        check_plot(plot, PICTURES)
        Output(plot)
    info = read_contract(compiled)
    with Progress(verbose) as progress:
        progress("load")
        loaded = load_model(against, options, info)
        found = _compare(compiled, info, loaded, given, progress)
    if plot is not None:
        from co3d_compile.side_by_side.score_plot import save_scores

        save_scores(plot, found, f"{compiled.name} beside {against}, on {given['source']}")
    result = {"model": str(compiled), "against": against, "source": given["source"], **found.to_dict()}
    result["notes"] = loaded.notes
    if as_json:
        print_json(result)
    else:
        _print(result, plot)


def _compare(compiled: Path, info: Any, loaded: Any, given: Options, progress: Progress) -> Comparison:
    import co3d_compile as co3d
    from co3d_compile.side_by_side.streams_on_video import run_side_by_side
    from co3d_compile.verification.onnx_reading import read_clip_model
    from co3d_compile.verification.verify_model import same_options

    network, examples, _ = read_clip_model(loaded.program, loaded.example_inputs)
    models: dict[str, Any] = {f"stream, window {info.window}" if info.window else "stream": str(compiled)}
    for window in dict.fromkeys(given["windows"]):
        if window == info.window:
            continue
        progress(f"compile for window {window}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Co3dWarning)
            models[f"stream, window {window}"] = co3d.compile(
                network, examples, window=window, preprocess=info.preprocess, labels=info.labels, **same_options(info)
            )
    progress("compare")
    with Source(given["source"]) as source:
        return run_side_by_side(
            models,
            network,
            examples,
            islice(source, given["frames"]),
            output=given["output_name"],
            every=given["every"],
            segments=_truth(given["labels"]),
            progress=lambda done: progress("compare", done, source.total),
        )


def _truth(path: Path | None) -> Callable[[int, Sequence[str]], list[Segment]] | None:
    if path is None:
        return None
    from co3d_compile.side_by_side.segments import read_segments

    return lambda count, labels: read_segments(path, count, labels)


def _print(result: Report, plot: Path | None) -> None:
    rows, known = result["runs"], result["runs"][0]["segments"] is not None
    columns = ["", "same class", "correlation", "ms", *(["frames right", "segments right"] if known else [])]
    table = rows_table(f"Beside the sliding window, {result['answers']} answers", *columns)
    for row in rows:
        cells = [row["name"], _share(row["agreement"]), _number(row["correlation"]), f"{row['milliseconds']:.2f}"]
        if known:
            cells += [_share(row["frames_right"]), f"{row['segments_right']} of {row['segments']}"]
        table.add_row(*cells)
    facts = facts_table(
        ("Model", result["model"]),
        ("Against", result["against"]),
        ("Source", result["source"]),
        *(("Note", note) for note in result["notes"]),
        ("Milliseconds", "of an answer, the sliding window in PyTorch; co3d bench times it in ONNX Runtime too"),
    )
    show(stdout(), table, facts, f"{join([plot])} written" if plot is not None else None)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
