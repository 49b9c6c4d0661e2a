"""``verify``: a compiled file in ONNX Runtime against the untouched model, by the oracle of docs/testing.md."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from co3d_compile.compiler.compile_model import compile
from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import UsageError, VerificationError
from co3d_compile.ir.options import Options
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.memory import held_memory
from co3d_compile.verification.compared_steps import (
    WHOLE,
    Frames,
    Stretch,
    Timeline,
    given_frames,
    random_frames,
)
from co3d_compile.verification.comparison import Comparison, Worst, rounding
from co3d_compile.verification.findings import Bisection, StepError
from co3d_compile.verification.input_check import check_inputs, check_outputs
from co3d_compile.verification.output_plans import Wanted, wanted_at
from co3d_compile.verification.reference import Reference, batch_of, tensors_of
from co3d_compile.verification.time_claims import NoReference
from co3d_compile.verification.verification import Verification

Progress = Callable[[str, int, int], None]
AGAIN = ("pool_scope", "stride_mode", "unsupported", "state_io", "frames_per_step", "time_dim")  # as compiled
SHAKEN = 3  # runs of the untouched model with its frames off by rounding, to see what that makes of its results
TOLERANCE = 1e-4
# What is not exact, and how far off it may be: float16 states put X3D-S, at full size with random weights, 4e-2 off.
REDUCED = {"state_dtype": ("float16", "States are float16", 0.1), "int8": (True, "Convolutions compute in 8 bits", 1.0)}
ROUNDING = 20  # times the tolerance: below this an error may be one of rounding


def verify(
    compiled: CompiledModel | str | os.PathLike[str],
    program: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    *,
    steps: int | None = None,
    frames: Iterable[Any] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    bisect: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Streams frames through the compiled file in ONNX Runtime and compares with the untouched model.

    All floating states start at NaN (those of recurrent layers, and of what they read, as the file says). From
    ``warmup_steps`` on every value must be finite and equal to what the untouched model gives at that index of one
    long clip, and the receptive field must not be larger than the file says.

    Args:
        compiled: A compiled model, or the path of its ONNX file.
        program: The model that it was compiled from.
        example_inputs: The arguments of one clip, as for ``compile``.
        steps: Steps to run behind the warm-up; default a few, with ``frames`` 32. Up to 32 are all compared, of more
            nine stretches from the first to the last, in memory that does not grow with them.
        frames: What ``StreamSession.step`` takes, step by step, such as the frames of a video; default random ones.
            Where they end early the run does.
        seed: Of the random frames.
        tolerance: Largest error, in standard deviations of what is expected; default 1e-4, with float16 states 0.1, in
            8 bits 1.
        bisect: Whether to look for the operator that differs first, if values are wrong.
        progress: Called with (stage, done, total).

    Raises:
        VerificationError: There is nothing to compare with; the message says why.
        UsageError: The file was not compiled from this model; frames that it does not take, or too few.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"steps is {steps}.", hint="Compare at least one step.")
    with _file(compiled) as path:
        session = StreamSession(path, batch=batch_of(program, example_inputs))
        with session:
            check = _Check(session, program, example_inputs, progress or (lambda *_: None))
            check.plan(steps if frames is None else steps or WHOLE)
            pulse = check.timeline.pulse
            reduced = [(what, most) for key, (to, what, most) in REDUCED.items() if check.info.options.get(key) == to]
            if tolerance is None:
                tolerance = max((most for _, most in reduced), default=TOLERANCE)
            check.notes += [f"{what}, so the file is not exact: up to {tolerance:g} passes." for what, _ in reduced]
            source = random_frames if frames is None else given_frames
            check.run(source(check.reference, pulse, seed if frames is None else frames), tolerance)  # type: ignore
        if bisect and check.differs and not reduced:
            check.bisection = _bisect(path, check, program, example_inputs)
        return check.result()


@contextlib.contextmanager
def _file(compiled: CompiledModel | str | os.PathLike[str]) -> Iterator[str]:
    """The path of the file: nothing but the file is looked at."""
    if not isinstance(compiled, CompiledModel):
        yield os.fspath(compiled)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(compiled.save(Path(folder) / "model.onnx"))


def _bisect(path: str, check: _Check, program: nn.Module | ExportedProgram, example: Sequence[Any] | None) -> Bisection:
    """Looks for the first operator that differs, on the stretch with the largest error."""
    from co3d_compile.verification.first_difference import Bisect

    info = check.info
    said = {name: info.options[name] for name in AGAIN if name in info.options}
    again = partial(compile, program, example, window=info.window, boundary=info.boundary, **said)
    assert check.worst_stretch is not None
    search = Bisect(path, info, again, check.reference, check.timeline, check.worst_stretch)
    return search.run(lambda done, total: check.progress("bisect", done, total))


class _Check:
    """One file beside its reference."""

    def __init__(
        self,
        session: StreamSession,
        program: nn.Module | ExportedProgram,
        example_inputs: Sequence[Any] | None,
        progress: Progress,
    ) -> None:
        self.session, self.progress = session, progress
        self.info: Contract = session.info
        check_inputs(self.info, tensors_of(program, example_inputs))
        self.reference = Reference(program, example_inputs, _options(self.info))
        check_outputs(self.info, len(self.reference.plans))
        self.recurrent = self.reference.recurrent_paths()
        self.exact: Reference | None = None
        self.own_rounding = 0.0
        self.worst, self.wanted = Worst(), 0
        self.worst_stretch: Stretch | None = None
        self.first_stretch: Stretch | None = None
        self.bisection: Bisection | None = None
        self.notes: list[str] = []
        self.memory: list[int | None] = []
        self.nan_states = self.streamed = self._done = 0
        self.unsettled = -1

    def plan(self, steps: int | None) -> None:
        """Decides which steps are run and compared."""
        pulse = next(f for i in self.info.inputs if (f := i.frames_per_step))
        first = self._first(pulse) if self.recurrent else 0
        self.timeline = Timeline(self.reference, self.info, bool(self.recurrent), first, steps)
        nodes = len(self.reference.program.graph.nodes) * (self.reference.unit if self.reference.dense else 1)
        self._total = self.timeline.stop + nodes * len(self.timeline.ranges)

    def _first(self, pulse: int) -> int:
        """The first step at which a whole clip has been seen: before the first frame of a stream stands nothing."""
        step = self.info.warmup_steps
        pairs = [(p, o.delay) for p, o in zip(self.reference.plans, self.info.outputs, strict=True) if p.reads]
        while any(s < 0 for p, delay in pairs for s in p.starts((step + 1) * pulse, delay)):
            step += 1
        return step

    # --- the run

    def run(self, source: Iterable[Frames], tolerance: float) -> None:
        """Streams, and compares stretch by stretch."""
        self.asked = tolerance
        for stretch in self.timeline.stretches(self._stream(source)):
            found = self._compare(stretch, tolerance)
            self.first_stretch = self.first_stretch or stretch
            if self.worst_stretch is None or found.relative > self.worst.relative:
                self.worst_stretch = stretch
            self.worst = self.worst.joined(found)
            self.memory.append(held_memory())
        if self.exact is not None:
            said = f"the untouched model itself is off by {self.own_rounding:.1g} in float32"
            self.notes.append(f"Reference in float64: {said}, and up to four times that is rounding.")
        self.tolerance = max(tolerance, min(4 * self.own_rounding, ROUNDING * tolerance))
        self._explain()

    def _stream(self, source: Iterable[Frames]) -> Iterator[tuple[Frames, tuple[Any, ...]]]:
        """Frames and all outputs of every step, from states that hold NaN."""
        states = self.session.get_state()
        for name, value in states.items():
            own = name.removeprefix("state.").rpartition(".")[0] in self.recurrent
            if np.issubdtype(value.dtype, np.floating) and not own:
                states[name] = np.full_like(value, np.nan)
                self.nan_states += 1
        self.session.set_state(states)
        for step, frames in zip(range(self.timeline.stop), source, strict=False):
            results = self._step(frames)
            self.streamed = step + 1
            if not all(np.isfinite(r).all() for r in results if np.issubdtype(r.dtype, np.floating)):
                self.unsettled = step
            self._advance("stream")
            yield frames, results

    def _step(self, frames: Frames) -> tuple[Any, ...]:
        result = self.session.step(tuple(np.ascontiguousarray(x.numpy()) for x in frames))
        return result if isinstance(result, tuple) else (result,)

    def _advance(self, stage: str) -> None:
        self._done += 1
        self.progress(stage, min(self._done, self._total), self._total)

    # --- one stretch

    def _compare(self, stretch: Stretch, tolerance: float) -> Worst:
        wanted = [
            w
            for k in range(len(self.info.outputs))
            for step in stretch.steps
            if (w := self._wanted(k, step)) is not None
        ]
        self.wanted += len(wanted)
        compare = Comparison(self.info, stretch.results)
        expected = self._expected(stretch, wanted, compare)
        worst = compare.worst(expected)
        if tolerance / 2 < worst.relative <= ROUNDING * tolerance:
            worst = self._without_rounding(stretch, wanted, compare, expected, worst)
        return worst

    def _without_rounding(
        self,
        stretch: Stretch,
        wanted: list[Wanted],
        compare: Comparison,
        expected: dict[Wanted, list[Tensor]],
        worst: Worst,
    ) -> Worst:
        """The errors beside a reference in float64.

        In float32 the untouched model has errors of its own; some networks amplify rounding a thousand times. Where
        those reach the tolerance a compiled model may be four times as far from float64: equally precise orders of
        its sums differ by that much in the largest error of a few steps.
        """
        exact = self.exact or self.reference.doubled()
        with contextlib.suppress(NoReference):
            values = exact.values(stretch.surrounded(exact), stretch.front, stretch.inside, wanted, lambda: None)
            beside = compare.worst(values)
            if not beside.missing:
                self.exact = exact
                shaken = (self._long_clip(frames, stretch, wanted) for frames in stretch.shaken(SHAKEN))
                self.own_rounding = max(self.own_rounding, *(rounding(v, values) for v in (expected, *shaken)))
                return beside
        return worst

    def _wanted(self, output: int, step: int) -> Wanted | None:
        """Which entries, or which clip, a result is by the index equations."""
        spec, plan = self.info.outputs[output], self.reference.plans[output]
        if plan.sort not in ("static", "window"):
            per_step = self.timeline.pulse / plan.claim.rate
            count = spec.entries_per_step if spec.has_time else 1
            if per_step.denominator != 1 or (spec.has_time and count != per_step):
                raise VerificationError(f"Output '{spec.name}' gives {count} entries per step, expected {per_step}.")
            return wanted_at(output, plan, step, self.timeline.pulse, spec.delay, range(count), bool(self.recurrent))
        return wanted_at(output, plan, step, self.timeline.pulse, spec.delay, range(1), bool(self.recurrent))

    def _expected(self, stretch: Stretch, wanted: list[Wanted], compare: Comparison) -> dict[Wanted, list[Tensor]]:
        """The reference: first with NaN around the stream, then, where that gets into a result, with other frames."""
        reference = self.reference
        try:
            expected = self._long_clip(stretch.surrounded(reference), stretch, wanted)
            if not all(_finite(v) for v in expected.values()):
                expected = self._long_clip(stretch.clip, stretch, wanted)
        except NoReference as error:
            why = str(error).splitlines()[0]
            expected = reference.clips(stretch.clip, stretch.front, wanted)
            if self.info.window not in (None, reference.clip) or not compare.agrees(expected):
                raise VerificationError(
                    f"The model cannot be run on a long clip: {why}",
                    hint="Verify it by hand, or compile with --no-verify.",
                ) from error
            self.notes.append(f"Compared with the untouched model on each clip, as it cannot run on a long one: {why}")
        if reference.gates():
            scope = self.info.options.get("pool_scope", "frame")
            count = len(reference.gates())
            pools = f"{count} pool{'s' * (count > 1)} over time taken over one {scope}"
            self.notes.append(f"Reference: the model with {pools} (pool_scope).")
        if self.recurrent:
            self.notes.append("Recurrent layers start from zero, and are compared from the first frame on.")
        return expected

    def _long_clip(self, frames: Frames, stretch: Stretch, wanted: list[Wanted]) -> dict[Wanted, list[Tensor]]:
        return self.reference.values(frames, stretch.front, stretch.inside, wanted, lambda: self._advance("reference"))

    # --- what it comes to

    def _explain(self) -> None:
        """Why it did not pass, and whether an operator is to blame."""
        field, said = max(self.reference.fields, default=0), self.info.receptive_field
        wrong = any(not error <= self.tolerance for _, error in self.worst.steps.values())
        self.reason, self.differs = "", False
        if not self.wanted:
            self.reason = "Nothing was compared."
        elif (wrong or self.worst.missing) and (last := self._depends()) is not None:
            self.reason = (
                f"The result at step {last} still depends on what the states held at the start (NaN), and the file "
                f"says that none does from step {self.info.warmup_steps} on (warmup_steps)."
            )
        elif self.worst.missing:
            self.reason = self.worst.missing
        elif wrong:
            self.differs = True
            limit = f"over the tolerance {self.tolerance:.0e}"
            self.reason = f"The relative error {self.worst.relative:.2g} at {self.worst.where} is {limit}."
        elif said is not None and field > said:
            self.reason = f"The receptive field is at least {field} frames, the file says {said}."

    def _depends(self) -> int | None:
        """The last step of the first stretch that gives something else if the states do not start at NaN."""
        assert self.first_stretch is not None
        stretch, last = self.first_stretch, None
        self.session.reset()
        for step in range(stretch.steps.stop):
            frames = self.reference.cut(stretch.clip, stretch.front + step * self.timeline.pulse, self.timeline.pulse)
            results = self._step(frames)
            if step in stretch.results:
                pairs = zip(results, stretch.results[step], strict=True)
                if not all(np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True) for a, b in pairs):
                    last = step
        return last

    def result(self) -> Verification:
        memory = (self.memory[0], self.memory[-1]) if len(self.memory) > 1 else (None, None)
        return Verification(
            passed=not self.reason,
            max_error=self.worst.absolute,
            relative_error=self.worst.relative,
            tolerance=self.tolerance,
            worst=self.worst.where,
            steps=len(self.worst.steps),
            warmup_steps=self.info.warmup_steps,
            receptive_field=self.info.receptive_field,
            outputs=tuple(o.name for o in self.info.outputs),
            reason=self.reason,
            notes=tuple(dict.fromkeys(self.notes)),
            errors=tuple(StepError(step, *error) for step, error in sorted(self.worst.steps.items())),
            streamed=self.streamed,
            nan_states=self.nan_states,
            finite_from=self.unsettled + 1 if self.unsettled + 1 < self.streamed else None,
            memory=None if None in memory else memory,  # type: ignore[arg-type]
            bisection=self.bisection,
        )


def _options(info: Contract) -> Options:
    """The options that decide what is computed, as the file has them."""
    said = info.options
    dims = [i.time_dim for i in info.inputs]
    return Options(
        window=info.window,
        pool_scope=said.get("pool_scope", "frame"),
        stride_mode=said.get("stride_mode", "step"),
        time_dim=dims,
    )


def _finite(values: Sequence[Tensor]) -> bool:
    return bool(values) and all(bool(v.isfinite().all()) for v in values)


__all__ = ["Verification", "verify"]
