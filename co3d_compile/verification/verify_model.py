"""``verify``: a compiled file in ONNX Runtime against the untouched model, by the oracle of docs/testing.md."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from co3d_compile.capture.capture_model import arguments_of
from co3d_compile.capture.onnx_reader.onnx_file import OnnxSource
from co3d_compile.compiler.compile_model import compile
from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.contract.model_contract import Contract
from co3d_compile.contract.weights_digest import CHANGED, wrong_weights
from co3d_compile.errors import UsageError, VerificationError, first_line
from co3d_compile.ir.options import Options
from co3d_compile.ir.program import Program
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.memory import process_memory
from co3d_compile.support.plain_types import Array, JsonObject
from co3d_compile.verification.clip_model import Example, Model, batch_of, by_keyword, tensors_of
from co3d_compile.verification.compared_steps import WHOLE, Frames, Segment, Timeline, given_frames, random_frames
from co3d_compile.verification.comparison import Expected, LargestError, largest_error, rounding
from co3d_compile.verification.far_frames import changed_far_out
from co3d_compile.verification.findings import Bisection, StepError
from co3d_compile.verification.input_check import check_inputs, check_outputs
from co3d_compile.verification.long_boxes import rows_of
from co3d_compile.verification.onnx_reading import read_clip_model
from co3d_compile.verification.output_plans import ResultIndex
from co3d_compile.verification.reference import Reference
from co3d_compile.verification.replaced_kernels import replaced_kernels
from co3d_compile.verification.replaced_parts import ReplacedParts
from co3d_compile.verification.streamed_run import StreamedRun
from co3d_compile.verification.time_claims import NoReference
from co3d_compile.verification.verification import Verification

Progress = Callable[[str, int, int], None]
AGAIN = (  # as compiled
    *("pool_scope", "stride_mode", "unsupported", "state_io", "frames_per_step", "time_dim", "also", "recurrence"),
    *("max_delay", "delay_by", "box_frame"),
)
PERTURBED = 3  # runs of the untouched model with its frames off by rounding, to see what that makes of its results
TOLERANCE = 1e-4
REMEMBERS = (
    " Two calls of the network with the same clip do not give the same: it keeps something from call to call, or "
    "draws by chance. Make it begin anew in its forward."
)
# What is not exact, and how far off it may be: float16 states put X3D-S, at full size with random weights, 4e-2 off.
REDUCED = {"state_dtype": ("float16", "States are float16", 0.1), "int8": (True, "Convolutions compute in 8 bits", 1.0)}
ABOUT_RIGHT = 1e-2  # standard deviations: from here on a file is worth a closer look
ROUNDING = 20  # times the tolerance: below this an error may be one of rounding
OF_HALVES = 1000  # the same where the network itself computes in float16


def verify(
    compiled: CompiledModel | str | os.PathLike[str],
    program: nn.Module | ExportedProgram | OnnxSource,
    example_inputs: Sequence[Any] | Tensor | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
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
        program: The model that it was compiled from: what ``compile`` takes.
        example_inputs: The arguments of one clip, as for ``compile``.
        example_kwargs: Those that the network takes by keyword alone.
        steps: Steps to run behind the warm-up; default a few, with ``frames`` 32. Up to 32 are all compared; of more,
            nine segments from the first to the last, in memory that does not grow with them.
        frames: What ``StreamSession.step`` takes, step by step, such as the frames of a video; default random ones.
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
    model, example, reading = _clip_model(program, arguments_of(example_inputs), example_kwargs or {})
    with _file(compiled) as path:
        with StreamSession(path, batch=batch_of(model, example), layout="plain") as session:
            count = steps if frames is None else steps or WHOLE
            known = compiled.captured_of(model) if isinstance(compiled, CompiledModel) else None
            check = _Check(session, model, example, known, count, tolerance, progress or (lambda *_: None))
            check.notes = [*reading, *check.notes]
            check.look_at_weights(path)
            _run(check, _source(check, frames, seed))
            check.reason = check.reason or changed_far_out(check.reference, check.info, session, model, example, seed)
        if bisect and check.differs and not check.reduced and check.info.free_rows is None:
            check.bisection = _bisect(path, check, model, example)
    return check.result()


def _run(check: _Check, source: Iterator[Frames]) -> None:
    """Runs a verification, and says so where the network itself is the reason that it fails or cannot be done."""
    try:
        check.run(source)
    except VerificationError as error:
        if check.reference.captured.repeats():
            raise
        check.reason = f"{error}{REMEMBERS}"
    else:
        if not check.reference.captured.repeats():  # also where it agrees: it may have forgotten by chance
            check.reason = f"{check.reason}{REMEMBERS}".strip()


def _clip_model(
    program: Model | OnnxSource, example_inputs: Example, example_kwargs: Mapping[str, Any]
) -> tuple[Model, Example, tuple[str, ...]]:
    """Reads the network to compare with, the arguments of one clip, and notes on how it was read."""
    model, example, reading = read_clip_model(program, example_inputs)
    if example_kwargs and not isinstance(model, ExportedProgram):
        model, example = by_keyword(model, example or (), example_kwargs), None
    return model, example, reading


def _source(check: _Check, frames: Iterable[Any] | None, seed: int) -> Iterator[Frames]:
    """Makes the frames of each step: those given, or random ones."""
    reference, pulse = check.reference, check.timeline.pulse
    return random_frames(reference, pulse, seed) if frames is None else given_frames(reference, pulse, frames)


@contextlib.contextmanager
def _file(compiled: CompiledModel | str | os.PathLike[str]) -> Iterator[str]:
    """Gives the path of the file: of what was compiled nothing but the file is looked at."""
    if not isinstance(compiled, CompiledModel):
        yield os.fspath(compiled)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(compiled.save(Path(folder) / "model.onnx"))


def _bisect(path: str, check: _Check, program: Model, example: Example) -> Bisection:
    """Looks for the first operator that differs, on the segment with the largest error."""
    from co3d_compile.verification.first_difference import Bisect

    info = check.info
    again = partial(compile, program, example, window=info.window, **same_options(info))
    assert check.worst_segment is not None
    search = Bisect(path, info, again, check.reference, check.timeline, check.worst_segment)
    return search.run(lambda done, total: check.progress("bisect", done, total))


def same_options(info: Contract) -> JsonObject:
    """Reads the options by which a file can be compiled again, with its window or another one."""
    options = {name: info.options[name] for name in AGAIN if name in info.options}
    return {"time_dim": [spec.time_dim for spec in info.inputs], "boundary": info.boundary, **options}


class _Check:
    """One file beside its reference."""

    def __init__(
        self,
        session: StreamSession,
        program: Model,
        example_inputs: Example,
        known: Program | None,
        steps: int | None,
        tolerance: float | None,
        progress: Progress,
    ) -> None:
        self.info, self.progress = session.info, progress
        check_inputs(self.info, tensors_of(program, example_inputs))
        kernels = replaced_kernels(self.info)
        self.reference = Reference(program, example_inputs, _options(self.info), self.info.regions, kernels, known)
        check_outputs(self.info, len(self.reference.plans))
        self.timeline = Timeline(self.reference, self.info, steps)
        self.streamed = StreamedRun(session, self.reference.recurrent_paths())
        self.reduced = [(what, most) for key, (to, what, most) in REDUCED.items() if self.info.options.get(key) == to]
        most = max((most for _, most in self.reduced), default=TOLERANCE)
        self.tolerance = most if tolerance is None else tolerance
        self.notes = [f"{what}, so the file is not exact: up to {self.tolerance:g} passes." for what, _ in self.reduced]
        if what := self.reference.random_clips.what:
            self.notes.append(f"Random frames are {what}: for normal ones the network gives no finite numbers.")
        self.replaced = ReplacedParts(self.reference, self.info)
        self.results: dict[int, tuple[Array, ...]] = {}
        self.exact: Reference | None = None
        self.reason, self.differs, self.own_rounding = "", False, 0.0
        self.rounding = self.tolerance * (OF_HALVES if self.reference.has_halves else ROUNDING)
        self.largest, self.compared, self.changed = LargestError(), 0, False
        self.first_segment: Segment | None = None
        self.worst_segment: Segment | None = None
        self.bisection: Bisection | None = None
        self.memory: list[int | None] = []
        nodes = len(self.reference.program.graph.nodes) * (self.reference.unit if self.reference.dense else 1)
        self._done, self._total = 0, self.timeline.stop + nodes * len(self.timeline.ranges)

    def look_at_weights(self, path: str) -> None:
        """Notes whether the weights in the file are those that it was compiled with."""
        wrong = wrong_weights(self.info, path)
        self.changed = wrong == CHANGED
        self.notes += [f"{wrong}."] if wrong else []

    def run(self, source: Iterable[Frames]) -> None:
        """Streams, and compares segment by segment."""
        steps = self.streamed.steps(source, self.timeline.stop, lambda: self._advance("stream"))
        for segment in self.timeline.segments(steps):
            found = self._compare(segment)
            self.first_segment = self.first_segment or segment
            if self.worst_segment is None or found.relative > self.largest.relative:
                self.worst_segment = segment
            self.largest = self.largest.joined(found)
            self.results |= segment.results
            self.memory.append(process_memory())
        if self.first_segment is not None:
            self.replaced.look(self.first_segment, self.results)
        if self.exact is not None:
            own = f"the untouched model itself is off by {self.own_rounding:.1g} in float32"
            self.notes.append(f"Reference in float64: {own}, and up to four times that is rounding.")
        self.tolerance = max(self.tolerance, min(4 * self.own_rounding, self.rounding))
        self.reason, self.differs = self._explained()

    def _advance(self, stage: str) -> None:
        self._done += 1
        self.progress(stage, min(self._done, self._total), self._total)

    # --- one segment

    def _compare(self, segment: Segment) -> LargestError:
        pairs = [(k, step) for k in range(len(self.info.outputs)) for step in segment.steps]
        indices = [index for k, step in pairs if (index := self._index(k, step)) is not None]
        self.compared += len(indices)
        expected = self._expected(segment, indices)
        found = largest_error(self.info, segment.results, expected)
        if self.tolerance < found.relative <= self.rounding:
            found = self._without_rounding(segment, indices, expected, found)
        return found

    def _without_rounding(
        self, segment: Segment, indices: list[ResultIndex], expected: Expected, found: LargestError
    ) -> LargestError:
        """Measures the errors beside a reference in float64.

        In float32 the untouched model has errors of its own; some networks amplify rounding a thousand times. Where
        those reach the tolerance a compiled model may be four times as far from float64: equally precise orders of
        its sums differ by that much in the largest error of a few steps. What passes beside float64 as it is needs no
        such allowance.
        """
        exact = self.exact or self.reference.doubled()
        with contextlib.suppress(NoReference):
            values = exact.values(segment.surrounded(exact), segment.front, segment.inside, indices)
            beside = largest_error(self.info, segment.results, values)
            if not beside.missing:
                self.exact = exact
                count = PERTURBED if beside.relative > self.tolerance else 0
                perturbed = (self._long_clip(frames, segment, indices) for frames in segment.perturbed(count))
                self.own_rounding = max(self.own_rounding, *(rounding(v, values) for v in (expected, *perturbed)))
                return beside
        return found

    def _index(self, output: int, step: int) -> ResultIndex | None:
        """Says which entries, or which clip, a result is by the index equations."""
        spec, plan = self.info.outputs[output], self.reference.plans[output]
        timed = plan.timed(spec.has_time)
        count = spec.entries_per_step if timed else 1
        if not plan.streams:
            count = spec.entries_per_step if plan.first_for_ever else 1
        else:
            per_step = self.timeline.pulse / plan.claim.rate * plan.claim.places
            if per_step.denominator != 1 or (timed and count != per_step):
                raise VerificationError(f"Output '{spec.name}' gives {count} entries per step, expected {per_step}.")
            count //= plan.claim.places if timed else 1
        return self.timeline.index(output, plan, step, plan.late(spec.delay, spec.has_time), range(count))

    def _expected(self, segment: Segment, indices: list[ResultIndex]) -> Expected:
        """Runs the reference.

        First with NaN around the stream, then, where that gets into a result, with other frames.
        """
        reference = self.reference
        expected: Expected
        try:
            field = self.info.receptive_field
            expected = self._long_clip(segment.surrounded(reference), segment, indices, field)
            if not all(_finite(values) for values in expected.values()):
                expected = self._long_clip(segment.clip, segment, indices)
        except NoReference as error:
            why = first_line(error)
            expected = reference.clips(segment.clip, segment.front, indices)
            found = largest_error(self.info, segment.results, expected)
            if self.info.window not in (None, reference.clip) or found.missing or found.relative > ABOUT_RIGHT:
                raise VerificationError(
                    f"The model cannot be run on a long clip: {why}",
                    hint="Verify it by hand, or compile with --no-verify.",
                ) from error
            self.notes.append(f"Compared with the untouched model on each clip, as it cannot run on a long one: {why}")
        if self.timeline.recurrent:
            self.notes.append("Recurrent layers start from zero, and are compared from the first frame on.")
        return expected

    def _long_clip(
        self, frames: Frames, segment: Segment, indices: list[ResultIndex], field: int | None = None
    ) -> Expected:
        done = partial(self._advance, "reference")
        return self.reference.values(frames, segment.front, segment.inside, indices, done, field)

    # --- what it comes to

    def _explained(self) -> tuple[str, bool]:
        """Says why it did not pass, and whether an operator may be to blame."""
        field, limit = max(self.reference.fields, default=0), self.info.receptive_field
        found = self.largest
        wrong = any(not error <= self.tolerance for _, error in found.steps.values())
        if not self.compared:
            return "Nothing was compared.", False
        if (wrong or found.missing) and (last := self._depends_on_start()) is not None:
            start = f"The result at step {last} still depends on what the states held at the start (NaN)"
            return (
                f"{start}, and the file says that none does from step {self.info.warmup_steps} on (warmup_steps).",
                False,
            )
        if found.missing:
            return found.missing, False
        if wrong:
            over = f"over the tolerance {self.tolerance:.0e}"
            return f"The relative error {found.relative:.2g} at {found.where} is {over}.", True
        if limit is not None and field > limit:
            return f"The receptive field is at least {field} frames, the file says {limit}.", False
        if self.changed:
            return f"{CHANGED}, by the digest in its metadata (weights_sha256).", False
        return self.reference.regions.wrong or self.replaced.reason, False

    def _depends_on_start(self) -> int | None:
        """The last step of the first segment that depends on the states at the start."""
        segment = self.first_segment
        assert segment is not None
        return self.streamed.depends_on_start(segment, map(partial(self._frames, segment), range(segment.steps.stop)))

    def _frames(self, segment: Segment, step: int) -> Frames:
        """The frames that a step took."""
        frames = self.reference.cut(segment.clip, segment.front + step * self.timeline.pulse, self.timeline.pulse)
        pairs = zip(self.reference.inputs, frames, strict=True)
        return [rows_of(x[step - segment.base]) if i.boxes is not None else x for i, x in pairs]

    def result(self) -> Verification:
        """Writes down what was found."""
        first, last = (self.memory[0], self.memory[-1]) if len(self.memory) > 1 else (None, None)
        return Verification(
            passed=not self.reason,
            max_error=self.largest.absolute,
            relative_error=self.largest.relative,
            tolerance=self.tolerance,
            worst=self.largest.where,
            steps=len(self.largest.steps),
            warmup_steps=self.info.warmup_steps,
            receptive_field=self.info.receptive_field,
            outputs=tuple(o.name for o in self.info.outputs),
            reason=self.reason,
            notes=tuple(dict.fromkeys(self.notes)),
            errors=tuple(StepError(step, *error) for step, error in sorted(self.largest.steps.items())),
            streamed=self.streamed.streamed,
            nan_states=self.streamed.nan_states,
            finite_from=self.streamed.finite_from,
            memory=(first, last) if first is not None and last is not None else None,
            bisection=self.bisection,
            compared_with=self.replaced.compared_with,
            replaced_distance=self.replaced.distance,
        )


def _options(info: Contract) -> Options:
    """Reads the options that decide what is computed, as the file has them."""
    said = info.options
    dims = [i.time_dim for i in info.inputs]
    return Options(
        window=info.window,
        pool_scope=said.get("pool_scope", "frame"),
        stride_mode=said.get("stride_mode", "step"),
        time_dim=dims,
        also=tuple(said.get("also", ())),
        recurrence=said.get("recurrence", "state"),
        box_frame=said.get("box_frame", "middle"),
    )


def _finite(values: Sequence[Tensor]) -> bool:
    return bool(values) and all(bool(v.isfinite().all()) for v in values)
