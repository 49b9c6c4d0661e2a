"""The one oracle: the untouched model in eager PyTorch against the compiled file in ONNX Runtime.

It shares no code with the compiler, only the specification (DESIGN section 1): step j's newest entry has the
index (j + 1) * P - 1 - delay, and its value is what the model computes at that index on one long clip with
other frames on both sides. A network with a window is split: trunk on the long clip, head on the newest T
entries. All states start at NaN, so that from `warmup_steps` on nothing may depend on what they held.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compiled import compiled
from torch import Tensor, nn
from zoo import Entry, Reference, random_tensor
from zoo.longclip import LongClip, as_tuple, values_at

Array = npt.NDArray[Any]
_NOISE = 1e-6  # in standard deviations: below this two eager runs count as equal


@dataclass(frozen=True)
class Facts:
    """What a check found. `error` and `errors` (per output) are in standard deviations of what is expected."""

    error: float
    errors: tuple[float, ...]
    compared_steps: int
    frames_per_step: tuple[int, ...]
    delays: tuple[int, ...]
    warmup_steps: int | None
    measured_warmup: int | None
    receptive_field: int | None
    measured_receptive_field: int | None
    recomputed: tuple[Any, ...]


def open_session(compiled: Any, batch: int = 1) -> Any:
    """Saves the compiled model and opens the file: nothing but the file may be needed."""
    import co3d_compile as co3d

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        compiled.save(str(path))
        return co3d.StreamSession(str(path), batch=batch, threads=1)


def start_at_nan(session: Any) -> None:
    """Fills every floating-point state with NaN."""
    states = session.get_state()
    floating = {name: value for name, value in states.items() if np.issubdtype(value.dtype, np.floating)}
    session.set_state({**states, **{name: np.full_like(value, np.nan) for name, value in floating.items()}})


def pulses_of(session: Any) -> tuple[int, ...]:
    return tuple(session.info.frames_per_step.values())


def chunks(frames: Sequence[Tensor], dims: Sequence[int], pulses: Sequence[int]) -> Iterator[Any]:
    """The stream cut into steps, as `StreamSession.step` takes them."""
    for j in range(frames[0].shape[dims[0]] // pulses[0]):
        parts = tuple(
            np.ascontiguousarray(tensor.narrow(dim, j * pulse, pulse).numpy())
            for tensor, dim, pulse in zip(frames, dims, pulses, strict=True)
        )
        yield parts if len(parts) > 1 else parts[0]


def run_stream(session: Any, frames: Sequence[Tensor], dims: Sequence[int]) -> list[tuple[Array, ...]]:
    """All outputs of every step."""
    steps = chunks(frames, dims, pulses_of(session))
    return [tuple(np.array(value) for value in as_tuple(session.step(chunk))) for chunk in steps]


def relative_error(actual: Array, expected: Tensor) -> float:
    """Largest error in standard deviations of what is expected."""
    comparison = Comparison(1)
    comparison.add(0, 0, actual, expected)
    return comparison.finish(math.inf, "")[0]


class Comparison:
    """Largest error per output, in standard deviations of what is expected."""

    def __init__(self, outputs: int) -> None:
        self._worst = [(0.0, -1)] * outputs
        self._expected: list[list[Tensor]] = [[] for _ in range(outputs)]

    def add(self, output: int, step: int, actual: Array, expected: Tensor) -> None:
        wanted = expected.numpy()
        squeezed = tuple(n for n in wanted.shape if n != 1), tuple(n for n in actual.shape if n != 1)
        assert squeezed[0] == squeezed[1], f"output {output}: shape {actual.shape}, expected {wanted.shape}"
        difference = float(np.abs(actual.reshape(wanted.shape) - wanted).max())
        self._expected[output].append(expected.flatten())
        worst = (difference if math.isfinite(difference) else math.inf, step)
        self._worst[output] = max(self._worst[output], worst, key=lambda pair: pair[0])

    def scale(self, output: int) -> float:
        """The deviation of what is expected, a hundredth of its size at least: float32 knows 1.1 to 1e-7 only."""
        values = torch.cat(self._expected[output])
        spread = float(values.std()) if len(values) > 1 else 0.0
        return max(spread, float(values.abs().max()) / 100 if spread else 0.0) or 1.0

    def finish(self, tol: float, context: str) -> tuple[float, ...]:
        errors = tuple(worst / self.scale(k) for k, (worst, _) in enumerate(self._worst))
        for k, (error, (_, step)) in enumerate(zip(errors, self._worst, strict=True)):
            assert error <= tol, f"{context}: output {k} is off by {error:.3g} standard deviations at step {step}"
        return errors


class Check:
    """One network, compiled, streamed from its file, and its untouched copy."""

    def __init__(self, entry: Entry, batch: int, seed: int, margin: int | None = None, form: str = "") -> None:
        self.entry, self.batch, self.seed, self._margin = entry, batch, seed, margin
        self.untouched = entry.build()
        self.precise = False
        self.dims = entry.time_dims()
        self.compiled = compiled(entry)
        self.compiled = getattr(self.compiled, form)() if form else self.compiled
        self.session = open_session(self.compiled, batch)
        self.info = self.session.info
        self.pulses = pulses_of(self.session)
        self.delays = tuple(self.info.delays.values())
        self.clip = self._long_clip()
        self.outputs = self.clip.reference.outputs
        assert len(self.delays) == len(self.outputs), f"{len(self.delays)} delays for {len(self.outputs)} outputs"
        self.warmup = self.info.warmup_steps or 0

    def in_float64(self) -> None:
        """From now on the untouched network computes in double precision."""
        self.untouched.double()
        self.precise = True
        self.clip = self._long_clip()
        self.outputs = self.clip.reference.outputs

    def _long_clip(self) -> LongClip:
        make = self.entry.reference or (lambda m: Reference(m, time_dims=(self.entry.time_dims()[0],)))
        clip = [x.double() if self.precise and x.is_floating_point() else x for x in self._clip()]
        key = self.entry.build, self.entry.reference, self.batch
        return LongClip(make(self.untouched), clip, self.dims, self.entry.as_list, self._dense(), key)

    def random(self, steps: int, seed: int) -> list[Tensor]:
        """So many steps of every input."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [
            [self.batch, *(pulse * steps if k == dim else n for k, n in enumerate(shape) if k > 0)]
            for shape, dim, pulse in zip(self.entry.shapes, self.dims, self.pulses, strict=True)
        ]
        dtypes = self.entry.all_dtypes()
        return [random_tensor(tuple(s), dtype, generator) for s, dtype in zip(shapes, dtypes, strict=True)]

    def margin(self) -> int:
        """Steps of other frames before and after the stream."""
        return self._margin or max(math.ceil(n / pulse) for n, pulse in zip(self.clip.clip, self.pulses, strict=True))

    def surround(self, frames: Sequence[Tensor], before: int, after: int, seed: int, scale: float = 1.0) -> None:
        """Runs the untouched trunk on the stream with other frames around it, so many times as large."""
        front, back = self.random(max(before, 1), seed), self.random(max(after, 1), seed + 1)
        parts = [
            [a.narrow(dim, 0, before * pulse) * (scale if scale != 1.0 else 1), x, b.narrow(dim, 0, after * pulse)]
            for a, x, b, dim, pulse in zip(front, frames, back, self.dims, self.pulses, strict=True)
        ]
        long = [torch.cat(part, dim) for part, dim in zip(parts, self.dims, strict=True)]
        long = [x.double() if self.precise and x.is_floating_point() else x for x in long]
        self.clip.run(long, before * self.pulses[0])

    def value(self, output: int, step: int) -> Tensor:
        delay, unit = self.delays[output], self.unit(output)
        return values_at(self.clip, self.outputs[output], delay, unit, step, self.pulses[0])

    def unit(self, output: int) -> int:
        """How many of the entries that the delay counts come in a step."""
        return round(self.pulses[0] / (self.info.outputs[output].frames_per_entry or 1))

    def first_step(self, output: int) -> int:
        """First step of which no entry has a negative index."""
        what, delay = self.outputs[output], self.delays[output]
        if isinstance(what, int):
            return math.ceil(max(0, delay) / self.clip.entries(what, self.pulses[0]))
        reads = [(self.clip.lengths[k], self.clip.entries(k, self.pulses[0])) for k in what.reads]
        late = max(0, delay + what.crop) / self.unit(output)
        return max(math.ceil(length / rate + late) - 1 for length, rate in reads)

    def compare(
        self, results: list[tuple[Array, ...]], first: Sequence[int], tol: float, context: str
    ) -> tuple[float, ...]:
        """Every output from its first step on."""
        comparison = Comparison(len(self.outputs))
        for k in range(len(self.outputs)):
            for step in range(first[k], len(results)):
                assert len(results[step]) == len(self.outputs), "number of outputs"
                comparison.add(k, step, results[step][k], self.value(k, step))
        return comparison.finish(tol, f"{self.entry.name}, {context}")

    def expected(self, first: Sequence[int], steps: int) -> list[tuple[Array, ...]]:
        """What every step should give, in place of its results."""
        outputs = range(len(self.outputs))
        return [
            tuple(self.value(k, step).numpy() if step >= first[k] else np.empty(0) for k in outputs)
            for step in range(steps)
        ]

    def _dense(self) -> bool:
        return self.entry.options.get("stride_mode", "step") == "dense"

    def _clip(self) -> list[Tensor]:
        window = self.entry.options.get("window")
        lengths = [shape[dim] for shape, dim in zip(self.entry.shapes, self.dims, strict=True)]
        scaled = [n if window is None else n * window // lengths[0] for n in lengths]
        shapes = [
            [n if k == dim else size for k, size in enumerate(shape)]
            for shape, dim, n in zip(self.entry.shapes, self.dims, scaled, strict=True)
        ]
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, self.entry.all_dtypes(), strict=True)]


