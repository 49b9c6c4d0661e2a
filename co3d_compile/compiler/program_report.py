"""The report of a compiled program."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec
from co3d_compile.ir.operator_row import Operator, as_rows
from co3d_compile.ir.program import Program, bytes_of
from co3d_compile.report.facts import nothing_gained
from co3d_compile.report.latency import delay_rows
from co3d_compile.report.report import Report
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import plural


def report_of(
    program: Program, info: Contract, operators: int, clip: int, step: int, seconds: dict[str, float]
) -> Report:
    """Reports on a compiled program; ``clip`` and ``step`` are multiply-adds."""
    warnings = list(program.notes.warnings)
    if not program.step.states:
        warnings.append("The model has no temporal operator: every frame is computed by itself, without state.")
    report = Report(
        taken_for_time="" if program.options.time_said else _taken_for_time(program),
        model=program.name,
        operators=operators,
        inputs=[_row(i, "dtype", "frames_per_step") for i in info.inputs],
        outputs=[_row(o, "has_time", "delay", "entries_per_step", "frames_per_entry") for o in info.outputs],
        receptive_field=info.receptive_field,
        warmup_steps=info.warmup_steps,
        frames_per_step=dict(info.frames_per_step),
        window=info.window,
        state_count=len(program.step.states),
        state_bytes=sum(bytes_of(s.shape, s.dtype) for s in program.step.states),
        **_multiply_adds(clip, step, max(info.frames_per_step.values(), default=1)),
        actions=[
            {"operator": operator, "count": count, "action": action}
            for (operator, action), count in sorted(program.notes.actions.items())
        ],
        delays=delay_rows(as_rows(program.notes.survey)),
        recomputed=[asdict(r) for r in program.notes.recomputed],
        regions=[asdict(r) for r in info.regions],
        limited=[asdict(row) for row in program.notes.limited],
        gates=[{"module_path": path, "scope": scope} for path, scope in program.notes.gates],
        warnings=warnings,
        seconds=seconds,
        loops=list(program.notes.loops),
        far_out=program.notes.far_out,
    )
    why = nothing_gained(report.to_dict())
    return replace(report, warnings=[*warnings, f"{why[0].upper()}{why[1:]}."]) if why else report


def _taken_for_time(program: Program) -> str:
    """Says which dim was taken for time."""
    timed = next(i for i in program.inputs if i.time_dim is not None)
    dim = timed.time_dim or 0
    return f"dim {dim} of {timed.name}, {plural(timed.shape[dim], 'frame')} in a clip"


def _row(spec: InputSpec | OutputSpec, *fields: str) -> JsonObject:
    """Writes the name and shape of an input or output, and these fields of it."""
    return {"name": spec.name, "shape": list(spec.shape), **{name: getattr(spec, name) for name in fields}}


def _multiply_adds(clip: int, step: int, frames: int) -> dict[str, float]:
    """Writes the fields of the report that say what a clip costs, a step, and each frame of one."""
    frame = step / frames
    ratio = clip / frame if frame else math.inf if clip else 1.0
    return {"gmac_clip": clip / 1e9, "gmac_step": step / 1e9, "gmac_frame": frame / 1e9, "gmac_ratio": ratio}


def details(report: Report, survey: list[Operator]) -> JsonObject:
    """Writes the report with every operator as plain JSON data: what the file's second metadata entry holds.

    Seconds are left out, so that the same model compiles to the same bytes.
    """
    data = report.to_dict()
    del data["seconds"]
    if not math.isfinite(data["gmac_ratio"]):
        data["gmac_ratio"] = None
    return {**data, "table": as_rows(survey)}
