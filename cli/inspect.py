"""``co3d inspect MODEL``: what a model takes, gives and remembers, and what each operator does with time."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from co3d_compile.cli.common import (
    FILE,
    OUTPUT,
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
from co3d_compile.cli.model_options import is_plain_onnx, is_source, load_model, model_options
from co3d_compile.cli.output_file import Output, keep_apart, page_output
from co3d_compile.cli.progress import Progress
from co3d_compile.cli.summary import delays, facts_table, recomputed_table, regions_table, rows_table, show
from co3d_compile.cli.time_options import refuse_options, take_time, time_options
from co3d_compile.contract.model_contract import Contract, StateSpec, resolve
from co3d_compile.contract.stored_report import reading_report, stored_report
from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.media.class_labels import clean_labels
from co3d_compile.report.facts import shape_text, state_text, stream_facts
from co3d_compile.report.latency import delay_rows
from co3d_compile.report.report_rows import shares_by_module, table
from co3d_compile.report.web_page import page
from co3d_compile.runtime.stored_metadata import Stored, read_stored
from co3d_compile.support.readable_numbers import bytes_text, number_text

ITEM_BYTES = {"float16": 2, "float64": 8, "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int64": 8}


@click.command(cls=Command, name="inspect", short_help="Show what a model takes, gives and remembers.")
@click.argument("model")
@option(
    "--html",
    type=FILE,
    group=OUTPUT,
    metavar="OUT.html",
    help="Write everything as one page for a browser, which works offline.",
)
@option(
    "--profile",
    type=FILE,
    group=OUTPUT,
    metavar="FILE.json",
    help="Say what share of the time each operator takes, from ONNX Runtime's profile of a run (co3d run --profile).",
)
@option(
    "--fps",
    type=click.FloatRange(0, 1000, min_open=True),
    group=OUTPUT,
    metavar="FPS",
    help="Frames per second of the source, to say delays in seconds too. [default: what the file says]",
)
@model_options
@time_options
@json_option
@verbose_option
def command(
    model: str,
    html: Path | None,
    profile: Path | None,
    fps: float | None,
    as_json: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Show what a model takes, gives and remembers, and what each operator does with time.

    MODEL is a compiled file, for which no PyTorch is needed, or a model that is not compiled yet, as for co3d-compile.

    \b
    Examples:
      co3d inspect model.onnx
      co3d inspect model.onnx --html report.html
      co3d inspect model.onnx --profile profile.json
      co3d inspect model.pt2 --window 64
    """
    keep_apart([html], model=model, profile=profile, weights=options["weights"])
    output = page_output(html)
    if profile is not None and is_source(model):
        raise UsageError("--profile is of a compiled file.", hint="Compile the model and give the ONNX file.")
    if not is_source(model):
        contract, report = read_stored(Path(model))
        refuse_options(model)
    elif (compiled := _compiled(model, options, verbose, fps, as_json)) is not None:
        contract, report = compiled
    else:
        return
    fps, time = fps or (contract.preprocess or {}).get("fps"), None
    if profile is not None:
        report, time = _timed(stored_report(None) if report is None else report, profile, Path(model))
    if output is not None:
        _write(output, contract, report, time, fps)
    data = json.loads(contract.to_json())
    if as_json:
        data |= {"time": _times(report, time)} if report and time else {}
        print_json({**data, "report": report} if verbose else data)
    elif output is not None:
        click.echo(f"{output.given} written", file=stdout())
    else:
        _show(contract, report, time, _facts(model, contract, data, fps), fps, verbose)


def _show(
    contract: Contract, report: Report | None, time: Report | None, facts: Table, fps: float | None, verbose: int
) -> None:
    """Prints what is known, for people."""
    with reading_report():
        late = delay_rows(table(report, 1)) if report is not None else []
    show(
        stdout(),
        facts,
        delays(late, fps, None if verbose else 10),
        _tree(report, contract, time, everything=verbose > 0) if report is not None else None,
        _states(contract, None if verbose else 20) if contract.states and (verbose or report is None) else None,
        regions_table([asdict(r) for r in contract.regions]),
        recomputed_table([asdict(r) for r in contract.recomputed]),
        _kernels(time) if time is not None else None,
    )


