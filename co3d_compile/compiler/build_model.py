"""The way from a clip network to a compiled model: captured, rewritten, exported; begun again where it fails."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from co3d_compile.analysis import promises
from co3d_compile.analysis.delay_budget import late_error
from co3d_compile.analysis.delay_model import frames_late
from co3d_compile.analysis.multiply_adds import costs, with_costs
from co3d_compile.analysis.operator_survey import with_values
from co3d_compile.capture.capture_model import capture, captured_again
from co3d_compile.capture.far_places import FarPlaces, TimeDims, look_far
from co3d_compile.capture.longer_clips import fix_length, refuted
from co3d_compile.capture.tracer import doubled, export
from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.compiler.constant_outputs import spread_constant_outputs
from co3d_compile.compiler.local_regions import stream_regions
from co3d_compile.compiler.output_times import find_output_times
from co3d_compile.compiler.program_contract import describe
from co3d_compile.compiler.program_report import details, report_of
from co3d_compile.compiler.replaced_module import ClipNetwork
from co3d_compile.compiler.trial_step import try_step
from co3d_compile.contract import model_contract as metadata
from co3d_compile.errors import PassError, UnsupportedError
from co3d_compile.ir.options import Options
from co3d_compile.ir.pass_manager import Pass, Progress, run_passes
from co3d_compile.ir.program import Program
from co3d_compile.onnx_export.export_program import export as to_onnx
from co3d_compile.rules.failures import RuleFailure
from co3d_compile.support.silence_torch import without_torch_logs

log = logging.getLogger(__name__)
RESTARTS = 3  # a rule that fails at one operator may fail at others of its kind


class _Refuted(Exception):
    """A longer clip shows something else than was assumed of some captured nodes."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


@dataclass(frozen=True)
class Build:
    """What is compiled, and how.

    Args:
        source: The clip network with the arguments of one clip.
        options: The options of ``compile``.
        pipeline: The passes.
        dump: A directory for the graph before and after each pass.
        progress: Called with (stage, done, total).
    """

    source: ClipNetwork
    options: Options
    pipeline: list[Pass]
    dump: Path | None
    progress: Progress | None

    def model(self) -> CompiledModel:
        """Compiles for any number of clips at once; for a single one, where the network was made for one."""
        with without_torch_logs():
            return self._model()

    def _model(self) -> CompiledModel:
        source = self.source
        whole = isinstance(source.network, ExportedProgram) or source.clip is None
        two = not whole and doubled((tuple(source.clip or ()), dict(source.keywords)))
        try:
            compiled = self._restarted(two=True)
        except (UnsupportedError, PassError):
            if not two:
                raise
        else:
            boxes = any(i.boxes is not None for i in compiled.program.inputs)
            if not two or boxes or not compiled.program.step.fixed_batch:
                return compiled
        return self._restarted(two=False)

    def _restarted(self, *, two: bool) -> CompiledModel:
        """Compiles; where a rule fails, again from the captured graph, with the operator of that rule on a window."""
        network = self._network(two)
        failures: list[RuleFailure] = []
        wrong: frozenset[str] = frozenset()
        far = cache(partial(look_far, self.source.network, self.source.clip, self.source.keywords))
        while True:
            attempt = _Attempt(self, network, two, failures, wrong, far)
            try:
                return attempt.model()
            except _Refuted as found:
                wrong |= found.names
            except RuleFailure as failure:
                if len(failures) == RESTARTS:
                    raise
                log.warning("%s", failure.warning)
                failures.append(failure)

    def _network(self, two: bool) -> nn.Module | ExportedProgram:
        """Gives what is captured: arguments by keyword alone are part of the program that ``torch.export`` makes."""
        source = self.source
        if isinstance(source.network, ExportedProgram) or not source.keywords:
            return source.network
        return export(source.network, source.clip or (), two, source.keywords)


@dataclass
class _Attempt:
    """One way through capture, passes and export.

    Args:
        build: What is compiled, and how.
        network: What is captured.
        two: Whether one clip may be captured as two, so that the batch can be told from other dims.
        failures: Rules that have failed before; their operators are on a window.
        wrong: Captured nodes of which a longer clip has shown something else than was assumed.
        far: Looks at what the network does far out, by the time dims of its inputs.
    """

    build: Build
    network: nn.Module | ExportedProgram
    two: bool
    failures: list[RuleFailure]
    wrong: frozenset[str]
    far: Callable[[TimeDims], FarPlaces | None]
    seconds: dict[str, float] = field(default_factory=dict)

    def model(self) -> CompiledModel:
        """Captures, runs the passes, exports and reports."""
        build = self.build
        self._show("capture", -1, len(build.pipeline))
        with self._timed("capture"):
            program = self._captured()
        captured = program.copied()
        operators = sum(n.op == "call_function" for n in program.graph.nodes)
        log.info("captured %s, %d operators: %.3f s", program.name, operators, self.seconds["capture"])
        clip = costs(program)
        source = self.network, build.source.clip, build.options, self.two
        again = cache(partial(captured_again, *source, program))  # regions, and what is refuted, ask for the same clips
        self._show("regions", -1, len(build.pipeline))
        with self._timed("regions"):
            stream_regions(program, again)
        checks = promises.PROMISES if build.dump is not None or promises.always else {}
        self.seconds |= run_passes(program, build.pipeline, dump=build.dump, progress=self._show, checks=checks)
        if wrong := refuted(program, again, self.far):
            raise _Refuted(wrong)
        fix_length(program, again)
        find_output_times(program, again)
        spread_constant_outputs(program, again)
        _check_complete(program)
        self._show("export", len(build.pipeline), len(build.pipeline))
        with self._timed("export"):
            model = to_onnx(program)
            info = describe(program)
        log.info("exported %d nodes, %d states: %.3f s", len(model.graph), len(info.states), self.seconds["export"])
        step = costs(program)
        report = report_of(program, info, operators, clip.total, step.total, self.seconds)
        program.notes.survey = with_values(with_costs(program.notes.survey, clip, step, program), program)
        model.metadata_props[metadata.REPORT_KEY] = json.dumps(details(report, program.notes.survey))
        compiled = CompiledModel(program, model, info, report)
        compiled.captured = captured
        try_step(compiled, build.source)
        return compiled

    def _captured(self) -> Program:
        """Captures, and tells the program what earlier attempts have found."""
        program = capture(self.network, self.build.source.clip, self.build.options, two=self.two)
        program.decreed, program.refuted = [failure.names for failure in self.failures], self.wrong
        program.notes.warnings += [failure.warning for failure in self.failures]
        return program

    def _show(self, stage: str, done: int, total: int) -> None:
        """Shows progress: capture and export count beside the passes."""
        if self.build.progress is not None:
            self.build.progress(stage, done + 1, total + 2)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def _check_complete(program: Program) -> None:
    """Checks what passes have left: states with inputs and outputs, and no output later than ``max_delay``.

    Raises:
        PassError: No pass has threaded the states.
        UnsupportedError: An output is later, by what the budget does not see.
    """
    if "threaded" not in program.promises:
        hint = "Start from co3d.default_passes(), which ends with thread_states."
        raise PassError("No pass has made inputs and outputs of the states.", hint=hint)
    budget = program.options.max_delay
    late = max((frames_late(o.delay, o.rate) for o in program.outputs), default=0)
    if budget is not None and late > budget:
        raise late_error(budget, late, [])
