"""``compile``: a clip model in, a frame-by-frame model out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram

from co3d_compile import contract as metadata
from co3d_compile.batch import doubled
from co3d_compile.capture import capture
from co3d_compile.errors import Co3dWarning, OutputError, UsageError
from co3d_compile.export import export
from co3d_compile.labels import clean_labels
from co3d_compile.manager import Pass, Progress, run_passes
from co3d_compile.passes import default_passes
from co3d_compile.preprocess import preprocess_for
from co3d_compile.program import Options, Program, bytes_of
from co3d_compile.report import Report, details
from co3d_compile.survey import costs, with_costs, with_values
from co3d_compile.tune import tuned
from co3d_compile.version import __version__
from co3d_compile.whole_file import whole_file

log = logging.getLogger(__name__)
if TYPE_CHECKING:
    from co3d_compile.step_module import StepModule

LARGE = 2_000_000_000  # bytes from which weights go into a file of their own (protobuf ends at 2 GiB)


class CompiledModel:
    """A compiled model: the ONNX step model, its contract and its report.

    Attributes:
        program: The program after the last pass; ``program.graph`` is the step graph.
        model: The ONNX model (``onnx_ir``).
        info: The contract that is stored in the file (``docs/contract.md``).
    """

    def __init__(self, program: Program, model: ir.Model, info: metadata.Contract, report: Report) -> None:
        self.program = program
        self.model = model
        self.info = info
        self._report = report

    def report(self) -> Report:
        """What was done, and what it costs."""
        return self._report

    def to_bytes(self) -> bytes:
        """The ONNX file as bytes.

        Raises:
            OutputError: It is over 2 GB: use :meth:`save`.
        """
        if self.weight_bytes > LARGE:
            raise OutputError(
                "The model is over 2 GB, which one ONNX file cannot hold.",
                hint="Use save(path): it keeps the weights in a second file.",
            )
        return ir.to_proto(self.model).SerializeToString()

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the ONNX file: to a temporary file first, which is then renamed.

        Weights over 2 GB go into a second file beside it, ``<name>.data``.

        Raises:
            OutputError: The path cannot be written.
        """
        with whole_file(path) as written:
            if self.weight_bytes > LARGE:
                ir.save(self.model, written, external_data=f"{written.name}.data")
            else:
                written.write_bytes(self.to_bytes())
        return Path(path)

    def describe(self, preprocess: Mapping[str, Any] | None = None, labels: Sequence[str] | None = None) -> None:
        """Stores preprocessing and labels, as for :func:`compile`; None leaves what is there.

        Raises:
            UsageError, UnsupportedError: The preprocessing does not fit the model's inputs, or no output has so many
                classes.
        """
        changes: dict[str, Any] = {}
        if preprocess is not None:
            changes["preprocess"] = next(preprocess_for(spec, preprocess) for spec in self.info.inputs).to_dict()
        if labels is not None:
            changes["labels"] = clean_labels(labels)
            if not any(len(labels) in output.shape for output in self.info.outputs):
                shapes = ", ".join(f"{output.name} {list(output.shape)}" for output in self.info.outputs)
                raise UsageError(f"Given {len(labels)} labels, but no output has so many classes: {shapes}.")
        self.info = dataclasses.replace(self.info, **changes)
        self.model.metadata_props[metadata.METADATA_KEY] = self.info.to_json()

    def to_html(self) -> str:
        """The report as one page that needs nothing else: a drawing over time, bars, a table of all operators.

        Raises:
            Co3dError: Jinja2 is missing.
        """
        from co3d_compile.page import page

        return page(details(self._report, self.program.survey), self.info)

    def to_native(self) -> CompiledModel:
        """The same model for machines like this one alone, and faster: states too are in the blocked layout of ONNX
        Runtime's CPU kernels, so that no step reorders them. ``state_io="renamed"`` goes well with it.

        Only ONNX Runtime's CPU provider runs it; a session refuses it where blocks are of another size. What
        :meth:`StreamSession.get_state` returns is in that layout.

        Raises:
            UnsupportedError: ONNX Runtime has no blocked layout here.
        """
        from co3d_compile.native import to_native

        self._wide("to_native")
        return self._other(*to_native(self.model, self.info), self._report)

    def to_module(self) -> StepModule:
        """The step in eager PyTorch, with explicit state and trainable weights (docs/pytorch.md)."""
        from co3d_compile.step_module import StepModule

        self._wide("to_module")
        return StepModule(self.program, self.info)

    def with_weights(self, module: StepModule) -> CompiledModel:
        """A compiled model with the weights of a step module that was trained.

        Raises:
            UsageError: The module is of another compiled model.
            UnsupportedError: The model was compiled with ``boundary="exact"``.
        """
        from co3d_compile.step_module import with_weights

        self._wide("with_weights")
        program = with_weights(self.program, module)
        model = export(program)
        model.metadata_props[metadata.METADATA_KEY] = self.info.to_json()
        return CompiledModel(program, model, self.info, self._report)

    def with_half_states(self) -> CompiledModel:
        """The same model with its float32 states kept as float16: half the bytes, no longer exact."""
        from co3d_compile.half_states import with_half_states

        return self._reduced(*with_half_states(self.model, self.info), "States are kept as float16")

    def to_int8(self, frames: Iterable[Any]) -> CompiledModel:
        """The same model with 8-bit convolutions and matrix products, by ONNX Runtime's quantisation; no longer exact.

        Args:
            frames: For calibration, what :meth:`StreamSession.step` takes for one stream: more steps than the warm-up.

        Raises:
            UsageError, SessionError: Too few frames, or not what the model takes.
        """
        from co3d_compile.int8 import to_int8

        return self._reduced(*to_int8(self.model, self.info, frames), "Convolutions compute in 8 bits")

    def _reduced(self, model: ir.Model, info: metadata.Contract, what: str) -> CompiledModel:
        """A file of the same program that is not exact, which its report says."""
        size = sum(bytes_of(s.shape, getattr(torch, s.dtype)) for s in info.states)
        note = f"{what}: results are near those of the clip model, not equal to them."
        report = dataclasses.replace(self._report, state_bytes=size, warnings=[*self._report.warnings, note])
        model.metadata_props[metadata.REPORT_KEY] = json.dumps(details(report, self.program.survey))
        return self._other(model, info, report)

    def _other(self, model: ir.Model, info: metadata.Contract, report: Report) -> CompiledModel:
        model.metadata_props[metadata.METADATA_KEY] = info.to_json()
        return CompiledModel(self.program, model, info, report)

    def to_exported_program(self, batch: int | None = None) -> ExportedProgram:
        """The step as a ``torch.export`` program with explicit state, for AOTInductor, ExecuTorch and the like.

        Its arguments are the inputs of the ONNX file in their order: frames, ``valid`` if there is one, then one per
        state. It returns the results, then the next state of each state.

        Args:
            batch: The number of streams, fixed; None: any number.

        Raises:
            UsageError: The model itself fixes another batch.
        """
        from co3d_compile.step_module import exported_program

        self._wide("to_exported_program")
        return exported_program(self.program, batch)

    def save_exported_program(self, path: str | os.PathLike[str]) -> Path:
        """Writes :meth:`to_exported_program` as a ``.pt2`` archive, with the contract as its extra file ``co3d``.

        Raises:
            OutputError: The path cannot be written.
        """
        from co3d_compile.step_module import positional_contract

        with whole_file(path) as written:
            extra = {metadata.METADATA_KEY: positional_contract(self.info)}
            torch.export.save(self.to_exported_program(), written.with_suffix(".pt2"), extra_files=extra)
            written.with_suffix(".pt2").rename(written)  # PyTorch warns of other endings
        return Path(path)

    def __repr__(self) -> str:
        facts = dict(self._report.facts())
        return f"<CompiledModel {facts['model']}; receptive field {facts['receptive field']}; state {facts['state']}>"

    def _wide(self, what: str) -> None:
        if self.info.options.get("state_dtype") == "float16" or self.info.options.get("int8"):
            raise UsageError(f"{what} needs a model in full precision.", hint="Call it on the model as it was before.")

    def _repr_html_(self) -> str:
        return self._report.to_html()


