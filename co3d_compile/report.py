"""The report of a compilation: what was captured, what was done, what it costs."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from co3d_compile.program import bytes_of
from co3d_compile.survey import as_rows

if TYPE_CHECKING:
    from co3d_compile.contract import Contract
    from co3d_compile.program import Program
    from co3d_compile.survey import Operator


def details(report: Report, survey: list[Operator]) -> dict[str, Any]:
    """The report with every operator, as plain JSON data: what the file's second metadata entry holds.

    Seconds are left out, so that the same model compiles to the same bytes.
    """
    data = report.to_dict()
    del data["seconds"]
    if not math.isfinite(data["gmac_ratio"]):
        data["gmac_ratio"] = None
    return {**data, "table": as_rows(survey)}


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

    @staticmethod
    def of(program: Program, info: Contract, operators: int, clip: int, step: int, seconds: dict[str, float]) -> Report:
        """The report of a compiled program; ``clip`` and ``step`` are multiply-adds."""
        frames = max(info.frames_per_step.values(), default=1)
        per_frame = step / frames
        warnings = list(program.warnings)
        if not program.states:
            warnings.append("The model has no temporal operator: every frame is computed by itself, without state.")
        return Report(
            model=program.name,
            operators=operators,
            inputs=[
                {"name": i.name, "shape": list(i.shape), "dtype": i.dtype, "frames_per_step": i.frames_per_step}
                for i in info.inputs
            ],
            outputs=[
                {
                    "name": o.name,
                    "shape": list(o.shape),
                    "has_time": o.has_time,
                    "delay": o.delay,
                    "entries_per_step": o.entries_per_step,
                }
                for o in info.outputs
            ],
            receptive_field=info.receptive_field,
            warmup_steps=info.warmup_steps,
            frames_per_step=dict(info.frames_per_step),
            window=info.window,
            state_count=len(program.states),
            state_bytes=sum(bytes_of(s.shape, s.dtype) for s in program.states),
            gmac_clip=clip / 1e9,
            gmac_step=step / 1e9,
            gmac_frame=per_frame / 1e9,
            gmac_ratio=clip / per_frame if per_frame else float("inf") if clip else 1.0,
            actions=[
                {"operator": operator, "count": count, "action": action}
                for (operator, action), count in sorted(program.actions.items())
            ],
            recomputed=[asdict(r) for r in program.recomputed],
            gates=[{"module_path": path, "scope": scope} for path, scope in program.gates],
            warnings=warnings,
            seconds=seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return asdict(self)

    def to_html(self) -> str:
        """A short summary for notebooks."""
        field = "unbounded" if self.receptive_field is None else f"{self.receptive_field} frames"
        rows = [
            ("model", self.model),
            ("a step takes", ", ".join(f"{n} of {name}" for name, n in self.frames_per_step.items()) or "nothing"),
            ("delay, entries", ", ".join(f"{out['name']} {out['delay']}" for out in self.outputs)),
            ("receptive field", field),
            ("warm-up", f"{self.warmup_steps} steps"),
            ("states", f"{self.state_count}, {self.state_bytes / 1e6:.1f} MB"),
            ("GMAC per clip", f"{self.gmac_clip:.3f}"),
            ("GMAC per frame", f"{self.gmac_frame:.4f} ({self.gmac_ratio:.1f} times fewer)"),
            ("recomputed on a window", ", ".join(r["operator"] for r in self.recomputed) or "nothing"),
        ]
        rows += [("note", text) for text in self.warnings]
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
        return f"<table>{cells}</table>"
