"""The report as a person reads it. It is made from the dict that ``--json`` prints, and from nothing else."""

from __future__ import annotations

from typing import Any, NoReturn, TextIO, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from co3d_compile.cli.common import Report, join
from co3d_compile.report.facts import (
    cost_facts,
    operator_place,
    region_text,
    stream_facts,
    time_facts,
    verification_text,
)
from co3d_compile.report.latency import seconds_text
from co3d_compile.support.readable_numbers import bytes_text, plural

NARROWEST = 100  # where the output is no terminal: a log, a pipe


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Prints, into a file or a pipe without the blanks that fill up the lines of a table."""
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as text:
            super().print(*objects, **options)
        self.file.write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))
        self.file.flush()

    def on_broken_pipe(self) -> NoReturn:
        """Raises BrokenPipeError. Rich would end the process, and take another stream for standard output."""
        raise BrokenPipeError


def console_for(stream: TextIO) -> Console:
    """Gives a rich console that writes to a stream, wide enough in a pipe. Square brackets in a text are no markup."""
    console = _Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = NARROWEST
    return console


def show(stream: TextIO, *parts: RenderableType | None) -> None:
    """Prints what there is of the parts, with a blank line between two."""
    there = [part for part in parts if part is not None]
    between = [each for part in there for each in ("", part)]
    console_for(stream).print(Group(*between[1:]))


def print_summary(report: Report, stream: TextIO, verbose: int = 0) -> None:
    """Prints the report of one compilation."""
    gates = rows_table("Gates", "module", "pooled over")
    for row in report["gates"]:
        gates.add_row(row["module_path"], row["scope"])
    notes = [Text.assemble(("note: ", "yellow"), note) for note in [*report["source"]["notes"], *report["warnings"]]]
    show(
        stream,
        _facts(report),
        _actions(report["actions"]) if report["actions"] else None,
        delays(report["delays"], report["fps"], None if verbose else 10),
        _limited(report["limited"]) if report.get("limited") else None,
        gates if report["gates"] and verbose else None,
        regions_table(report.get("regions", [])),
        recomputed_table(report["recomputed"], None if verbose else 10),
        Group(*notes) if notes else None,
    )


Row: TypeAlias = tuple[str, str | Text | None]


def facts_table(*rows: Row) -> Table:
    """Lays out two columns without lines: a name and what is so. A row without text is left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        if text:
            table.add_row(name, text)
    return table


def rows_table(title: str, *columns: str) -> Table:
    """Makes a table of rows under a title."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.min_width = len(title)
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table


def _facts(report: Report) -> Table:
    source, seconds = report["source"], report["seconds"]
    spent = join([f"{stage} {value:.1f}" for stage, value in seconds.items() if value >= 0.05])
    file = f"{report['output']}, {bytes_text(report['file_bytes'])}" if report["output"] else "none"
    return facts_table(
        *time_facts(report),
        ("Model", f"{source['model']} ({source['kind']}), {plural(report['operators'], 'operator')}"),
        *stream_facts(report, report["fps"]),
        *cost_facts(report),
        ("Verification", verification(report["verification"])),
        ("File", file),
        ("Seconds", f"{sum(seconds.values()):.1f}" + (f" ({spent})" if spent else "")),
    )


def _actions(rows: list[Report]) -> Table:
    table = rows_table("What was done", "operator", "count", "action")
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(row["operator"], str(row["count"]), row["action"])
    return table


def delays(rows: list[Report], fps: float | None, limit: int | None) -> Table | None:
    """Lists the modules that an answer waits for, those that add most first; None: there are none."""
    if not rows:
        return None
    table = rows_table("What makes answers late", "frames", "operator", "module")
    table.columns[0].justify = "right"
    most = sorted(rows, key=lambda row: -row["frames"])
    for row in most[:limit]:
        table.add_row(f"{row['frames']:+}", row["operator"], row["module_path"] or "the model")
    if left := most[limit or len(most) :]:
        table.add_row(f"{sum(row['frames'] for row in left):+}", "", f"{len(left)} more (-v)")
    table.add_row("", "", f"in all {seconds_text(sum(row['frames'] for row in rows), fps)}")
    return table


def regions_table(rows: list[Report]) -> Table | None:
    """Lists what is local in time; None: nothing is."""
    if not rows:
        return None
    table = rows_table("Local in time: run on a few entries at every step", "region", "reach and cost")
    for row in rows:
        table.add_row(operator_place(row), region_text(row))
    return table


def _limited(rows: list[Report]) -> Table:
    table = rows_table("Reads less of the future", "operator", "module", "how", "weights concerned")
    for row in rows:
        later, dropped = row["later"], row["dropped"]
        how = f"stands later by {later}" if later else f"{plural(dropped, 'tap')} less"
        table.add_row(row["operator"], row["module_path"] or "the model", how, f"{row['share']:.0%}")
    return table


def recomputed_table(rows: list[Report], limit: int | None = None) -> Table | None:
    """Gives what runs again on a window; None: nothing does. A contract does not say how many bytes the window has."""
    if not rows:
        return None
    known = ["bytes"] if "bytes" in rows[0] else []
    table = rows_table("Recomputed on a window at every step", "operator", "module", *known, "reason")
    for row in rows[:limit]:
        size = [bytes_text(row[name]) for name in known]
        table.add_row(row["operator"], row["module_path"] or "the model", *size, row["reason"])
    if limit is not None and len(rows) > limit:
        table.add_row(f"and {len(rows) - limit} more (-v)")
    return table


def verification(result: Report | None) -> Text:
    """Writes one line on a verification: passed or not, by how much, and beside what."""
    if result is None:
        return Text("skipped", style="yellow")
    if result["passed"]:
        return Text.assemble(("passed", "green"), f", {verification_text(result)}")
    return Text.assemble(("FAILED", "bold red"), f" {verification_text(result)}")


def reason(result: Report) -> str:
    """Says why a verification failed, and which operator is to blame if that is known."""
    found = result.get("bisection")
    return f"{result['reason']} {found['message']}" if found else str(result["reason"])
