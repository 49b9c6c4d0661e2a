"""``verify``: a compiled file in ONNX Runtime against the untouched model, by the oracle of DESIGN section 6."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from co3d_compile.comparison import Comparison, Worst, rounding
from co3d_compile.compiler import CompiledModel
from co3d_compile.contract import Contract
from co3d_compile.errors import UsageError, VerificationError
from co3d_compile.program import Options
from co3d_compile.reference import NoReference, Reference, Wanted, batch_of, inputs_of
from co3d_compile.session import StreamSession

Progress = Callable[[str, int, int], None]
ROUNDING = 20  # times the tolerance: below this an error may be one of rounding


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        passed: Whether every compared value is finite and within the tolerance.
        max_error: Largest absolute error.
        relative_error: Largest error in standard deviations of the output that is expected.
        tolerance: The relative error that is allowed.
        worst: Where the relative error is largest.
        steps: How many steps were compared, from ``warmup_steps`` on.
        warmup_steps: What the file says.
        receptive_field: What the file says, in frames; None if unbounded.
        outputs: Names of the outputs that were compared.
        reason: Why it did not pass; empty if it did.
        notes: What was compared with what, where that is not the whole untouched model.
    """

    passed: bool
    max_error: float
    relative_error: float
    tolerance: float
    worst: str
    steps: int
    warmup_steps: int
    receptive_field: int | None
    outputs: tuple[str, ...]
    reason: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**asdict(self), "outputs": list(self.outputs), "notes": list(self.notes)}


