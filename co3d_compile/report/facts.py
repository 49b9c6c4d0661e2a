"""What people read first of a compiled model: names, and what is so.

One list for all who say it: notebook, terminal, page. It is made of JSON data, which a report and a contract both give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from co3d_compile.support.readable_numbers import bytes_text, number_text, plural

JsonObject: TypeAlias = dict[str, Any]
Fact: TypeAlias = tuple[str, str]


def stream_facts(data: JsonObject) -> list[Fact]:
    """What goes in and comes out, and when; ``data``: a report or a contract."""
    facts = [("Input", _input(item)) for item in data["inputs"]]
    facts += [("Output", _output(item)) for item in data["outputs"]]
    facts.append(("Receptive field", field_text(data["receptive_field"])))
    facts.append(("Warm-up", f"{plural(data['warmup_steps'], 'step')} before every output is exact"))
    if data["window"]:
        facts.append(("Window", plural(data["window"], "frame")))
    return facts


def cost_facts(report: JsonObject) -> list[Fact]:
    """What a step remembers, and what it computes."""
    return [("State", state_text(report["state_count"], report["state_bytes"])), ("Multiply-adds", work_text(report))]


def field_text(frames: int | None) -> str:
    """The receptive field."""
    return plural(frames, "frame") if frames else "unbounded (recurrent)"


def state_text(count: int, size: float) -> str:
    """The states of one stream."""
    return f"{plural(count, 'tensor')}, {bytes_text(size)} per stream" if count else "none: no operator over time"


def work_text(report: JsonObject) -> str:
    """Multiply-adds of a clip and of a frame, and what is gained."""
    clip, frame = (number_text(1e9 * report[name]) for name in ("gmac_clip", "gmac_frame"))
    return f"{clip} per clip, {frame} per frame: {report['gmac_ratio'] or 0:.1f} times fewer"


def shape_text(shape: Sequence[int | str]) -> str:
    """``(N, 3, 160, 160)``"""
    return f"({', '.join(map(str, shape))})"


def _input(item: JsonObject) -> str:
    frames = item["frames_per_step"]
    rate = f"{plural(frames, 'frame')} per step" if frames else "no time"
    return f"{item['name']} {shape_text(item['shape'])} {item['dtype']}, {rate}"


def _output(item: JsonObject) -> str:
    entries = item["entries_per_step"]
    time = f"{entries} {'entry' if entries == 1 else 'entries'} per step" if item["has_time"] else "newest window"
    return f"{item['name']} {shape_text(item['shape'])}, {time}, delay {item['delay']}"


__all__ = ["Fact", "JsonObject", "cost_facts", "field_text", "shape_text", "state_text", "stream_facts", "work_text"]
