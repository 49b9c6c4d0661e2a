"""The rows of the report's table, one per operator, as read from a file."""

from __future__ import annotations

import math
from collections import Counter

from co3d_compile.support.plain_types import JsonObject

Row = JsonObject


def table(report: JsonObject, frames: int) -> list[Row]:
    """Reads all operators, with ``macs_frame``; ``frames``: that a step takes.

    Raises:
        KeyError, TypeError, ValueError: The report is damaged.
    """
    return [_checked(row, frames) for row in report["table"]]


def _checked(row: Row, frames: int) -> Row:
    """Reads a row whose values have the types that the drawing counts on: a file may come from anyone."""
    numbers = {name: float(row[name]) for name in ("taps", "padding", "rate", "delay")}
    if not all(math.isfinite(value) and abs(value) < 1e9 for value in numbers.values()) or numbers["taps"] > 1e6:
        raise ValueError("numbers out of range")
    limits = {name: None if row[name] is None else float(row[name]) for name in ("first", "last", "field")}
    costs = {name: int(row[name]) for name in ("macs_clip", "macs_step", "state_bytes")}
    texts = {name: str(row[name]) for name in ("name", "operator", "module_path", "kind", "done")}
    inputs = [int(at) for at in row["inputs"]]
    held = [None if amount is None else int(amount) for amount in row["held"]]
    share = float(row.get("time_share", 0.0))
    times = {"time_share": share, "time_percent": 100 * share, "macs_frame": costs["macs_step"] / frames}
    return {**numbers, **limits, **costs, **times, **texts, "inputs": inputs, "held": held}


def shares_by_module(rows: list[Row]) -> dict[tuple[str, ...], float]:
    """Sums the share of time of every module, all that is in it included, by the components of its path."""
    shares: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        path = tuple(filter(None, row["module_path"].split(".")))
        for depth in range(len(path) + 1):
            shares[path[:depth]] += row["time_share"]
    return dict(shares)
