"""``co3d run --features FOLDER``: outputs of a model for every frame, in numbered files."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import click

from co3d_compile.cli.common import Options, Report, on_signals, print_json, stderr, stdout
from co3d_compile.cli.picture_options import take_pictures
from co3d_compile.cli.summary import console_for, facts_table
from co3d_compile.errors import LoadError, UsageError
from co3d_compile.media.feature_parts import FeatureRun
from co3d_compile.media.frame_source import Source
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.readable_numbers import plural

ALONE = ("save_path", "csv_path", "jsonl_path", "events_path", "profile", "show", "reconnect")
EVERY = 1.0  # seconds between two lines


def run_features(model: Path, options: Options, as_json: bool) -> list[int]:
    """Writes the features; returns the signals that ended it early.

    Raises:
        UsageError: Other outputs are asked for too, or the folder is of another run.
    """
    if given := [name for name in ALONE if options[name]]:
        raise UsageError(f"--features goes alone, without --{given[0].removesuffix('_path')}.", hint="Run twice.")
    if not model.is_file():
        raise LoadError(f"There is no file {model}.")
    preprocess, _ = take_pictures(options)
    outputs = [options["output_name"]] if options["output_name"] else []
    providers = options["providers"] or None
    seen: list[int] = []
    start = time.perf_counter()
    with StreamSession(model, providers=providers, threads=options["threads"]) as session:
        every = options["every"]
        run = FeatureRun(
            session, options["features"], options["source"], every=every, outputs=outputs, preprocess=preprocess
        )
        begun = run.begun
        if begun and not as_json:
            click.echo(f"Going on behind frame {begun - 1}, with part {run.parts}.", file=stdout())
        if not run.complete:
            with Source(options["source"], options["source_fps"]) as source:
                _loop(run, source, options["frames"], seen, silent=as_json)
    result: Report = {
        "model": str(model),
        "source": options["source"],
        "folder": str(options["features"]),
        "parts": run.parts,
        "features": run.rows,
        "began_at_frame": begun,
        "complete": run.complete,
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(result)
    else:
        left = "" if run.complete else "; the same command goes on from there"
        facts = (
            ("Features", f"{run.rows} in {plural(run.parts, 'part')}{left}"),
            ("Written", str(options["features"])),
        )
        console_for(stdout()).print(facts_table(*facts))
    return seen


def _loop(run: FeatureRun, source: Source, limit: int | None, seen: list[int], *, silent: bool) -> None:
    """Gives the run each frame. What breaks it leaves the parts that are whole."""

    def stop(number: int) -> None:
        seen.append(number)
        source.stop()
        with contextlib.suppress(OSError):
            click.echo("finishing …", file=stderr())

    said = time.perf_counter()
    with on_signals(stop):
        for frame in source:
            run.add(frame)
            if time.perf_counter() - said >= EVERY and not silent:
                said = time.perf_counter()
                click.echo(f"frame {frame.index}, {run.rows} features in {plural(run.parts, 'part')}", file=stdout())
            if limit is not None and frame.index + 1 >= limit:
                break
    if not seen:
        run.finish()