def check(
    what: Entry | nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    tol: float = 1e-4,
    nan_start: bool = True,
    batch: int = 1,
    seed: int = 0,
    margin: int | None = None,
    form: str = "",
    **fields: Any,
) -> Facts:
    """Compiles a network, streams it from its file in ONNX Runtime and compares every result.

    Args:
        what: a zoo entry, or a module with `example_inputs`.
        example_inputs: one clip, as the arguments of the module's forward.
        options: keyword arguments of `co3d.compile`, on top of the entry's.
        steps: steps of the stream; by default eight after the warm-up.
        tol: largest error, in standard deviations of the expected output.
        nan_start: fill all states with NaN before the first step.
        batch: streams that advance together.
        seed: of the streamed frames.
        margin: steps of other frames on both sides of the stream; by default a clip.
        form: the method of `CompiledModel` that makes the file, such as "to_native".
        fields: other fields of `Entry` (time_dim, reference, causal, tight, …).
    """
    entry = what if isinstance(what, Entry) else _entry_of(what, example_inputs or ())
    entry = replace(entry, **fields, options={**entry.options, **(options or {})})
    run = Check(entry, batch, seed, margin, form)
    frames = run.random(steps or run.warmup + 8, seed + 11)
    errors: tuple[float, ...] = ()
    if entry.nan_start:
        errors = _check_interior(run, frames, tol, nan_start)
    if entry.causal:
        errors = _worst(errors, _check_from_first_frame(run, frames, tol))
    measured = measure(run) if entry.tight else (None, None)
    info = run.info
    total = frames[0].shape[run.dims[0]] // run.pulses[0]
    compared = total if entry.causal else total - run.warmup
    facts = Facts(
        max(errors), errors, compared, run.pulses, run.delays, info.warmup_steps, measured[0],
        info.receptive_field, measured[1], tuple(info.recomputed),
    )  # fmt: skip
    if entry.tight:
        assert facts.warmup_steps == facts.measured_warmup, f"{entry.name}: {facts}"
        assert facts.receptive_field == facts.measured_receptive_field, f"{entry.name}: {facts}"
    return facts


