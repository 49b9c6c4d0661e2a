"""The network over time, as a drawing: which frames the newest result of each operator has seen, and what waits.

One lane for each operator that does something with time, from the input down. Time goes to the right and ends at the
newest frame. Only places are computed here; the template gives them their looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from co3d_compile.support.readable_numbers import plural

Row = dict[str, Any]
LEFT, WIDTH, RIGHT = 310, 690, 90  # pixels: names, time, numbers
LANE, TOP = 22, 34
MOST_DOTS = 16
MOST_LANES = 400
PAST = ("gate over a window", "carries its state")  # what makes a lane of an operator without taps


@dataclass(frozen=True)
class Lane:
    """One operator.

    Attributes:
        y: Middle of the lane.
        name, operator, note: What stands beside it.
        kind: "input", "continual", "delayed", "gate", "window", "plain": its colour.
        seen: Left end and width of the bar over all frames that the newest entry depends on.
        taps: Left end and width of what it reads of its input.
        dots: The entries that it reads of its input, where they are few.
        now: Where its newest entry is.
        delay: Frames, as text.
    """

    y: float
    name: str
    operator: str
    note: str
    kind: str
    seen: tuple[float, float]
    taps: tuple[float, float] | None
    dots: tuple[float, ...]
    now: float
    delay: str


@dataclass(frozen=True)
class Drawing:
    """All lanes, the lines between them, and the scale."""

    lanes: list[Lane]
    flows: list[str]
    delays: list[tuple[str, float, float, str]]
    ticks: list[tuple[float, str]]
    width: int
    height: int
    left_out: int


def draw(rows: list[Row]) -> Drawing:
    """Places of everything. ``rows``: the operators in order, as ``survey.as_rows`` gives them."""
    readers = {at for row in rows for at in row["inputs"]}
    shown = [at for at, row in enumerate(rows) if _has_lane(row) or at not in readers]
    left_out = max(0, len(shown) - MOST_LANES)
    shown = shown[:MOST_LANES]
    place = {at: number for number, at in enumerate(shown)}
    past = max([1.0, *(row["delay"] - row["first"] for row in rows if row["first"] is not None)])
    scale = WIDTH / past

    def x(frames_ago: float) -> float:
        return LEFT + WIDTH - min(max(frames_ago, 0.0), past) * scale

    lanes = [_lane(rows, at, TOP + LANE * number + LANE / 2, x, past) for number, at in enumerate(shown)]
    flows, delays = [], []
    for at in shown:
        end = lanes[place[at]]
        for index, amount in zip(rows[at]["inputs"], rows[at]["held"], strict=False):
            source = _shown_source(rows, index, place)
            if source is None or source == at:
                continue
            start = lanes[place[source]]
            if amount:
                delays.append(_delay_line(start, end, amount))
            else:
                flows.append(f"M{start.now:.1f} {start.y:.1f}L{end.now:.1f} {end.y:.1f}")
    return Drawing(
        lanes, flows, delays, _ticks(past, x), LEFT + WIDTH + RIGHT, round(TOP + LANE * len(lanes) + 12), left_out
    )


def _has_lane(row: Row) -> bool:
    if row["kind"] == "window":
        return False
    return row["kind"] == "input" or row["taps"] > 1 or any(row["held"]) or row["done"] in PAST


def _lane(rows: list[Row], at: int, y: float, x: Any, past: float) -> Lane:
    row = rows[at]
    first, last = row["first"], row["last"]
    oldest = past if first is None else row["delay"] - first
    newest = row["delay"] - (0.0 if last is None else last)
    taps, dots = None, ()
    if row["taps"] > 1 and row["inputs"]:
        rate = rows[row["inputs"][0]]["rate"]
        ago = [row["delay"] + (row["padding"] - i) * rate for i in (0, row["taps"] - 1)]
        taps = (x(ago[0]), x(ago[1]) - x(ago[0]))
        if row["taps"] <= MOST_DOTS:
            dots = tuple(x(row["delay"] + (row["padding"] - i) * rate) for i in range(int(row["taps"])))
    name = row["module_path"] or row["name"]
    note = f"{row['operator']}: {row['done'] or 'unchanged'}, {plural(row['delay'], 'frame')} late"
    note += f", has seen {plural(row['field'], 'frame')}" if row["field"] else ""
    seen = (x(oldest), max(3.0, x(newest) - x(oldest)))
    operator, late = row["operator"].removeprefix("aten."), f"{row['delay']:g}"
    return Lane(y, name, operator, note, _kind(row), seen, taps, dots, x(row["delay"]), late)


def _kind(row: Row) -> str:
    if row["kind"] in ("input", "window"):
        return str(row["kind"])
    if row["taps"] > 1:
        return "continual"
    if any(row["held"]):
        return "delayed"
    return "gate" if row["done"].startswith("gate") or row["done"] in PAST else "plain"


def _shown_source(rows: list[Row], at: int, place: dict[int, int]) -> int | None:
    """The nearest operator with a lane that this one's value comes from."""
    seen = set()
    while at not in place:
        inputs = [n for n in rows[at]["inputs"] if 0 <= n < at]
        if not inputs or at in seen:
            return None
        seen.add(at)
        at = inputs[0]
    return at


def _delay_line(start: Lane, end: Lane, amount: int) -> tuple[str, float, float, str]:
    """Down from the operand's newest entry, on its own side, to where it is used; and a label."""
    bulge = max(start.now, end.now) + 12 + min(40.0, 3.6 * abs(end.y - start.y) ** 0.5)
    turns = f"{bulge:.1f} {start.y + 6:.1f} {bulge:.1f} {end.y - 6:.1f}"
    path = f"M{start.now:.1f} {start.y:.1f}C{turns} {end.now:.1f} {end.y:.1f}"
    return path, (start.now + end.now + 2 * bulge) / 4 + 4, (start.y + end.y) / 2 + 3.5, f"+{amount}"


def _ticks(past: float, x: Any) -> list[tuple[float, str]]:
    rough = max(1.0, past / 8)
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    count = int(past // step) + 1
    return [(x(n * step), "newest" if not n else f"\u2212{n * step:g}") for n in range(count)]
