"""What the benchmarks print behind their tables: why a side is missing, and what machine it was."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(table: Table, rows: list[dict[str, Any]], said: list[str], times: str) -> None:
    """Prints a table on standard output, sentences behind it, and what the times are: ``Milliseconds per frame: …``."""
    out = Console(highlight=False)
    out.width = max(out.width, 200)  # a log or pipe has no width
    table.columns[0].no_wrap = True  # names stay whole beside many columns
    out.print(table)
    for sentence in said:
        out.print(sentence)
    box = rows[0]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in box["versions"].items())
    out.print(
        f"{times} over {rows[0]['rounds']} alternating rounds. {box['cpu']}, {box['threads']} threads; {versions}"
    )