def check_row(entry: Entry, delay: int | None) -> None:
    """As `check`; and the delay of its output is this one, where one is given."""
    facts = check(entry)
    if delay is not None:
        assert facts.delays == (delay,)


def _entry_of(module: nn.Module, example_inputs: Sequence[Any]) -> Entry:
    as_list = len(example_inputs) == 1 and isinstance(example_inputs[0], (list, tuple))
    tensors = as_tuple(example_inputs[0]) if as_list else tuple(example_inputs)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    return Entry(type(module).__name__, lambda: module.eval(), shapes, as_list=as_list)


def _worst(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(max, a, b)) if a else b


def _check_interior(run: Check, frames: Sequence[Tensor], tol: float, nan_start: bool) -> tuple[float, ...]:
    """After the warm-up every result is exact, whatever the states held and whatever stands around the stream."""
    if nan_start:
        start_at_nan(run.session)
    results = run_stream(run.session, frames, run.dims)
    first, context = [run.warmup] * len(run.outputs), "NaN start" if nan_start else "zero start"
    run.surround(frames, run.margin(), run.margin(), run.seed + 21)
    if tol < max(run.compare(results, first, math.inf, context)) < 20 * tol:
        # In float32 the untouched network has rounding errors of its own. Where those reach the tolerance (X3D with
        # random weights) the compiled one may be four times as far from float64, as equally precise orders are.
        wanted = run.expected(first, len(results))
        run.in_float64()
        run.surround(frames, run.margin(), run.margin(), run.seed + 21)
        own = max(run.compare(wanted, first, math.inf, context))
        tol = max(tol, 4 * own)
    return run.compare(results, first, tol, context)


