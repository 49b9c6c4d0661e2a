"""``co3d run MODEL.onnx --source …``: a compiled model on a video, a camera, a stream, pictures or a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from co3d_compile.cli.common import (
    COUNT,
    FILE,
    FILE_OR_STDOUT,
    FOLDER,
    OUTPUT,
    SOURCE,
    Command,
    Options,
    Stopped,
    hush,
    json_option,
    on_signals,
    option,
    plain_option,
    print_json,
    stderr,
    stdout,
    verbose_option,
)
from co3d_compile.cli.event_options import event_options, take_events
from co3d_compile.cli.feature_run import run_features
from co3d_compile.cli.output_file import keep_apart
from co3d_compile.cli.picture_options import picture_options, take_pictures
from co3d_compile.cli.prediction_sinks import Sinks
from co3d_compile.cli.run_display import Live, print_result, result_of
from co3d_compile.errors import LoadError, UsageError
from co3d_compile.media.frame_source import Source
from co3d_compile.media.predictor import Predictor

EPILOG = """\b
Examples:
    co3d run model.onnx --source video.mp4
    co3d run model.onnx --source 0 --show
    co3d run model.onnx --source rtsp://camera/stream --reconnect 60 --jsonl -
    co3d run model.onnx --source video.mp4 --save annotated.mp4 --csv all.csv
    co3d run model.onnx --source video.mp4 --events seen.csv --on 0.6 --gap 1
    ffmpeg -i video.avi -f mpegts - | co3d run model.onnx --source -

\b
Exit codes:
  0    the source has ended, or --frames were taken
  1    a package is missing, or a bug
  2    wrong use of the command
  4    the model or the source cannot be read, or the source broke off
  5    the model takes no pictures, or gives no class scores
  6    an output cannot be written
  130  stopped with Ctrl-C: files are complete up to there (143: with SIGTERM)"""


@click.command(cls=Command, name="run", epilog=EPILOG)
@click.argument("model", type=FILE)
@option(
    "--source",
    required=True,
    group=SOURCE,
    metavar="FILE|0|URL|DIR|-",
    help="A video file, the number of a camera, a URL (rtsp://, http://, …), a folder of pictures, or - for a "
    "video on standard input.",
)
@option(
    "--source-fps",
    type=click.FloatRange(0, 1000, min_open=True),
    group=SOURCE,
    metavar="FPS",
    help="Pictures per second of a folder. [default: the model's rate, or 30]",
)
@option("--frames", type=COUNT, group=SOURCE, metavar="N", help="Stop after N frames of the source.")
@option(
    "--reconnect",
    type=click.FloatRange(min=0, min_open=True),
    group=SOURCE,
    metavar="SECONDS",
    help="Try a camera or URL that ends or breaks off again for so long. The states are kept if it comes back before "
    "an answer has forgotten what was there; else the stream begins anew.",
)
@picture_options
@option(
    "--save",
    "save_path",
    type=FILE,
    group=OUTPUT,
    metavar="OUT.mp4",
    help="Write the video with the predictions drawn into the frames that they speak of.",
)
@option(
    "--csv",
    "csv_path",
    type=FILE_OR_STDOUT,
    group=OUTPUT,
    metavar="FILE",
    help="Write all predictions as CSV; - for standard output.",
)
@option(
    "--jsonl",
    "jsonl_path",
    type=FILE_OR_STDOUT,
    group=OUTPUT,
    metavar="FILE",
    help="Write all predictions as JSON, one a line; - for standard output.",
)
@option(
    "--events",
    "events_path",
    type=FILE_OR_STDOUT,
    group=OUTPUT,
    metavar="FILE",
    help="Write what was seen from when to when: as JSON, one a line, into FILE.jsonl, else as CSV; - for standard "
    "output. --save draws it into the video.",
)
@option(
    "--profile",
    type=FILE,
    group=OUTPUT,
    metavar="FILE.json",
    help="Write ONNX Runtime's profile of the first 100 steps, for co3d inspect --profile.",
)
@option(
    "--features",
    type=FOLDER,
    group=OUTPUT,
    metavar="FOLDER",
    help="Write the outputs of co3d-compile --also (or all) for every frame into numbered files, instead of class "
    "scores. The same command goes on with a run that was broken off.",
)
@option("--every", type=COUNT, default=1, group=OUTPUT, metavar="K", help="--features of each K-th frame.")
@option("--show", is_flag=True, group=OUTPUT, help="Open a window.")
@option(
    "--top",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    group=OUTPUT,
    metavar="K",
    help="How many classes are said.",
)
@option("--output-name", group=OUTPUT, metavar="NAME", help="The output to read. [default: the first]")
@option(
    "--activation",
    type=click.Choice(["auto", "softmax", "sigmoid", "none"]),
    default="auto",
    show_default=True,
    group=OUTPUT,
    help="What makes probabilities of the output. auto: none if it holds a distribution already.",
)
@event_options
@option("--threads", type=COUNT, help="CPU threads of one step. [default: one per core]", group="Other")
@option(
    "--provider",
    "providers",
    multiple=True,
    group="Other",
    metavar="NAME",
    help="ONNX Runtime execution provider, by falling priority. [default: CPUExecutionProvider]",
)
@plain_option
@json_option
@verbose_option
def command(model: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Run a compiled model on a video and say what it sees.

    Preprocessing and labels are taken from the model's file, where co3d-compile has put them; options go before them.
    Times are those of the frames that a result speaks of: the model's delay is taken off.
    """
    del verbose
    if options["features"] is not None:
        if stopped := run_features(model, options, as_json):
            raise Stopped(stopped[0], "the parts that are written are whole")
        return
    _check(model, options)
    finder = take_events(options)
    with contextlib.ExitStack() as stack:
        predictor = stack.enter_context(_predictor(model, options))
        source_fps = options["source_fps"]
        if source_fps is None and Path(options["source"]).is_dir():
            source_fps = predictor.fps or 30.0
        files = {name: options[f"{name}_path"] for name in ("save", "csv", "jsonl", "events")}
        sinks = stack.enter_context(Sinks(files, options["show"], options["top"], finder))
        source = stack.enter_context(Source(options["source"], source_fps, reconnect=options["reconnect"]))
        sinks.begin(source, predictor)
        on_stdout = as_json or sinks.on_stdout
        live = stack.enter_context(Live(source, predictor, options["top"], options["frames"], silent=on_stdout))
        signals = stack.enter_context(stopping(source))
        problem = _loop(source, predictor, sinks, live, options["frames"])
        sinks.finish()
    result = result_of(model, source, predictor, live, sinks)
    if options["profile"] is not None:
        result["files"].append(str(options["profile"]))
    if as_json:
        print_json(result)
    elif not on_stdout:
        print_result(result, stdout())
    if problem is not None:
        raise problem
    if signals:
        raise Stopped(signals[0], "what was written is complete up to there")


