"""The report of a compilation: what was captured, what was done, what it costs."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from co3d_compile.report.facts import (
    Fact,
    cost_facts,
    operator_place,
    region_text,
    stream_facts,
    time_facts,
)
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import plural


@dataclass(frozen=True, repr=False)
class Report:
    """What ``co3d-compile`` prints, as data. GMAC are multiply-adds of convolutions and matrix products, times 1e-9.

    ``taken_for_time`` says what was, where nobody said which dim is time; else it is empty.
    """

    taken_for_time: str
    model: str
    operators: int
    inputs: list[JsonObject]
    outputs: list[JsonObject]
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
    actions: list[JsonObject]
    delays: list[JsonObject]
    recomputed: list[JsonObject]
    regions: list[JsonObject]
    gates: list[dict[str, str]]
    limited: list[JsonObject]
    warnings: list[str]
    seconds: dict[str, float]
    loops: list[str] = field(default_factory=list)
    far_out: str = ""

    def to_dict(self) -> JsonObject:
        """Writes the report as plain JSON data."""
        return asdict(self)

    def facts(self) -> list[Fact]:
        """Lists what a reader wants first: names, and what is so."""
        data = self.to_dict()
        limited = ", ".join(f"{row['operator']} {row['module_path']}".strip() for row in self.limited)
        again = ", ".join(f"{r['operator']} {r['module_path']}".strip() for r in self.recomputed)
        return [
            *((name.lower(), text) for name, text in time_facts(data)),
            ("model", f"{self.model}, {plural(self.operators, 'operator')}"),
            *((name.lower(), text) for name, text in [*stream_facts(data), *cost_facts(data)]),
            *((f"local in time: {operator_place(item)}", region_text(item)) for item in self.regions),
            *([("reads less of the future", limited)] if limited else []),
            ("recomputed on a window", again or "nothing"),
            *(("loop over frames", text) for text in self.loops),
            *([("far out", self.far_out)] if self.far_out else []),
            *(("note", text) for text in self.warnings),
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.facts())

    def to_html(self) -> str:
        """Writes a summary for notebooks: the facts, and what was done behind a fold."""
        done = [(action["operator"], str(action["count"]), action["action"]) for action in self.actions]
        fold = f"<details><summary>what was done</summary>{_table(done)}</details>" if done else ""
        return _table(self.facts(), "th") + fold


def _table(rows: Iterable[tuple[str, ...]], first: str = "td") -> str:
    """Writes cells that align to the left whatever the notebook's style says."""
    left = ' style="text-align:left"'

    def cell(kind: str, text: str) -> str:
        return f"<{kind}{left}>{html.escape(text)}</{kind}>"

    lines = (cell(first, name) + "".join(cell("td", text) for text in rest) for name, *rest in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
