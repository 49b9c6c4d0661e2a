"""The oracle of one random network: its file against the untouched module, and its metadata against measurements."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from oracle import Check, Comparison, _check_interior, open_session, run_stream
from torch import Tensor
from zoo import Entry, Reference, Window, random_tensor
from zoo.longclip import eager, values_at

import co3d_compile as co3d

from .sketch import FIRST, Sketch, SketchNet, dtypes, module_of, shapes

TOLERANCE = 3e-4
OF_NORMS = 5e-3  # over a few numbers that are nearly alike: such norms amplify rounding
SEEN = 1e-9  # of an output's spread, in double precision
GATES = {"gate", "graph", "statistics"}
FALLS = {
    "head-std", "head-flatten", "count-joined", "up-repeat",
}  # fmt: skip
"""Kinds with which a network may be recomputed on a window; each other one must stream, whatever it stands beside."""


@dataclass(frozen=True)
class Outcome:
    """What became of one network: `verdict` is right, wrong, fell back, refused or internal."""

    verdict: str
    why: str = ""
    loose: bool = False


def entry_of(sketch: Sketch, crop: int = 0) -> Entry:
    """The zoo entry of a network; `crop` entries are left out in front of what its head reads."""
    options: dict[str, Any] = {"pool_scope": sketch.scope}
    if sketch.dense:
        options["stride_mode"] = "dense"
    if sketch.pulse:
        options["frames_per_step"] = sketch.pulse
    if sketch.window:
        options["window"] = sketch.window

    def reference(module: Any) -> Reference:
        twin = module.scoped()
        outputs: tuple[int | Window, ...] = (Window(twin.head, crop=crop),) if sketch.head else (0,)
        return Reference(twin.trunk, outputs, (sketch.time_dim if sketch.restore else 2,))

    found = shapes(sketch)
    dims = (sketch.time_dim,) * len(found)
    kept = [module_of(sketch)]
    return Entry(
        "random", lambda: kept[0], found, options=options, time_dim=dims, reference=reference, dtypes=dtypes(sketch),
        captured=sketch.captured,
    )  # fmt: skip


def examine(sketch: Sketch) -> Outcome:
    """Compiles, streams and measures a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            entry = entry_of(sketch)
            run = Check(entry, sketch.batch, 0)
        except co3d.Co3dError as error:
            if f"a clip of {sketch.window} frames in place of window" in str(error):
                return examine(replace(sketch, frames=sketch.window, window=0))
            kind = "internal" if isinstance(error, co3d.PassError) else "refused"
            return Outcome(kind, f"{type(error).__name__}: {error}")
        except Exception as error:
            return Outcome("internal", f"{type(error).__name__}: {error}")
        falls = bool(run.info.recomputed) or _gives_all(run)
        uneven = module_of(sketch).uneven()
        if falls and not uneven and not FALLS & sketch.kinds():
            return Outcome("fell back", str(run.info.recomputed))
        if falls and uneven:
            return Outcome(
                "right"
            )  # entries meet that are farther apart in each longer clip: nothing here says what each must be
        try:
            loose = _stream(sketch, run, entry, falls)
        except Exception as error:
            padded = sketch.head == "last" and ("pad" in sketch.kinds() or sketch.front("pad") > 0)
            if _hangs_on_nothing(run, padded) or _is_rounding(sketch, run, entry, falls):
                return Outcome("right")
            return Outcome("wrong", f"{type(error).__name__}: {error}"[:400])
    return Outcome("right", loose=loose)


def _is_rounding(sketch: Sketch, run: Check, entry: Entry, falls: bool) -> bool:
    """Says whether the file is right beside the untouched network in double precision."""
    run.entry = entry
    run.in_float64()
    try:
        _stream(replace(sketch, ends=()), run, entry, falls)
    except Exception:
        return False
    return True


def _hangs_on_nothing(run: Check, answers_with_padding: bool) -> bool:
    """Says whether the network gives the same for any clip, and each step just that.

    Where its answer is padding behind the clip, each step gives what stands in front of that.
    """
    clips = [[random_tensor(tuple(x.shape), x.dtype, torch.Generator().manual_seed(k)) for x in _clips(run)]
             for k in range(3)]  # fmt: skip
    with eager():
        wanted, *others = (run.untouched.scoped()(*clip) for clip in clips)
    if any(not torch.equal(wanted, other) for other in others):
        return False
    run.session.reset()
    results = [step[0] for step in run_stream(run.session, run.random(3, 11), run.dims)]
    return answers_with_padding or all(
        r.shape == wanted.shape and np.allclose(r, wanted, rtol=0, atol=TOLERANCE) for r in results
    )