def _loop(source: Source, predictor: Predictor, sinks: Sinks, live: Live, limit: int | None) -> Exception | None:
    """Predicts from frames until the end; returns what broke it off after some frames, if anything did."""
    problem, frame = None, None
    try:
        for count, frame in enumerate(source, 1):
            predictions = predictor.push(frame)
            live.add(frame, predictions)
            if not sinks.add(frame, predictions) or count == limit:
                source.stop()
                break
    except LoadError as error:
        if frame is None:
            raise
        problem = error
    except BrokenPipeError as gone:  # whoever read standard output has seen enough
        source.stop()
        hush()
        return gone
    predictions = predictor.finish()
    live.add(None, predictions)
    sinks.add(None, predictions)
    return problem


def _check(model: Path, options: Options) -> None:
    """Checks what can be known of the outputs before anything is opened."""
    outputs = [options[key] for key in ("save_path", "csv_path", "jsonl_path", "events_path", "profile")]
    keep_apart(outputs, source=options["source"], model=model, labels=options["labels"])
    if str(options["save_path"]) == "-":
        raise UsageError("--save writes a file: a video cannot go to standard output.")


def _predictor(model: Path, options: Options) -> Predictor:
    if not model.is_file():
        raise LoadError(f"There is no file {model}.")
    preprocess, labels = take_pictures(options)
    return Predictor(
        model,
        preprocess=preprocess,
        labels=labels,
        output=options["output_name"],
        activation=options["activation"],
        providers=options["providers"] or None,
        threads=options["threads"],
        profile=options["profile"],
        finite="reset",
        layout=options["model_layout"],
    )


@contextlib.contextmanager
def stopping(source: Source) -> Iterator[list[int]]:
    """Ends the source at the first signal, so that files are finished, and the process at the second.

    Gives the signals.
    """
    seen: list[int] = []

    def stop(number: int) -> None:
        seen.append(number)
        source.stop()
        if len(seen) > 1:
            raise Stopped(number)
        with contextlib.suppress(OSError):
            click.echo("finishing … (again: end without files)", file=stderr())

    with on_signals(stop):
        yield seen
