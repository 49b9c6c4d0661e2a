"""The error of each step as a small chart in the terminal."""

from __future__ import annotations

import math
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from co3d_compile.cli.common import Report
from co3d_compile.cli.summary import rows_table

ROWS, WIDTH = 12, 40
LEFT, RIGHT = -8.0, 0.0  # powers of ten at the ends of a bar


def errors_chart(errors: list[Report], tolerance: float) -> Table:
    """Draws a line for each step, or for some that follow each other.

    The largest error, and a bar on a logarithmic scale.
    """
    scale = f"1e{LEFT:.0f}" + "1".rjust(WIDTH - 4)
    table = rows_table(f"Error in standard deviations (┃ tolerance {tolerance:.0e})", "step", "error", scale)
    table.columns[0].justify = table.columns[1].justify = "right"
    table.columns[2].overflow, table.columns[2].no_wrap = "crop", True
    for part in _parts(errors):
        first, last = part[0]["step"], part[-1]["step"]
        worst = max((_number(e["relative"]) for e in part), default=0.0)
        label = str(first) if first == last else f"{first}-{last}"
        table.add_row(label, f"{worst:.1e}", _bar(worst, tolerance))
    return table


def _number(error: float | None) -> float:
    return math.inf if error is None or not math.isfinite(error) else error


def _parts(errors: list[Report]) -> list[list[Report]]:
    """Groups steps that follow each other; where all do, into so many groups at most."""
    runs = [list(errors[:1])] if errors else []
    for last, error in pairwise(errors):
        if error["step"] == last["step"] + 1:
            runs[-1].append(error)
        else:
            runs.append([error])
    each = max(1, math.ceil(len(errors) / ROWS)) if len(runs) == 1 else len(errors)
    return [run[i : i + each] for run in runs for i in range(0, len(run), each)]


def _bar(error: float, tolerance: float) -> Text:
    length, mark = _place(error), min(_place(tolerance), WIDTH - 1)
    cells = ["█" if i < length else " " for i in range(WIDTH)]
    cells[mark] = "┃" if mark >= length else "█"
    return Text("".join(cells).rstrip(), "green" if error <= tolerance else "red")


def _place(error: float) -> int:
    if error <= 0:
        return 0
    power = math.log10(error) if math.isfinite(error) else RIGHT
    return round(WIDTH * min(max((power - LEFT) / (RIGHT - LEFT), 0.0), 1.0))