def _clips(run: Check) -> list[Tensor]:
    """One clip of each input for each stream."""
    return [x.expand(run.batch, *x.shape[1:]) for x in run._clip()]


def _gives_all(run: Check) -> bool:
    """Says whether a step gives all entries of a clip, and not only the new ones."""
    pairs = zip(run.info.outputs, run.outputs, strict=True)
    return any(
        isinstance(what, int) and run.clip.lengths[what] == o.entries_per_step > run.clip.entries(what, run.pulses[0])
        for o, what in pairs
    )


def _stream(sketch: Sketch, run: Check, entry: Entry, falls: bool) -> bool:
    """All that is compared; whether the receptive field is told larger than it is."""
    gates = bool(GATES & sketch.kinds())
    if falls and (gates or not sketch.head):
        return False  # all T entries come out, or pools that are no gates: nothing here says what each must be
    if gates and sketch.scope == "window" and FIRST & sketch.kinds():
        return False  # what the first windows hold is not said, and is remembered
    if FIRST & sketch.kinds() or run.info.receptive_field is None:
        _from_first(sketch, run)
    elif _interior(sketch, run, run.random(run.warmup + 5, 11)):
        return False
    _places(run)
    if sketch.ends and not falls:
        _ends(sketch, entry)
    return _field(sketch, run)


def _interior(sketch: Sketch, run: Check, frames: list[Tensor]) -> bool:
    """Values; a head's window begins with the first entry that is not cropped, wherever the crops stand.

    The last entry is told by what was padded, as a crop is: more by what stands in front of it.
    Returns whether each answer is the network's own on the newest frames, its padding included.
    """
    wrong = []
    for crop in _crops(sketch):
        run.entry = entry_of(sketch, crop)
        run.clip = run._long_clip()
        run.outputs = run.clip.reference.outputs
        try:
            _check_interior(run, frames, TOLERANCE, nan_start=True)
            return False
        except AssertionError as error:
            wrong.append(error)
    if not sketch.head or not _slides(sketch, run, frames):
        raise wrong[0]
    return True


def _crops(sketch: Sketch) -> list[int]:
    """Lists how many entries may be left out in front of a head, nearest to none first; fewer than none are padded."""
    if not sketch.head:
        return [0]
    moved = sketch.channels == 1 and "shift-written" in sketch.kinds()  # all of a frame
    padded = sketch.front("pad") + moved if sketch.head == "last" else 0
    return sorted(range(-padded, sketch.front("crop") + 1), key=abs)


