"""``compile``: a clip model in, a frame-by-frame model out."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from co3d_compile.analysis import promises
from co3d_compile.analysis.delay_budget import late_error
from co3d_compile.analysis.delay_model import frames_late
from co3d_compile.analysis.multiply_adds import costs, with_costs
from co3d_compile.analysis.operator_survey import with_values
from co3d_compile.capture.capture_model import capture, captured_again, check_kinds
from co3d_compile.capture.onnx_reader.onnx_file import OnnxSource, is_onnx, read_onnx
from co3d_compile.capture.torn_views import torn_views
from co3d_compile.capture.tracer import doubled
from co3d_compile.capture.tracer import export as exported
from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.compiler.local_regions import stream_regions
from co3d_compile.compiler.program_contract import describe
from co3d_compile.compiler.program_report import details, report_of
from co3d_compile.compiler.replaced_module import ClipNetwork
from co3d_compile.compiler.time_dim_check import check_time_dim, usual_dims
from co3d_compile.compiler.tune_forms import tuned
from co3d_compile.contract import model_contract as metadata
from co3d_compile.errors import Co3dWarning, PassError, UnsupportedError
from co3d_compile.ir.options import Options
from co3d_compile.ir.pass_manager import Pass, Progress, check_passes, run_passes
from co3d_compile.ir.program import Program
from co3d_compile.onnx_export.export_program import export
from co3d_compile.passes import default_passes
from co3d_compile.rules.failures import RuleFailure

log = logging.getLogger(__name__)
RESTARTS = 3  # a rule that fails at one operator may fail at others of its kind


def compile(
    module: nn.Module | ExportedProgram | OnnxSource,
    example_inputs: Sequence[Any] | None = None,
    *,
    window: int | None = None,
    frames_per_step: int | None = None,
    pool_scope: str = "frame",
    stride_mode: str = "step",
    boundary: str = "stream",
    unsupported: str = "window",
    state_io: str = "paired",
    recurrence: str = "state",
    max_delay: int | None = None,
    delay_by: str = "fold",
    time_dim: int | Sequence[int | None] | None = None,
    also: Sequence[str] = (),
    example_kwargs: Mapping[str, Any] | None = None,
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
        module: The trained clip model, or what ``torch.export`` made of it, or an ONNX clip model: its path, or what
            ``onnx`` or ``onnx_ir`` have read.
        example_inputs: The arguments of one clip, such as ``(torch.randn(1, 3, 16, 112, 112),)``.
        window: Frames that operators over the whole time axis (the head's pool) look at; default the clip's own.
        frames_per_step: New frames of the first input per step: the least possible, or a multiple of it.
        pool_scope: What a pool that gates the stream (squeeze-and-excitation) looks at: ``"frame"`` the current
            entry, ``"window"`` the newest window, ``"recompute"`` falls back to a window of everything behind it.
        stride_mode: ``"step"``: a step takes as many frames as the strides need. ``"dense"``: one result per frame.
        boundary: ``"stream"``: no start and no end. ``"exact"``: both ends as the clip model has them (docs/ends.md).
        unsupported: ``"window"``: operators without an extension run again on a window. ``"error"``: refused.
        state_io: ``"paired"``: each state has its output. ``"renamed"``: states that only move have none.
        recurrence: ``"state"``: recurrent layers, and loops that hand values on, run on for as long as the stream.
            ``"window"``: where they never forget, they start again with each window, as the clip does.
        max_delay: Frames by which an answer may be late. What the network's own delay is more is saved by convolutions
            and pools over time that read less of the future: another network, which the report names
            (docs/latency.md).
        delay_by: How these read less of it: ``"fold"`` adds the last taps of a kernel to the last one that is left,
            ``"shift"`` stands the whole kernel later, ``"drop"`` leaves its last taps out.
        time_dim: The dim of the inputs that counts frames; a list gives it per input (None in it: no time). Default 2,
            unless the network itself takes dim 1 for its sequence, which is refused; a dim that is given is obeyed.
            The first convolution of an ONNX file says it: 1 for channels last, (N, T, H, W, C).
        also: Paths of modules whose results are outputs too, such as ``["trunk"]``, each with its own delay.
        example_kwargs: The arguments of one clip that the network takes by keyword alone.
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
    notes: list[str] = []
    if is_onnx(module):
        clip = read_onnx(module, [tuple(t.shape) for t in example_inputs or ()])
        module, example_inputs, notes = clip.module, example_inputs or clip.example_inputs, clip.notes
    check_kinds(module, example_inputs)
    network: nn.Module | ExportedProgram = module
    dims = usual_dims(network) if time_dim is None else time_dim
    treated = pool_scope, stride_mode, boundary, unsupported, state_io
    said = time_dim is not None or not isinstance(dims, int)  # the operators of an ONNX file tell
    options = Options(window, frames_per_step, *treated, dims, also, recurrence, max_delay, delay_by, said)
    pipeline = list(default_passes() if passes is None else passes)
    check_passes(pipeline)
    folder = Path(dump) if dump is not None else None

    def given(two: bool) -> nn.Module | ExportedProgram:
        if isinstance(network, ExportedProgram) or not example_kwargs:
            return network
        return exported(network, example_inputs or (), two, example_kwargs)

    def build() -> CompiledModel:
        whole = isinstance(network, ExportedProgram) or example_inputs is None
        both = not whole and doubled((tuple(example_inputs or ()), dict(example_kwargs or {})))
        try:
            compiled = _compile(given(two=True), example_inputs, options, pipeline, folder, progress, two=True)
        except (UnsupportedError, PassError):
            if not both:
                raise
        else:
            if not both or not compiled.program.step.fixed_batch:
                return compiled
        # The model is for one clip at a time: two of them are not what it was made for.
        return _compile(given(two=False), example_inputs, options, pipeline, folder, progress, two=False)

    def layer(network: nn.Module, clip: Tensor) -> CompiledModel:
        return compile(network, (clip,), state_io="renamed")

    compiled = tuned(build, layer, progress) if tune else build()
    if time_dim is None:
        check_time_dim(compiled.program, network, example_inputs, options)
    compiled.source = ClipNetwork(network, example_inputs, dict(example_kwargs or {}))
    compiled.describe(preprocess, labels)
    for message in [*notes, *compiled.report().warnings]:
        warnings.warn(message, Co3dWarning, stacklevel=2)
    return compiled


class _Torn(Exception):
    """Views that were taken for blocks of time split it into as many parts, however long the clip is."""

    def __init__(self, views: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(views)))
        self.views = views


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
    """Compiles; where a rule of the compiler fails, again from the captured graph, with that operator on a window."""
    failures: list[RuleFailure] = []
    torn: frozenset[str] = frozenset()
    while True:
        try:
            return _attempt(module, example_inputs, options, pipeline, dump, progress, failures, torn, two=two)
        except _Torn as found:
            torn |= found.views
        except RuleFailure as failure:
            if len(failures) == RESTARTS:
                raise
            log.warning("%s", failure.warning)
            failures.append(failure)


def _attempt(
    module: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None,
    options: Options,
    pipeline: list[Pass],
    dump: Path | None,
    progress: Progress | None,
    failures: Sequence[RuleFailure],
    torn: frozenset[str],
    *,
    two: bool,
) -> CompiledModel:
    """Captures, runs the passes, exports and reports."""
    start = time.perf_counter()
    if progress is not None:
        progress("capture", 0, len(pipeline) + 2)
    program = capture(module, example_inputs, options, two=two)
    program.decreed, program.torn = [failure.names for failure in failures], torn
    again = partial(captured_again, module, example_inputs, options, two, program)
    program.notes.warnings += [failure.warning for failure in failures]
    seconds = {"capture": time.perf_counter() - start}
    operators = sum(n.op == "call_function" for n in program.graph.nodes)
    log.info("captured %s, %d operators: %.3f s", program.name, operators, seconds["capture"])
    clip = costs(program)
    start = time.perf_counter()
    stream_regions(program, again)
    seconds["regions"] = time.perf_counter() - start

    def shown(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done + 1, total + 2)

    checks = promises.PROMISES if dump is not None or promises.always else {}
    seconds.update(run_passes(program, pipeline, dump=dump, progress=shown, checks=checks))
    if views := torn_views(program, again):
        raise _Torn(views)
    if "threaded" not in program.promises:
        hint = "Start from co3d.default_passes(), which ends with thread_states."
        raise PassError("No pass has made inputs and outputs of the states.", hint=hint)
    start = time.perf_counter()
    shown("export", len(pipeline), len(pipeline))
    _check_delay(program)
    model = export(program)
    info = describe(program)
    seconds["export"] = time.perf_counter() - start
    log.info("exported %d nodes, %d states: %.3f s", len(model.graph), len(program.step.states), seconds["export"])
    step = costs(program)
    report = report_of(program, info, operators, clip.total, step.total, seconds)
    program.notes.survey = with_values(with_costs(program.notes.survey, clip, step, program), program)
    model.metadata_props[metadata.REPORT_KEY] = json.dumps(details(report, program.notes.survey))
    compiled = CompiledModel(program, model, info, report)
    compiled.check_opens()
    return compiled


def _check_delay(program: Program) -> None:
    """Raises UnsupportedError where an output is later than ``max_delay``, by what the budget does not see."""
    budget = program.options.max_delay
    late = max((frames_late(o.delay, o.rate) for o in program.outputs), default=0)
    if budget is not None and late > budget:
        raise late_error(budget, late, [])