def _compiled(model: str, options: Options, verbose: int, fps: float | None, as_json: bool) -> Stored | None:
    """Compiles a model. Of an ONNX file that does not compile, says what it takes and gives, and returns None."""
    try:
        with Progress(verbose) as progress:
            progress("load")
            loaded = load_model(model, options)
            import co3d_compile as co3d
            from co3d_compile.compiler.program_report import details

            how = take_time(options, fps)
            compiled = co3d.compile(loaded.program, loaded.example_inputs, progress=progress, **how)
    except Co3dError as error:
        if not is_plain_onnx(Path(model)):
            raise
        _describe(model, error, as_json)
        return None
    return compiled.info, details(compiled.report(), compiled.program.notes.survey)


def _describe(model: str, why: Co3dError, as_json: bool) -> None:
    """Prints what an ONNX file that does not compile takes and gives, and why it does not.

    Raises:
        Co3dError: ONNX Runtime does not open it either; it is the reason that was given.
    """
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    try:
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception:
        raise why from None
    nodes = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    sides = {
        side: [{"name": node.name, "shape": list(node.shape), "type": node.type} for node in each]
        for side, each in nodes.items()
    }
    if as_json:
        print_json({"model": model, "compiles": False, "reason": str(why), **sides})
        return
    rows = [
        (title, f"{node['name']} ({', '.join(map(str, node['shape']))}) {node['type']}")
        for title, side in (("Input", "inputs"), ("Output", "outputs"))
        for node in sides[side]
    ]
    show(stdout(), facts_table(("Model", f"{model}, ONNX, not compiled"), *rows, ("Compiles", f"no: {why}")))


def _timed(report: Report, profile: Path, model: Path) -> tuple[Report, Report]:
    """Writes the report with the share of time of each operator, and what ``page`` takes besides."""
    from co3d_compile.report.profile_times import read_times, with_shares

    times = read_times(profile, model)
    with reading_report():
        rows, elsewhere = with_shares(report["table"], times)
    kernels = [
        {"operator": name, "count": times.kernels[name] / times.steps, "milliseconds_step": spent / times.steps / 1e3}
        for name, spent in times.by_operator.most_common()
    ]
    milliseconds = times.total / times.steps / 1e3
    return {**report, "table": rows}, {"milliseconds_step": milliseconds, "elsewhere": elsewhere, "kernels": kernels}


def _times(report: Report, time: Report) -> Report:
    """Writes what ``--json`` says of a profile."""
    rows = [row for row in report["table"] if row["time_share"]]
    operators = [{name: row[name] for name in ("module_path", "operator", "time_share")} for row in rows]
    return {**time, "operators": operators}


def _kernels(time: Report) -> Table:
    table = rows_table("ONNX Runtime's kernels, one step", "operator", "times", "ms", "share")
    for kernel in time["kernels"]:
        spent = kernel["milliseconds_step"]
        share = spent / (time["milliseconds_step"] or 1)
        table.add_row(kernel["operator"], f"{kernel['count']:.0f}", f"{spent:.3g}", f"{share:.1%}")
    return table


def _write(output: Output, contract: Contract, report: Report | None, time: Report | None, fps: float | None) -> None:
    text = page(report if report is not None else stored_report(None), contract, time, fps=fps)
    with output.writing() as file:
        file.write_text(text, encoding="utf-8")


def state_bytes(state: StateSpec) -> int:
    """Counts the bytes of one state of one stream."""
    return math.prod(resolve(state.shape, 1)) * ITEM_BYTES.get(state.dtype, 4)