def _slides(sketch: Sketch, run: Check, frames: list[Tensor]) -> bool:
    """Says whether each answer is the network's own on the newest frames, all that it pads with included."""
    length = sketch.window or sketch.frames
    results = run_stream(run.session, frames, run.dims)
    twin = run.untouched.scoped()
    for ahead in range(sketch.front("crop") + 1):
        off, spread = [], []
        for step in range(run.warmup, len(results)):
            end = (step + 1) * run.pulses[0] - ahead
            if end < length or ahead % run.pulses[0]:
                continue
            parts = zip(frames, run.dims, run.pulses, strict=True)
            clips = [x.narrow(d, (end - length) * p // run.pulses[0], length * p // run.pulses[0]) for x, d, p in parts]
            with eager():
                wanted = twin(*clips)
            off.append(float((torch.from_numpy(np.array(results[step][0])) - wanted).abs().max()))
            spread.append(wanted)
        if off and max(off) <= TOLERANCE * float(torch.stack(spread).std()):
            return True
    return False


def _from_first(sketch: Sketch, run: Check) -> None:
    """Nothing stands before the stream: what counts and remembers begins with its first frame.

    Padding in front of what was cropped is frames in the stream: entries that read it are no entries of a clip.
    """
    first = [max(run.warmup, run.first_step(k)) for k in range(len(run.outputs))]
    later = -(-sketch.front("crop") // run.pulses[0])
    frames = run.random(max(first) + later + 5, 11)
    run.session.reset()
    results = run_stream(run.session, frames, run.dims)
    run.surround(frames, 0, run.margin(), 21)
    try:
        run.compare(results, first, TOLERANCE, "from the first frame")
    except AssertionError:
        if not later:
            raise
        run.compare(results, [f + later for f in first], TOLERANCE, "from the first frame that is not cropped")


def _places(run: Check) -> None:
    """Entries per step, frames per entry and the time dim, as the untouched module has them."""
    for k, (spec, what) in enumerate(zip(run.info.outputs, run.outputs, strict=True)):
        if not isinstance(what, int):
            continue
        entries = run.clip.entries(what, run.pulses[0])
        assert spec.has_time and spec.time_dim == run.clip.reference.time_dims[k], f"time dim {spec}"
        assert spec.entries_per_step == entries, f"entries per step: {spec}, {entries} come"
        assert Fraction(spec.frames_per_entry).limit_denominator(64) == Fraction(run.pulses[0], entries), f"{spec}"


def _ends(sketch: Sketch, entry: Entry) -> None:
    """With exact ends the whole sequence is the clip model's own output, at lengths of any remainder."""
    options = {**entry.options, "boundary": "exact"}
    model = module_of(sketch)
    exact = co3d.compile(model, entry.examples(), time_dim=entry.time_dim, **options)
    twin = model.scoped()
    if GATES & sketch.kinds() and sketch.scope == "window":
        return  # a window that is not yet whole is smaller
    for length in sketch.ends:
        if sketch.inputs == "slow":
            length -= length % 2
        _whole(sketch, exact, twin, length)


def _whole(sketch: Sketch, exact: co3d.CompiledModel, twin: SketchNet, length: int) -> None:
    session = open_session(exact, 1)
    (spec,) = session.info.outputs
    pulses = list(session.info.frames_per_step.values())
    steps = -(-length // pulses[0])
    generator = torch.Generator().manual_seed(length)
    clips = []
    for shape, dtype, pulse in zip(shapes(sketch), dtypes(sketch), pulses, strict=True):
        size = [length * pulse // pulses[0] if d == sketch.time_dim else n for d, n in enumerate(shape)]
        clips.append(random_tensor(tuple(size), dtype, generator))
    with eager():
        wanted = twin.trunk(*clips)
    dim, results = sketch.time_dim if sketch.restore else 2, []
    for j in range(steps):
        parts = []
        for x, pulse in zip(clips, pulses, strict=True):
            part = x.narrow(sketch.time_dim, j * pulse, min(pulse, x.shape[sketch.time_dim] - j * pulse))
            missing = [pulse - part.shape[d] if d == sketch.time_dim else n for d, n in enumerate(part.shape)]
            parts.append(torch.cat([part, torch.ones(missing, dtype=part.dtype)], sketch.time_dim).numpy())
        valid = np.arange(j * pulses[0], (j + 1) * pulses[0])[None] < length
        results.append(session.step(parts[0] if len(parts) == 1 else tuple(parts), valid=valid))
    results += session.flush()
    shape = [spec.entries_per_step if d == dim else n for d, n in enumerate(wanted.shape)]
    streamed = np.concatenate([np.asarray(r).reshape(shape) for r in results], dim)
    begin = max(spec.delay, 0)
    assert spec.delay >= 0 and streamed.shape[dim] >= begin + wanted.shape[dim], "results still due after flush()"
    comparison = Comparison(1)
    comparison.add(0, length, np.take(streamed, range(begin, begin + wanted.shape[dim]), dim), wanted)
    comparison.finish(OF_NORMS if "statistics" in sketch.kinds() else TOLERANCE, f"exact ends, {length} frames")


def _field(sketch: Sketch, run: Check) -> bool:
    """No frame outside the receptive field reaches an entry; whether fewer do than are told."""
    field = run.info.receptive_field
    if field is None or FIRST & sketch.kinds() or sketch.inputs in ("tokens", "uint8") or sketch.dense:
        return False
    run.in_float64()
    pulse, steps = run.pulses[0], run.warmup + 2
    before = run.margin()
    frames = [x.double() for x in run.random(steps + 2 * before, 31)]
    total, dim = frames[0].shape[run.dims[0]], run.dims[0]
    rows = [x[:1].repeat(total + 1, *(1,) * (x.dim() - 1)) for x in frames]
    index = torch.arange(total)
    moved = rows[0].movedim(dim, 1)
    moved[index + 1, index] += 1.5 + moved[index + 1, index].abs()
    run.clip.run(rows, before * pulse)
    seen = 0
    for k, what in enumerate(run.outputs):
        value = values_at(run.clip, what, run.delays[k], run.unit(k), steps - 1, pulse)
        for entry in value.movedim(run.clip.reference.time_dims[k], 0) if isinstance(what, int) else value[None]:
            flat = entry.flatten(1)
            far = (flat[1:] - flat[0]).abs().amax(1) > SEEN * max(float(flat.std()), 1e-6)
            hit = far.nonzero().flatten().tolist()
            seen = max(seen, hit[-1] - hit[0] + 1 if hit else 0)
    assert seen <= field, f"receptive field {field}, but {seen} frames reach an entry"
    return seen < field