def compile(
    module: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    *,
    window: int | None = None,
    frames_per_step: int | None = None,
    pool_scope: str = "frame",
    stride_mode: str = "step",
    boundary: str = "stream",
    unsupported: str = "window",
    state_io: str = "paired",
    state_dtype: str = "float32",
    time_dim: int | Sequence[int | None] = 2,
    passes: Sequence[Pass] | None = None,
    tune: bool = False,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    preprocess: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> CompiledModel:
    """Compiles a clip model into a model that takes the next frames and its own state.

    Continual convolutions, no temporal padding, delayed residuals: Hedegaard and Iosifidis, "Continual 3D
    Convolutional Neural Networks for Real-time Processing of Videos", ECCV 2022, section 3.

    Args:
        module: The trained clip model, or what ``torch.export`` made of it.
        example_inputs: The arguments of one clip, such as ``(torch.randn(1, 3, 16, 112, 112),)``.
        window: Frames that operators over the whole time axis (the head's pool) look at; default the clip's own.
        frames_per_step: New frames of the first input per step: the least possible, or a multiple of it.
        pool_scope: What a pool that gates the stream (squeeze-and-excitation) looks at: ``"frame"`` the current
            entry, ``"window"`` the newest window, ``"recompute"`` falls back to a window of everything behind it.
        stride_mode: ``"step"``: a step takes as many frames as the strides need. ``"dense"``: one result per frame.
        boundary: ``"stream"``: no start and no end. ``"exact"``: both ends as the clip model has them (docs/ends.md).
        unsupported: ``"window"``: operators without an extension run again on a window. ``"error"``: refused.
        state_io: ``"paired"``: each state has its output. ``"renamed"``: states that only move have none.
        state_dtype: ``"float16"``: :meth:`CompiledModel.with_half_states`, half the bytes, no longer exact.
        time_dim: The dim of the inputs that counts frames; a list gives it per input (None: no time).
        passes: The pipeline; default :func:`co3d_compile.default_passes`.
        tune: Measure on this machine which form of each continual convolution is fastest, instead of estimating it.
        dump: A directory to write the graph to, before and after each pass.
        progress: Called with (stage, done, total).
        preprocess: How a picture becomes a frame, by the names of :class:`co3d_compile.Preprocess`, such as
            ``{"size": 182, "mean": 0.45, "std": 0.225, "fps": 10}``. Stored in the file, changes nothing else.
        labels: Names of the classes, in the order of the scores. Stored in the file.

    Raises:
        Co3dError: One of its kinds; the message names the operator, the module path and the way out.
    """
    if state_dtype not in ("float32", "float16"):
        raise UsageError(f"state_dtype={state_dtype!r} is none of 'float32', 'float16'.")
    options = Options(window, frames_per_step, pool_scope, stride_mode, boundary, unsupported, state_io, time_dim)
    pipeline = list(default_passes() if passes is None else passes)
    folder = Path(dump) if dump is not None else None

    def build() -> CompiledModel:
        compiled = _compile(module, example_inputs, options, pipeline, folder, progress, two=True)
        if compiled.program.fixed_batch and example_inputs is not None and doubled(example_inputs) is not None:
            # The model is for one clip at a time: two of them are not what it was made for.
            compiled = _compile(module, example_inputs, options, pipeline, folder, progress, two=False)
        return compiled

    compiled = tuned(build, progress) if tune else build()
    compiled = compiled.with_half_states() if state_dtype == "float16" else compiled
    compiled.describe(preprocess, labels)
    for message in compiled.report().warnings:
        warnings.warn(message, Co3dWarning, stacklevel=2)
    return compiled


def _compile(
    module: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None,
    options: Options,
    pipeline: list[Pass],
    dump: Path | None,
    progress: Progress | None,
    *,
    two: bool,
) -> CompiledModel:
    """Captures, runs the passes, exports and reports."""
    start = time.perf_counter()
    if progress is not None:
        progress("capture", 0, len(pipeline) + 2)
    program = capture(module, example_inputs, options, two=two)
    seconds = {"capture": time.perf_counter() - start}
    operators = sum(n.op == "call_function" for n in program.graph.nodes)
    log.info("captured %s, %d operators: %.3f s", program.name, operators, seconds["capture"])
    clip = costs(program)

    def shown(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done + 1, total + 2)

    seconds.update(run_passes(program, pipeline, dump=dump, progress=shown))
    start = time.perf_counter()
    shown("export", len(pipeline), len(pipeline))
    model = export(program)
    info = describe(program)
    model.metadata_props[metadata.METADATA_KEY] = info.to_json()
    seconds["export"] = time.perf_counter() - start
    log.info("exported %d nodes, %d states: %.3f s", len(model.graph), len(program.states), seconds["export"])
    step = costs(program)
    report = Report.of(program, info, operators, clip.total, step.total, seconds)
    program.survey = with_values(with_costs(program.survey, clip, step, program), program)
    model.metadata_props[metadata.REPORT_KEY] = json.dumps(details(report, program.survey))
    return CompiledModel(program, model, info, report)


def describe(program: Program) -> metadata.Contract:
    """The contract of a threaded program."""
    nodes = program.placeholders()[: len(program.inputs)]
    inputs = tuple(
        metadata.InputSpec(
            i.name,
            _shape(program, ["N", *(int(s) for s in n.meta["val"].shape[1:])]),
            _name(i.dtype),
            i.pulse if i.time_dim is not None else None,
            i.time_dim,
        )
        for i, n in zip(program.inputs, nodes, strict=True)
    )
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
        metadata.StateSpec(s.input, s.output, _shape(program, s.shape), _name(s.dtype), s.initial, 0)
        for s in program.states
    )
    options = {
        k: getattr(program.options, k)
        for k in ("pool_scope", "stride_mode", "unsupported", "state_io", "frames_per_step")
    }
    options["time_dim"] = [i.time_dim for i in program.inputs]
    return metadata.Contract(
        compiler_version=__version__,
        inputs=inputs,
        outputs=outputs,
        states=states,
        frames_per_step={i.name: i.pulse for i in program.inputs if i.time_dim is not None},
        receptive_field=program.receptive_field,
        warmup_steps=program.warmup_steps,
        window=program.window,
        recomputed=tuple(metadata.Recomputed(r.operator, r.module_path, r.reason) for r in program.recomputed),
        options=options,
        boundary=program.options.boundary,  # type: ignore[arg-type]
        valid=program.valid,
        flush_steps=program.flush_steps,
    )


def _shape(program: Program, shape: Sequence[int | str]) -> metadata.Shape:
    return tuple("N" if isinstance(s, str) else s for s in program.shape(shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