def _check_from_first_frame(run: Check, frames: Sequence[Tensor], tol: float) -> tuple[float, ...]:
    """A causal network is right from its first frame: nothing stands before the stream."""
    run.session.reset()
    results = run_stream(run.session, frames, run.dims)
    run.surround(frames, 0, run.margin(), run.seed + 21)
    first = [run.first_step(k) for k in range(len(run.outputs))]
    return run.compare(results, first, tol, "from the first frame")


def measure(run: Check) -> tuple[int, int]:
    """Least warm-up in steps and receptive field in frames, found by changing frames of the untouched model."""
    steps = run.warmup + 2
    frames = run.random(steps, run.seed + 31)
    before = run.warmup + run.margin() + 1
    outputs = range(len(run.outputs))
    rounds = []
    for scale in (1.0, 8.0, -8.0):  # both signs: a maximum may ignore one of them
        run.surround(frames, before, run.margin(), 41, scale)
        rounds.append([[run.value(k, step) for k in outputs] for step in range(steps)])
    influenced = [
        step for step in range(steps) for other in rounds[1:] if any(map(_differ, other[step], rounds[0][step]))
    ]
    return max(influenced, default=-1) + 1, _receptive_field(run, frames)


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() > _NOISE * max(float(b.std(correction=0)), 1e-3)).any())


def _receptive_field(run: Check, base: Sequence[Tensor]) -> int:
    """Largest extent, over the entries of the last step, of the frames (first input) that reach one entry."""
    dim = run.dims[0]
    total = base[0].shape[dim]
    noise = torch.randn(base[0].shape, generator=torch.Generator().manual_seed(7)) * 8

    def last_step(frame: int | None, sign: float) -> list[Tensor]:
        frames = [tensor.clone() for tensor in base]
        if frame is not None:
            frames[0].select(dim, frame).add_(sign * noise.select(dim, frame))
        run.surround(frames, run.margin(), run.margin(), 41)
        step = total // run.pulses[0] - 1
        return [_per_entry(run, k, run.value(k, step)) for k in range(len(run.outputs))]

    unchanged = last_step(None, 0)
    reached: list[list[list[int]]] = [[[] for _ in value] for value in unchanged]
    for frame in range(total):
        for changed in (last_step(frame, 1), last_step(frame, -1)):
            for hits, after, value in zip(reached, changed, unchanged, strict=True):
                for entry in range(len(value)):
                    if _differ(after[entry], value[entry]):
                        hits[entry].append(frame)
    return max((max(hit) - min(hit) + 1 for hits in reached for hit in hits if hit), default=0)


def _per_entry(run: Check, output: int, value: Tensor) -> Tensor:
    what = run.outputs[output]
    return value.movedim(run.clip.reference.time_dims[what], 0) if isinstance(what, int) else value[None]
