"""What is true of a video: from when to when something is seen, by people."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from co3d_compile.errors import Co3dError, LoadError
from co3d_compile.media.class_scores import find_class

COLUMNS = ("label", "begin", "end")
HINT = "Its first line names the columns label, begin and end; the times are seconds."


@dataclass(frozen=True)
class Segment:
    """A class from ``begin`` until before ``end``, in seconds."""

    index: int
    begin: float
    end: float


def read_segments(path: Path, count: int, labels: Sequence[str]) -> list[Segment]:
    """Reads a CSV file such as ``co3d run --events`` writes.

    Args:
        count, labels: Of the classes.

    Raises:
        LoadError: It cannot be read, or a line of it makes no sense.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LoadError(f"{path} cannot be read as segments: {error}.", hint=HINT) from error
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise LoadError(f"{path} holds no segments.", hint=HINT)
    return [_segment(row, f"{path}, line {line}", count, labels) for line, row in enumerate(rows, 2)]


def _segment(row: dict[str, str | None], where: str, count: int, labels: Sequence[str]) -> Segment:
    try:
        begin, end = (float(row[name] or "") for name in ("begin", "end"))
        index = find_class((row["label"] or "").strip(), count, labels)
    except ValueError as error:
        raise LoadError(f"{where}: {error}.", hint=HINT) from error
    except Co3dError as error:
        raise LoadError(f"{where}: {error}") from error
    if not (math.isfinite(begin) and begin < end):
        raise LoadError(f"{where}: a segment from {begin} to {end} s has no length.", hint=HINT)
    return Segment(index, begin, end)
