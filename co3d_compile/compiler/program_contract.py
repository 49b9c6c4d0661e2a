"""The contract of a compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import cast

import torch

from co3d_compile.contract import model_contract as metadata
from co3d_compile.contract.json_readers import Shape
from co3d_compile.ir.found_parts import RegionRun
from co3d_compile.ir.program import Program
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.version import __version__

STORED = ("pool_scope", "stride_mode", "unsupported", "state_io", "frames_per_step", "recurrence")
"""The options that every file names."""


def describe(program: Program) -> metadata.Contract:
    """Writes the contract of a threaded program."""
    outputs = tuple(
        metadata.OutputSpec(
            o.name,
            _shape(program, o.shape),
            _name(o.dtype),
            o.delay,
            o.time_dim is not None,
            o.time_dim,
            o.pulse,
            float(o.rate),
        )
        for o in program.outputs
    )
    states = tuple(
        metadata.StateSpec(s.input, s.output, _shape(program, s.shape), _name(s.dtype), s.initial, 0, s.unbounded)
        for s in program.step.states
    )
    field, regions = program.step.receptive_field, program.notes.regions
    multiple = program.step.length_multiple
    lengths = multiple > 1 or any(run.least_frames for run in regions)
    return metadata.Contract(
        compiler_version=__version__,
        inputs=_inputs(program),
        outputs=outputs,
        states=states,
        frames_per_step={i.name: i.pulse for i in program.inputs if i.time_dim is not None},
        receptive_field=None if field is None else max(1, field),  # one frame too where nothing reads the first input
        warmup_steps=program.step.warmup_steps,
        window=program.step.window,
        recomputed=tuple(metadata.Recomputed(r.operator, r.module_path, r.reason) for r in program.notes.recomputed),
        regions=tuple(map(_region, regions)),
        options=_options(program),
        boundary=program.options.boundary,  # type: ignore[arg-type]
        valid=program.step.valid,
        flush_steps=program.step.flush_steps,
        counters=tuple(program.step.counters),
        length_multiple=multiple,
        length_remainder=int(program.inputs[0].shape[program.inputs[0].time_dim or 0]) % multiple,
        version=metadata.NEWEST if lengths or _has_boxes(program) else metadata.VERSION,
    )


def _inputs(program: Program) -> tuple[metadata.InputSpec, ...]:
    """Lists the model's inputs; those with boxes have rows of their own, and wait for their features."""
    nodes = program.placeholders()[: len(program.inputs)]
    return tuple(
        metadata.InputSpec(
            i.name,
            _shape(program, ["N" if i.boxes is None else "K", *(int(s) for s in n.meta["val"].shape[1:])]),
            _name(i.dtype),
            i.pulse if i.time_dim is not None else None,
            i.time_dim,
            i.waits if i.boxes is not None else None,
            0 if i.boxes else None,
        )
        for i, n in zip(program.inputs, nodes, strict=True)
    )


def _options(program: Program) -> JsonObject:
    """Lists the options that a reader may want to know; some only where they were asked for."""
    given = program.options
    options: JsonObject = {name: getattr(given, name) for name in STORED}
    if given.also:
        options["also"] = list(given.also)
    if _has_boxes(program):
        options["box_frame"] = given.box_frame
    options["time_dim"] = [i.time_dim for i in program.inputs]
    options["clip_frames"] = {i.name: int(i.shape[i.time_dim]) for i in program.inputs if i.time_dim is not None}
    if given.max_delay is not None:
        options |= {"max_delay": given.max_delay, "delay_by": given.delay_by}
        options["limited"] = [asdict(row) for row in program.notes.limited]
    return options


def _has_boxes(program: Program) -> bool:
    return any(i.boxes is not None for i in program.inputs)


def _region(run: RegionRun) -> metadata.LocalRegion:
    part = run.region
    reach = (part.before, part.after, part.period, run.entries, run.multiply_adds)
    names = part.name, part.inputs, part.dim
    return metadata.LocalRegion(part.operator, part.module_path, *reach, *names, run.least_frames)


def _shape(program: Program, shape: Sequence[int | str]) -> Shape:
    return tuple(cast(Shape, program.shape(shape)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
