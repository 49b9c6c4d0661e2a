"""The network over time, as a drawing: which frames the newest result of each operator has seen, and what waits.

One lane for each operator that does something with time, from the input down. Time goes to the right and ends at the
newest frame. Only places are computed here; the template gives them their looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from co3d_compile.report.report_rows import Row
from co3d_compile.support.readable_numbers import plural

TOP = 34
Place = Callable[[float], float]  # frames ago to pixels
MOST_DOTS = 16
MOST_LANES = 400
PAST = ("gate over a window", "carries its state")  # what makes a lane of an operator without taps


@dataclass(frozen=True)
class Sheet:
    """What the drawing is drawn on, in pixels.

    Attributes:
        left: In front of time.
        time: How wide time is.
        right: Behind it: delays and their lines.
        lane: From one lane to the next.
        names: From the middle of a lane down to the line on which its name stands.
        operators: Where the operators' names end; None: they stand right behind the modules'.
        letters: That both names together may have.
    """

    left: int
    time: int
    right: int
    lane: int
    names: float
    operators: int | None
    letters: int


WIDE = Sheet(left=310, time=690, right=90, lane=22, names=4, operators=300, letters=46)
NARROW = Sheet(left=18, time=270, right=56, lane=40, names=-11, operators=None, letters=50)
"""For a screen of 390 pixels: the names stand above their lanes."""


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
    sheet: Sheet
    width: int
    height: int
    left_out: int


def draw(rows: list[Row], sheet: Sheet = WIDE) -> Drawing:
    """Places everything. ``rows``: the operators in order, as ``report_rows.table`` gives them."""
    read = {at for row in rows for at in row["inputs"]}
    lanes_of = [at for at, row in enumerate(rows) if _has_lane(row) or at not in read]
    shown = lanes_of[:MOST_LANES]
    past = max([1.0, *(row["delay"] - row["first"] for row in rows if row["first"] is not None)])

    def x(frames_ago: float) -> float:
        return sheet.left + sheet.time - min(max(frames_ago, 0.0), past) * sheet.time / past

    first = TOP + sheet.lane / 2 - min(sheet.names + 4, 0)  # the first name is below the scale
    lanes = {at: _lane(rows, at, first + sheet.lane * number, x, past, sheet) for number, at in enumerate(shown)}
    flows, delays = [], []
    for at, end in lanes.items():
        for index, amount in zip(rows[at]["inputs"], rows[at]["held"], strict=False):
            start = _shown_source(rows, index, lanes)
            if start is None or start is end:
                continue
            if amount:
                delays.append(_delay_line(start, end, amount))
            else:
                flows.append(f"M{start.now:.1f} {start.y:.1f}L{end.now:.1f} {end.y:.1f}")
    return Drawing(
        lanes=list(lanes.values()),
        flows=flows,
        delays=delays,
        ticks=_ticks(past, x),
        sheet=sheet,
        width=sheet.left + sheet.time + sheet.right,
        height=round(first + sheet.lane * (len(lanes) - 0.5) + 12),
        left_out=len(lanes_of) - len(shown),
    )


def _has_lane(row: Row) -> bool:
    if row["kind"] == "window":
        return False
    return row["kind"] == "input" or row["taps"] > 1 or any(row["held"]) or row["done"] in PAST


def _lane(rows: list[Row], at: int, y: float, x: Place, past: float, sheet: Sheet) -> Lane:
    row = rows[at]
    delay = row["delay"]
    oldest = past if row["first"] is None else delay - row["first"]
    newest = delay - (row["last"] or 0.0)
    taps: tuple[float, float] | None = None
    dots: tuple[float, ...] = ()
    if row["taps"] > 1 and row["inputs"]:
        rate, count = rows[row["inputs"][0]]["rate"], int(row["taps"])
        first, last = (x(delay + (row["padding"] - i) * rate) for i in (0, count - 1))
        taps = (first, last - first)
        if count <= MOST_DOTS:
            dots = tuple(x(delay + (row["padding"] - i) * rate) for i in range(count))
    note = f"{row['operator']}: {row['done'] or 'unchanged'}, delay {plural(delay, 'frame')}"
    operator = row["operator"].removeprefix("aten.")
    return Lane(
        y=y,
        name=_shortened(row["module_path"] or row["name"], sheet.letters - len(operator)),
        operator=operator,
        note=note + (f", depends on {plural(row['field'], 'frame')}" if row["field"] else ""),
        kind=_kind(row),
        seen=(x(oldest), max(3.0, x(newest) - x(oldest))),
        taps=taps,
        dots=dots,
        now=x(delay),
        delay=f"{delay:g}",
    )


def _shortened(name: str, letters: int) -> str:
    """Leaves out the front of a name that is too long."""
    return name if len(name) <= letters else "…" + name[len(name) + 1 - max(letters, 2) :]


def _kind(row: Row) -> str:
    if row["kind"] in ("input", "window"):
        return str(row["kind"])
    if row["taps"] > 1:
        return "continual"
    if any(row["held"]):
        return "delayed"
    return "gate" if row["done"].startswith("gate") or row["done"] in PAST else "plain"


def _shown_source(rows: list[Row], at: int, lanes: Mapping[int, Lane]) -> Lane | None:
    """Finds the lane of the nearest operator that has one and that this one's value comes from."""
    while at not in lanes:
        inputs = [n for n in rows[at]["inputs"] if 0 <= n < at]
        if not inputs:
            return None
        at = inputs[0]
    return lanes[at]


def _delay_line(start: Lane, end: Lane, amount: int) -> tuple[str, float, float, str]:
    """Draws a line down from the operand's newest entry, on its own side, to where it is used; and a label."""
    bulge = max(start.now, end.now) + 12 + min(40.0, 3.6 * abs(end.y - start.y) ** 0.5)
    turns = f"{bulge:.1f} {start.y + 6:.1f} {bulge:.1f} {end.y - 6:.1f}"
    path = f"M{start.now:.1f} {start.y:.1f}C{turns} {end.now:.1f} {end.y:.1f}"
    return path, (start.now + end.now + 2 * bulge) / 4 + 4, (start.y + end.y) / 2 + 3.5, f"+{amount}"


def _ticks(past: float, x: Place) -> list[tuple[float, str]]:
    rough = max(1.0, past / 8)
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return [(x(n * step), f"\u2212{n * step:g}" if n else "newest") for n in range(int(past // step) + 1)]