def _facts(model: str, contract: Contract, data: Report, fps: float | None) -> Table:
    size = f", {bytes_text(Path(model).stat().st_size)}" if Path(model).is_file() else ""
    options, pictures = (
        join([f"{key}={value}" for key, value in (given or {}).items() if value is not None])
        for given in (contract.options, contract.preprocess)
    )
    labels = contract.labels or ()
    more = f", … ({len(labels)})" if len(labels) > 4 else ""
    return facts_table(
        ("Model", f"{model}{size}, compiled by {contract.compiler_version}"),
        *stream_facts(data, fps),
        ("Boundary", contract.boundary),
        ("State", state_text(len(contract.states), sum(map(state_bytes, contract.states)))),
        ("Options", options),
        ("Pictures", pictures),
        ("Labels", join(clean_labels(labels[:4])) + more),
    )


def _tree(report: Report, contract: Contract, time: Report | None, *, everything: bool) -> Tree:
    """Writes what happens over time, by module: only what the compiler changed, or everything."""

    frames = max(contract.frames_per_step.values(), default=1)
    with reading_report():
        rows = table(report, frames)
    what = "Operators" if everything else "What the compiler changed (-v: every operator)"
    if time is not None:
        what += f", and what takes time: {time['milliseconds_step']:.3g} ms per step"
    root = Tree(Text(what, "bold"), guide_style="dim")
    shown = [
        r
        for r in rows
        if r["kind"] != "input"
        and (everything or (r["done"] and r["kind"] == "stream") or r["state_bytes"] or r["time_share"])
    ]
    if not shown:
        root.add(Text("nothing: no operator keeps frames in a way of its own", "dim"))
    paths = [tuple(filter(None, row["module_path"].split("."))) for row in shown]
    sharing = Counter(path[:depth] for path in paths for depth in range(len(path) + 1))
    branches: dict[tuple[str, ...], Tree] = {(): root}
    shares = shares_by_module(rows) if time is not None else {}
    for row, path in zip(shown, paths, strict=True):
        depth = max(d for d in range(len(path) + 1) if sharing[path[:d]] > 1 or d == 0)
        _branch(branches, path[:depth], shares).add(_leaf(row, ".".join(path[depth:])))
    for name, share in (time["elsewhere"] if time is not None else {}).items():
        root.add(Text.assemble((f"{name}  ", "cyan"), (f"{share:.1%}", "yellow"), ("  of no module", "dim")))
    return root


def _branch(branches: dict[tuple[str, ...], Tree], path: tuple[str, ...], shares: dict[Any, float]) -> Tree:
    if path not in branches:
        share = f"  {shares[path]:.1%}" if path in shares else ""
        branches[path] = _branch(branches, path[:-1], shares).add(Text.assemble(path[-1], (share, "yellow")))
    return branches[path]


def _leaf(row: Report, name: str) -> Text:
    text = Text(f"{name}  " if name else "")
    text.append(row["operator"].removeprefix("aten."), "cyan")
    text.append(f"  {row['done']}" if row["done"] else "", "green")
    text.append(f"  {row['time_share']:.1%}" if row["time_share"] else "", "yellow")
    field = f"{row['field']:g}" if row["field"] else "all"
    facts = [f"delay {row['delay']:g}", f"sees {field}"]
    facts += [f"every {row['rate']:g} frames"] if row["rate"] != 1 else []
    facts += [bytes_text(row["state_bytes"])] if row["state_bytes"] else []
    if row["macs_clip"] or row["macs_frame"]:
        facts.append(f"{number_text(row['macs_frame'])} of {number_text(row['macs_clip'])} MAC")
    return text.append("  " + ", ".join(facts), "dim")


def _states(contract: Contract, limit: int | None) -> Table:
    states = rows_table("States", "input", "shape", "dtype", "bytes", "next value from")
    for state in contract.states[:limit]:
        size = bytes_text(state_bytes(state))
        states.add_row(state.input, shape_text(state.shape), state.dtype, size, state.output)
    if limit is not None and len(contract.states) > limit:
        states.add_row(f"and {len(contract.states) - limit} more (-v)")
    return states
