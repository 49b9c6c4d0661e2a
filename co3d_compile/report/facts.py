"""What people read first of a compiled model: names, and what is so.

One list for all who say it: notebook, terminal, page. It is made of JSON data, which a report and a contract both give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from co3d_compile.report.latency import latency_texts
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import bytes_text, number_text, plural

Fact: TypeAlias = tuple[str, str]


def time_facts(report: JsonObject) -> list[Fact]:
    """Says what was taken for time, where nobody said it."""
    taken = report.get("taken_for_time")
    return [("Time", f"{taken} (no dim was given)")] if taken else []


def stream_facts(data: JsonObject, fps: float | None = None) -> list[Fact]:
    """Says what goes in and comes out, and when.

    ``data``: a report or a contract; ``fps``: frames per second, if known.
    """
    facts = [("Input", _input(item)) for item in data["inputs"]]
    facts += [("Output", _output(item)) for item in data["outputs"]]
    facts += [("Latency", text) for text in latency_texts(data, fps)]
    facts.append(("Receptive field", field_text(data["receptive_field"])))
    facts.append(("Warm-up", f"{plural(data['warmup_steps'], 'step')} before every output is exact"))
    if data["window"]:
        facts.append(("Window", plural(data["window"], "frame")))
    return facts


def cost_facts(report: JsonObject) -> list[Fact]:
    """Says what a step remembers, and what it computes."""
    return [("State", state_text(report["state_count"], report["state_bytes"])), ("Multiply-adds", work_text(report))]


def field_text(frames: int | None) -> str:
    """Writes the receptive field."""
    return plural(frames, "frame") if frames else "unbounded (recurrent)"


def state_text(count: int, size: float) -> str:
    """Writes the number and size of the states of one stream."""
    return f"{plural(count, 'tensor')}, {bytes_text(size)} per stream" if count else "none: no operator over time"


def work_text(report: JsonObject) -> str:
    """Writes the multiply-adds of a clip and of a frame, and what is gained."""
    clip, frame = (number_text(1e9 * report[name]) for name in ("gmac_clip", "gmac_frame"))
    gain = nothing_gained(report) or f"{report['gmac_ratio'] or 0:.1f} times fewer"
    return f"{clip} per clip, {frame} per frame: {gain}"


def region_text(item: JsonObject) -> str:
    """Says of a region that is local in time what an entry of it reads, and on how much a step runs it."""
    before, after, period = item["before"], item["after"], item["period"]
    what = "each entry" if period == 1 else f"each block of {period} entries"
    entries = f"{item['entries']} {'entry' if item['entries'] == 1 else 'entries'}"
    cost = f"{number_text(item['multiply_adds'])} multiply-adds"
    least = item.get("least_frames")  # an older report has none
    ends = f"; exact ends in streams of {least} frames or more" if least else ""
    return f"{what} reads {before} before and {after} after; run on {entries}, {cost}{ends}"


def operator_place(item: JsonObject) -> str:
    """Names an operator and its module."""
    return f"{item['operator']} in {item['module_path'] or 'the model'}"


def nothing_gained(report: JsonObject) -> str:
    """Says why a step computes as much as a clip or more; empty if it does not."""
    if not 0 < report["gmac_clip"] <= report["gmac_step"]:
        return ""
    again, frames = report["recomputed"], max(report["frames_per_step"].values(), default=1)
    taken = report.get("taken_for_time")
    why = "no operator's work is shared by clips that follow each other"
    if again:
        more = f" and {plural(len(again) - 1, 'other operator')}" if len(again) > 1 else ""
        why = f"{operator_place(again[0])}{more} and what follows run again on a window at every step"
    elif frames > 1:
        why = f"a step takes {frames} frames at once"
    times = _times(report["gmac_step"] / report["gmac_clip"])
    said = f"; time was taken to be {taken}: give time_dim (--time-dim) if it is another dim" if taken else ""
    return f"nothing gained: a step computes {times} a clip, because {why}{said}"


def _times(ratio: float) -> str:
    return "as much as" if ratio < 1.05 else f"{ratio:.1f} times as much as"


def verification_text(result: JsonObject) -> str:
    """Says what a verification found, and what it compared with."""
    steps = f"over {plural(result['steps'], 'step')}"
    if not result["passed"]:
        return f"{steps}: {result['reason']} Compared with {compared_text(result)}."
    how = f"relative error {result['relative_error']:.1e} (at most {result['tolerance']:.0e})"
    return f"{how} {steps}, compared with {compared_text(result)}"


def compared_text(result: JsonObject) -> str:
    """Says what a verification compared with, and how far that is from the untouched network."""
    distance = result["replaced_distance"]
    if distance is None:
        return str(result["compared_with"])
    return (
        f"{result['compared_with']}, up to {distance:.2g} standard deviations from the untouched one on the same clips"
    )


def shape_text(shape: Sequence[int | str]) -> str:
    """Writes a shape: ``(N, 3, 160, 160)``."""
    return f"({', '.join(map(str, shape))})"


def _input(item: JsonObject) -> str:
    frames = item["frames_per_step"]
    rate = f"{plural(frames, 'frame')} per step" if frames else "no time"
    return f"{item['name']} {shape_text(item['shape'])} {item['dtype']}, {rate}"


def _output(item: JsonObject) -> str:
    entries = item["entries_per_step"]
    time = f"{entries} {'entry' if entries == 1 else 'entries'} per step" if item["has_time"] else "newest window"
    return f"{item['name']} {shape_text(item['shape'])}, {time}, delay {item['delay']}"
