"""The report of a compilation: what was captured, what was done, what it costs."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from co3d_compile.support.readable_numbers import bytes_text, number_text, plural


@dataclass(frozen=True)
class Report:
    """What ``co3d-compile`` prints, as data. GMAC are multiply-adds of convolutions and matrix products, times 1e-9."""

    model: str
    operators: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    receptive_field: int | None
    warmup_steps: int
    frames_per_step: dict[str, int]
    window: int | None
    state_count: int
    state_bytes: int
    gmac_clip: float
    gmac_step: float
    gmac_frame: float
    gmac_ratio: float
    actions: list[dict[str, Any]]
    recomputed: list[dict[str, Any]]
    gates: list[dict[str, str]]
    warnings: list[str]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return asdict(self)

    def facts(self) -> list[tuple[str, str]]:
        """What a reader wants first: names, and what is so."""
        rows = [("model", f"{self.model}, {plural(self.operators, 'operator')}")]
        for item in self.inputs:
            frames = item["frames_per_step"]
            rate = f"{plural(frames, 'frame')} per step" if frames else "no time"
            rows.append(("input", f"{item['name']} {_shape(item)}, {rate}"))
        for item in self.outputs:
            entries = f"{item['entries_per_step']} per step" if item["has_time"] else "newest window"
            rows.append(("output", f"{item['name']} {_shape(item)}, {entries}, delay {item['delay']}"))
        field = "unbounded" if self.receptive_field is None else plural(self.receptive_field, "frame")
        clip, frame = number_text(self.gmac_clip * 1e9), number_text(self.gmac_frame * 1e9)
        again = ", ".join(f"{r['operator']} {r['module_path']}".strip() for r in self.recomputed)
        return [
            *rows,
            ("receptive field", field),
            ("warm-up", plural(self.warmup_steps, "step")),
            ("state", f"{plural(self.state_count, 'tensor')}, {bytes_text(self.state_bytes)} per stream"),
            ("multiply-adds", f"{clip} per clip, {frame} per frame: {self.gmac_ratio:.1f} times fewer"),
            ("recomputed on a window", again or "nothing"),
            *(("note", text) for text in self.warnings),
        ]

    def to_html(self) -> str:
        """A summary for notebooks: the facts, and what was done behind a fold."""
        done = [(action["operator"], str(action["count"]), action["action"]) for action in self.actions]
        fold = f"<details><summary>what was done</summary>{_table(done)}</details>" if done else ""
        return _table(self.facts(), "th") + fold


def _shape(item: dict[str, Any]) -> str:
    return f"({', '.join(map(str, item['shape']))})"


def _table(rows: Iterable[tuple[str, ...]], first: str = "td") -> str:
    """Cells that align to the left whatever the notebook's style says."""
    left = ' style="text-align:left"'
    lines = []
    for name, *cells in rows:
        rest = "".join(f"<td{left}>{html.escape(text)}</td>" for text in cells)
        lines.append(f"<tr><{first}{left}>{html.escape(name)}</{first}>{rest}</tr>")
    return f"<table>{''.join(lines)}</table>"
