"""What a target runs, the plain file that it is compared with, and the targets that need nothing else installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
import torch
from target_kinds import KINDS, Values, compiled_kind

import co3d_compile as co3d
from co3d_compile.contract.model_contract import Contract
from co3d_compile.native import running_form
from co3d_compile.verification.exported_step import load_step

Results: TypeAlias = "list[tuple[Any, ...]]"


@dataclass(frozen=True)
class Job:
    """What a target is to run.

    Attributes:
        kind: The kind of model, by its name.
        model: What it compiles to.
        steps: The inputs of each step, flags among them.
        folder: Where files may be written.
    """

    kind: str
    model: co3d.CompiledModel
    steps: list[Values]
    folder: Path

    @property
    def info(self) -> Contract:
        """The contract of the plain file."""
        return self.model.info

    @property
    def batch(self) -> int:
        """Streams."""
        return KINDS[self.kind].batch

    def frames(self, step: Values) -> list[Any]:
        """The model's own inputs of a step, in order."""
        return [step[spec.name] for spec in self.info.inputs]

    def flags(self, step: Values) -> Any:
        """Its flags; None where the model has none."""
        return None if self.info.valid is None else step[self.info.valid]

    def file(self) -> Path:
        """The plain file."""
        return self.model.save(self.folder / "model.onnx")


def by_the_loop(job: Job, content: bytes | None = None) -> Results:
    """The loop of the contract (docs/contract.md) around ONNX Runtime: what all targets are compared with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(content or job.model.to_bytes(), options, providers=["CPUExecutionProvider"])
    meta = json.loads(session.get_modelmeta().custom_metadata_map["co3d"])
    names, state = [output.name for output in session.get_outputs()], {}
    for s in meta["states"]:
        shape = [{"N": job.batch, "K": 0}.get(size, size) for size in s["shape"]]
        state[s["input"]] = np.full(shape, float(s["initial"]), s["dtype"])
    results = []
    for step in job.steps:
        values = {**step, **state}
        values |= zip(names, session.run(names, values), strict=True)
        state = {s["input"]: values[s["output"]] for s in meta["states"]}
        results.append(tuple(values[output["name"]] for output in meta["outputs"]))
    return results


def in_a_session(job: Job, model: co3d.CompiledModel | None = None, **options: Any) -> Results:
    """StreamSession, on the file as it is unless ``options`` say otherwise."""
    settings = {"layout": "plain", "threads": 1, **options}
    with co3d.StreamSession(model or job.model, job.batch, **settings) as session:

        def stream() -> Results:
            session.reset()
            return [_tuple(session.step(job.frames(step), valid=job.flags(step))) for step in job.steps]

        return twice(stream)


def twice(stream: Callable[[], Results]) -> Results:
    """What a stream gives that starts afresh behind another one."""
    stream()
    return stream()


def in_this_machines_layout(job: Job) -> Results:
    least, running_form.LEAST_BYTES = running_form.LEAST_BYTES, 0  # files of any size
    try:
        return in_a_session(job, layout="auto")
    finally:
        running_form.LEAST_BYTES = least


def native(job: Job) -> Results:
    return in_a_session(job, job.model.to_native())


def renamed(job: Job) -> Results:
    return by_the_loop(job, compiled_kind(job.kind, state_io="renamed").to_bytes())


def half_states(job: Job) -> Results:
    half = job.model.with_half_states()
    assert {s.dtype for s in half.info.states} <= {"float16", "float64", "int64", "bool", "uint8"}
    return by_the_loop(job, half.to_bytes())


def int8(job: Job) -> Results:
    """Calibrated on what comes: the streams of the batch, one after another."""
    every = [tuple(x[k : k + 1] for x in job.frames(step)) for k in range(job.batch) for step in job.steps]
    return by_the_loop(job, job.model.to_int8(every).to_bytes())


def _tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


# --- PyTorch --------------------------------------------------------------------------------------------------------


def eager(job: Job) -> Results:
    module, state, results = job.model.to_module(), None, []
    for step in job.steps:
        flags = job.flags(step)
        with torch.no_grad():
            values, state = module(
                *map(torch.from_numpy, job.frames(step)),
                state=state,
                valid=None if flags is None else torch.from_numpy(flags),
            )
        results.append(tuple(x.numpy().copy() for x in _tuple(values)))
    return results


def positional(job: Job, call: Callable[..., Any]) -> Results:
    """The loop of a reader that has the exported program alone."""
    state: Iterable[Any] = job.model.to_module().initial_state(job.batch)
    own, results = len(job.info.outputs), []
    for step in job.steps:
        flags = [] if job.info.valid is None else [job.flags(step)]
        values = call(*map(torch.from_numpy, [*job.frames(step), *flags]), *state)
        state = [x.clone() for x in values[own:]]  # some runtimes return views that the next step writes to
        results.append(tuple(x.numpy().copy() for x in values[:own]))
    return results


def exported(job: Job) -> Results:
    program, _ = load_step(job.model.save_exported_program(job.folder / "step.pt2"))
    with torch.no_grad():
        return positional(job, program)


def aot_inductor(job: Job) -> Results:
    path = str(job.folder / "step.aoti.pt2")
    package = torch._inductor.aoti_compile_and_package(job.model.to_exported_program(), package_path=path)
    return positional(job, torch._inductor.aoti_load_package(package))