def verify(
    compiled: CompiledModel | str | os.PathLike[str],
    program: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> Verification:
    """Streams random frames through the compiled file in ONNX Runtime and compares with the untouched model.

    All floating states start at NaN (those of recurrent layers, and of what they read, as the file says). From
    ``warmup_steps`` on every value must be finite and equal to what the untouched model gives at that index of one
    long clip, and the receptive field must not be larger than the file says.

    Args:
        compiled: A compiled model, or the path of its ONNX file.
        program: The model that it was compiled from.
        example_inputs: The arguments of one clip, as for ``compile``.
        steps: Steps to compare after the warm-up; default a few.
        seed: Of the random frames.
        tolerance: Largest error, in standard deviations of what is expected.
        progress: Called with (stage, done, total).

    Raises:
        VerificationError: There is nothing to compare with; the message says why.
        UsageError: The file was not compiled from this model.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"steps is {steps}.", hint="Compare at least one step.")
    with _file(compiled) as path:
        session = StreamSession(path, batch=batch_of(program, example_inputs))
    with session:
        check = _Check(session, program, example_inputs, steps, seed, progress or (lambda *_: None))
        return check.run(tolerance)


@contextlib.contextmanager
def _file(compiled: CompiledModel | str | os.PathLike[str]) -> Iterator[str]:
    """The path of the file: nothing but the file is looked at."""
    if not isinstance(compiled, CompiledModel):
        yield os.fspath(compiled)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(compiled.save(Path(folder) / "model.onnx"))


class _Check:
    """One file beside its reference."""

    def __init__(
        self,
        session: StreamSession,
        program: nn.Module | ExportedProgram,
        example_inputs: Sequence[Any] | None,
        steps: int | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self.session, self.seed, self.progress = session, seed, progress
        self.info: Contract = session.info
        count = inputs_of(program, example_inputs)
        if count != len(self.info.inputs):
            raise _stranger(f"{len(self.info.inputs)} tensors", f"{count}")
        self.reference = Reference(program, example_inputs, _options(self.info))
        self._match()
        self.pulse = next(f for i in self.reference.inputs if (f := self.info.frames_per_step.get(i.name)))
        self.warmup = self.info.warmup_steps
        self.compared = steps or max(3, 8 // self.pulse + 2)
        self.recurrent = self.reference.recurrent_paths()
        self.steps = max(self.warmup, self._first() if self.recurrent else 0) + self.compared
        unit = self.reference.unit
        margin = -(-min(self.reference.clip, max(8, 2 * unit)) // unit) * unit
        self.front = 0 if self.recurrent else margin
        self.end = self.front + self.steps * self.pulse
        self.frames = self.reference.frames(self.reference.length(self.end + margin), seed)
        self.notes: list[str] = []
        self._done = 0

    def _first(self) -> int:
        """The first step at which a whole clip has been seen: before the first frame of a stream stands nothing."""
        step = self.warmup
        pairs = [(p, o.delay) for p, o in zip(self.reference.plans, self.info.outputs, strict=True) if p.reads]
        while any(s < 0 for p, delay in pairs for s in p.starts((step + 1) * self.pulse, delay)):
            step += 1
        return step

    def _match(self) -> None:
        """The file's inputs and outputs are the model's."""
        inputs, outputs = [i.name for i in self.reference.inputs], len(self.reference.plans)
        theirs = [i.name for i in self.info.inputs]
        if theirs != inputs or len(self.info.outputs) != outputs:
            raise _stranger(
                f"{', '.join(theirs)} and {len(self.info.outputs)} outputs",
                f"{', '.join(inputs)} and {outputs} outputs",
            )

    def run(self, tolerance: float) -> Verification:
        results = self._stream()
        wanted = [
            w
            for k in range(len(self.info.outputs))
            for step in range(self.warmup, self.steps)
            if (w := self._wanted(k, step)) is not None
        ]
        compare = Comparison(self.info, results)
        expected = self._expected(wanted, compare)
        worst = compare.worst(expected)
        if tolerance < worst.relative <= ROUNDING * tolerance:
            worst, tolerance = self._without_rounding(wanted, compare, expected, worst, tolerance)
        return self._result(worst, wanted, tolerance)

    def _without_rounding(
        self,
        wanted: list[Wanted],
        compare: Comparison,
        expected: dict[Wanted, list[Tensor]],
        worst: Worst,
        tolerance: float,
    ) -> tuple[Worst, float]:
        """The errors beside a reference in float64, and the tolerance.

        In float32 the untouched model has errors of its own; some networks amplify rounding a thousand times. Where
        those reach the tolerance a compiled model may be four times as far from float64: equally precise orders of
        its sums differ by that much in the largest error of a few steps.
        """
        self.reference.double()
        with contextlib.suppress(NoReference):
            exact = self._long_clip(self._surrounded(), wanted)
            beside = compare.worst(exact)
            if not beside.missing:
                own = rounding(expected, exact)
                said = f"the untouched model itself is off by {own:.1g} in float32"
                self.notes.append(f"Reference in float64: {said}, and up to four times that is rounding.")
                return beside, max(tolerance, min(4 * own, ROUNDING * tolerance))
        return worst, tolerance

    def _stream(self) -> list[tuple[Any, ...]]:
        """All outputs of every step, from states that hold NaN."""
        states = self.session.get_state()
        for name, value in states.items():
            own = name.removeprefix("state.").rpartition(".")[0] in self.recurrent
            if np.issubdtype(value.dtype, np.floating) and not own:
                states[name] = np.full_like(value, np.nan)
        self.session.set_state(states)
        results = []
        for step in range(self.steps):
            frames = self.reference.cut(self.frames, self.front + step * self.pulse, self.pulse)
            result = self.session.step(tuple(np.ascontiguousarray(x.numpy()) for x in frames))
            results.append(result if isinstance(result, tuple) else (result,))
            self._advance("stream")
        return results

    def _advance(self, stage: str) -> None:
        nodes = len(self.reference.program.graph.nodes) * (self.reference.unit if self.reference.dense else 1)
        self._done += 1
        self.progress(stage, min(self._done, self.steps + nodes), self.steps + nodes)

    def _wanted(self, output: int, step: int) -> Wanted | None:
        """Which entries, or which clip, a result is by the index equations."""
        spec, plan = self.info.outputs[output], self.reference.plans[output]
        if plan.sort == "static":
            return Wanted(output, step)
        if plan.sort == "window":
            starts = tuple(plan.starts((step + 1) * self.pulse, spec.delay))
            early = self.recurrent and any(s < 0 for s in starts)
            return None if early else Wanted(output, step, (), starts)
        per_step = self.pulse / plan.claim.rate
        count = spec.entries_per_step if spec.has_time else 1
        if per_step.denominator != 1 or (spec.has_time and count != per_step):
            raise VerificationError(f"Output '{spec.name}' gives {count} entries per step, expected {per_step}.")
        newest = (step + 1) * int(per_step) - 1 - spec.delay
        if self.recurrent and newest - count + 1 < 0:
            return None  # nothing stands before a stream that is exact from its first frame
        return Wanted(output, step, tuple(range(newest - count + 1, newest + 1)))

    def _expected(self, wanted: list[Wanted], compare: Comparison) -> dict[Wanted, list[Tensor]]:
        """The reference: first with NaN around the stream, then, where that gets into a result, with other frames."""
        reference = self.reference
        try:
            expected = self._long_clip(self._surrounded(), wanted)
            if not all(_finite(v) for v in expected.values()):
                expected = self._long_clip(self.frames, wanted)
        except NoReference as error:
            why = str(error).splitlines()[0]
            expected = reference.clips(self.frames, self.front, wanted)
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

    def _long_clip(self, frames: list[Tensor], wanted: list[Wanted]) -> dict[Wanted, list[Tensor]]:
        return self.reference.values(frames, self.front, self.end, wanted, lambda: self._advance("reference"))

    def _surrounded(self) -> list[Tensor]:
        """The frames, with NaN before and after the stream in the first input."""
        first, *rest = self.frames
        dim = self.reference.inputs[0].time_dim
        if dim is None or not first.is_floating_point():
            return self.frames
        first = first.clone()
        first.narrow(dim, 0, self.front).fill_(torch.nan)
        first.narrow(dim, self.end, first.shape[dim] - self.end).fill_(torch.nan)
        return [first, *rest]

    def _result(self, worst: Worst, wanted: list[Wanted], tolerance: float) -> Verification:
        reason = ""
        field = max(self.reference.fields, default=0)
        said = self.info.receptive_field
        if not wanted:
            reason = "Nothing was compared."
        elif worst.missing:
            reason = worst.missing
        elif not worst.relative <= tolerance:
            reason = f"The relative error {worst.relative:.2g} at {worst.where} is over the tolerance {tolerance:.0e}."
        elif said is not None and field > said:
            reason = f"The receptive field is at least {field} frames, the file says {said}."
        return Verification(
            passed=not reason,
            max_error=worst.absolute,
            relative_error=worst.relative,
            tolerance=tolerance,
            worst=worst.where,
            steps=len({w.step for w in wanted}),
            warmup_steps=self.warmup,
            receptive_field=said,
            outputs=tuple(o.name for o in self.info.outputs),
            reason=reason,
            notes=tuple(self.notes),
        )


def _stranger(theirs: str, ours: str) -> UsageError:
    return UsageError(f"The file was not compiled from this model: its inputs are {theirs}, the model's {ours}.")


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
