"""How late an answer is, in frames and seconds, and which modules make it so. Of JSON data, like all that is said."""

from __future__ import annotations

import math
from collections.abc import Sequence

from co3d_compile.report.report_rows import Row
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import plural


def frames_behind(output: JsonObject, frames_per_step: dict[str, int]) -> tuple[int, int]:
    """Counts the first input's frames from the newest one back to those of a step's newest and oldest entry.

    Args:
        output: An output of a report or a contract.
        frames_per_step: Of each input, in their order.
    """
    frames, entries = next(iter(frames_per_step.values()), 1), output["entries_per_step"]
    each = output.get("frames_per_entry") or frames / max(1, entries)
    newest = max(0, math.ceil((1 + output["delay"]) * each - 1e-6) - 1)
    streams = output["has_time"] and math.isclose(entries * each, frames)  # else every step returns a whole window
    return newest, newest + (math.ceil((entries - 1) * each) if streams else 0)


def latency_texts(data: JsonObject, fps: float | None = None) -> list[str]:
    """Says what an answer is about, and what it sees: a sentence for all outputs, or one for each if they differ.

    Args:
        data: A report or a contract.
        fps: Frames per second of the source; None: not known.
    """
    rates = data["frames_per_step"]
    first = next(iter(rates.values()), 1)
    slower = max(rates.values(), default=1) / first  # the source gives the frames of the fastest input
    seconds = None if not fps else slower / fps
    of = f" of {next(iter(rates))}" if len(set(rates.values())) > 1 else ""
    spans = {output["name"]: frames_behind(output, rates) for output in data["outputs"]}
    sees = data["receptive_field"]
    seen = f"sees {_amount(sees, sees, seconds)}" if sees else "sees all that came before"
    alike = len(set(spans.values())) == 1
    texts = []
    for name, (newest, oldest) in list(spans.items())[: 1 if alike else None]:
        whose = "an answer" if alike else f"an answer of {name}"
        when = f"what happened {_amount(newest, oldest, seconds, of)} ago" if oldest else "the newest frame"
        texts.append(f"{whose} is about {when}, and {seen}")
    return texts


def delay_rows(rows: Sequence[Row]) -> list[JsonObject]:
    """Lists what adds to the delay of the latest result.

    Its operators in their order, whose frames add up to the delay.

    Where branches meet only the slowest one counts: the others wait for it. What a pad in front saves is taken off what
    the operators behind it add, so that a causal convolution adds nothing.

    Raises:
        ValueError: The rows, which may come from a file, contradict each other.
    """
    lag = _lags(rows)
    read = {at for row in rows for at in row["inputs"]}
    ends = [at for at, row in enumerate(rows) if at not in read and row["inputs"]]
    path: list[tuple[Row, int]] = []
    at = max(ends, key=lambda end: lag[end], default=None)
    while at is not None:
        slowest = max(rows[at]["inputs"], key=lambda i: lag[i], default=None)
        path.append((rows[at], lag[at] - (lag[slowest] if slowest is not None else 0)))
        if slowest is not None and not 0 <= slowest < at:
            raise ValueError("an operator reads one that comes later")
        at = slowest
    found: list[JsonObject] = []
    saved = 0
    for row, added in reversed(path):
        left = added + saved
        saved = min(0, left)
        if left > 0:
            found.append({"operator": row["operator"], "module_path": row["module_path"], "frames": left})
    if saved:  # by the last operators, behind which nothing adds any more
        row = path[0][0]
        found.append({"operator": row["operator"], "module_path": row["module_path"], "frames": saved})
    return found


def _lags(rows: Sequence[Row]) -> list[int]:
    """Counts the frames from the newest one back to the one that the newest entry of each operator is about."""
    rates: list[float] = []
    for row in rows:
        over = [rates[at] for at in row["inputs"]] if row["kind"] == "window" else []
        rates.append(max(over, default=row["rate"]))
    return [math.ceil(row["delay"] + rate - 1 - 1e-6) for row, rate in zip(rows, rates, strict=True)]


def seconds_text(frames: float, fps: float | None) -> str:
    """Writes ``28 frames = 2.8 s``; without a rate the frames alone."""
    return _amount(int(frames), int(frames), None if not fps else 1 / fps)


def _amount(newest: int, oldest: int, seconds: float | None, of: str = "") -> str:
    frames = plural(newest, "frame") if newest == oldest else f"{newest} to {oldest} frames"
    if seconds is None:
        return frames + of
    low, high = (_digits(count * seconds) for count in (newest, oldest))
    return f"{frames}{of} = {low if newest == oldest else f'{low} to {high}'} s"


def _digits(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"
