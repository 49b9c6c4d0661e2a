"""Whether a network does at places far out what a clip shows.

``min(t, 20)`` counts frames in a clip of eight, and in one twice as long. A stream counts on without end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from co3d_compile.capture.far_run import Sign, Trace, trace
from co3d_compile.capture.known_constants import Args, Kwargs, tensors_of
from co3d_compile.capture.tracer import Clip, Model
from co3d_compile.ir.constant_facts import band, progression

Numbers: TypeAlias = npt.NDArray[np.float64]
TimeDims: TypeAlias = tuple[int | None, ...]
FARTHEST = 1 << 13  # clips
LEAST = 4  # clips: nearer ones are captured as they are
MOST = 600  # operators that are run: for a third of a second
ALIKE = 1e-6  # of the largest number
TURNS = 8  # of a loop over frames, at least: what a turn does a few times is no loop
ENDS = 2  # last turns of a loop that may be of their own


@dataclass(frozen=True)
class Run:
    """Turns of a loop in a trace, or an operator outside of loops.

    Args:
        start: The first operator.
        period: Operators of a turn; 0 for one outside of loops.
        turns: How many.
    """

    start: int
    period: int
    turns: int


@dataclass(frozen=True)
class Count:
    """A constant that an operator on frames reads, and that grows with the clip.

    Args:
        value: In the clip as it was captured.
        lasts: Whether it goes on as it begins.
        alike: Whether it says the same to each frame of the clip.
    """

    value: Tensor
    lasts: bool
    alike: bool = False


@dataclass(frozen=True)
class FarPlaces:
    """What a network does far out.

    Args:
        frames: How far that was looked at.
        counts: What grows with the clip.
        same: Whether all else stays as it is in the clip.
    """

    frames: int
    counts: tuple[Count, ...]
    same: bool

    def lasts(self, value: Tensor) -> bool:
        """Says whether a constant that counts frames goes on so; one of no operator does where all does."""
        alike = [count.lasts for count in self.counts if _same_count(count.value, value)]
        return all(alike) if alike else self.same and all(count.lasts for count in self.counts)

    @property
    def unchanged(self) -> bool:
        """Whether nothing changes that is the same throughout the clip."""
        return self.same and all(count.lasts for count in self.counts if count.alike)


def look_far(
    model: Model, clip: Clip | None, keywords: Mapping[str, pytree.PyTree], dims: TimeDims
) -> FarPlaces | None:
    """Runs a network on long clips, as far as it takes them; None where it takes none that shows more.

    Args:
        model: The network.
        clip: Its arguments for one clip.
        keywords: Those that it takes by keyword alone.
        dims: The time dim of each tensor among them.
    """
    if isinstance(model, ExportedProgram) or clip is None or len(tensors_of((clip, keywords))) != len(dims):
        return None
    call = tuple(clip), dict(keywords)
    near = [found for factor in (1, 2) if (found := _traced(model, call, dims, factor)) is not None]
    if len(near) < 2:
        return None
    clips = len(near[1].signs) - len(near[0].signs)
    factor = FARTHEST
    while factor >= LEAST and clips > 0 and factor > LEAST and len(near[0].signs) + clips * (factor - 1) > MOST:
        factor //= 2
    while factor >= LEAST:
        far = _traced(model, call, dims, factor)
        places = _compared(near[0], near[1], far) if far is not None else None
        if places is not None:
            return places
        factor //= 4
    return None


def _traced(model: nn.Module, call: tuple[Args, Kwargs], dims: TimeDims, factor: int) -> Trace | None:
    try:
        return trace(model, call, dims, factor, 4 * MOST)
    except Exception:  # a network refuses other clips in any way it likes
        return None


def _compared(short: Trace, longer: Trace, far: Trace) -> FarPlaces | None:
    """Compares what a network does far out with what it does in a clip, and in one twice as long.

    None where it has no loops, and other operators: it may pad, or cut, clips of some lengths.
    """
    runs = list(_runs(far, max(TURNS, far.frames // short.frames // 2)))
    in_short, in_longer = (_fitted(far, runs, near) for near in (short, longer))
    if in_short is None or in_longer is None:
        return FarPlaces(far.frames, (), False) if any(run.period for run in runs) else None
    same = True
    counts: list[Count] = []
    times = far.frames / short.frames - 1
    for run, a, b in zip(runs, in_short, in_longer, strict=True):
        if run.period:
            same &= abs(run.turns - a.turns - (b.turns - a.turns) * times) < 1
            near = (short, a) if a.turns > 3 else (longer, b)
            same &= all(_column_lasts(x, y, own) for x, y, own in _columns(*near, far, run))
        else:
            at = a.start, b.start, run.start
            numbers = zip(*(t.numbers[n] for t, n in zip((short, longer, far), at, strict=True)), strict=False)
            same &= all(_number_lasts(x, y, z, times) for x, y, z in numbers)
            same &= _lists_last(short.lists.get(a.start, []), far.lists.get(run.start, []))
            pairs = zip(short.constants.get(a.start, []), far.constants.get(run.start, []), strict=False)
            counts += [count for x, y in pairs if (count := _count(x, y)) is not None]
    return FarPlaces(far.frames, tuple(counts), same)


def _runs(far: Trace, least: int) -> Iterator[Run]:
    """Yields the loops of a trace that have so many turns, and each operator outside of them, in their order."""
    numbers: dict[Sign, int] = {}
    ids = np.array([numbers.setdefault(sign, len(numbers)) for sign in far.signs])
    loops: list[Run] = []
    for period in range(1, len(ids) // least + 1):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        begin, end = (np.flatnonzero(same[1:] & ~same[:-1]), np.flatnonzero(~same[1:] & same[:-1]))
        for a, b in zip(begin, end, strict=True):
            turns = (int(b - a) + period) // period
            if turns >= least:
                loops.append(Run(int(a), period, turns))
                ids[a : a + turns * period] = -1 - np.arange(a, a + turns * period)
    at = 0
    for loop in [*sorted(loops, key=lambda run: run.start), Run(len(ids), 0, 0)]:
        yield from (Run(i, 0, 1) for i in range(at, loop.start))
        if loop.period:
            yield loop
        at = loop.start + loop.period * loop.turns


def _fitted(far: Trace, runs: Sequence[Run], near: Trace) -> list[Run] | None:
    """Finds the same loops, of fewer turns, and operators outside of them in another trace; None if it has others."""
    found, at = [], 0
    for run in runs:
        body = far.signs[run.start : run.start + max(run.period, 1)]
        turns = 0
        while near.signs[at : at + len(body)] == body and (run.period or not turns):
            at, turns = at + len(body), turns + 1
        if not turns:
            return None
        found.append(Run(at - turns * len(body), run.period, turns))
    return found if at == len(near.signs) else None


def _columns(near: Trace, a: Run, far: Trace, run: Run) -> Iterator[tuple[Numbers, Numbers, bool]]:
    """Yields each number of the operators of a loop over its turns, and whether it is one of their own."""
    for i in range(run.period):
        for name in ("numbers", "sums", "behind", "lists"):
            rows = [
                [_row(t, name, r.start + i + k * r.period) for k in range(r.turns)] for t, r in ((near, a), (far, run))
            ]
            if len({len(row) for turns in rows for row in turns}) == 1:  # others grow with each turn
                columns = (np.array(turns).T for turns in rows)
                yield from ((x, y, name in ("numbers", "sums")) for x, y in zip(*columns, strict=True))


def _row(of: Trace, name: str, at: int) -> tuple[float, ...]:
    """The numbers of one kind that an operator has."""
    if name == "lists":
        return tuple(n for column in of.lists.get(at, []) for n in column)
    found: tuple[float, ...] = getattr(of, name)[at]
    return found


def _column_lasts(near: Numbers, far: Numbers, own: bool) -> bool:
    """Says whether numbers go on as they do in a clip, if that goes by even steps, each turn or every few turns.

    First and last ones may be others.

    Args:
        near, far: In a clip, and far out.
        own: Whether they are the same in front; else they count from the first that goes on so.
    """
    for back in range(ENDS + 1):
        last = len(near) - back
        for every in range(1, len(near) // 3 + 1):
            for front in range(len(near) // 2 + 1):
                if last - front >= 2 * every + 2 and _even(near[front:last], every):
                    begin, x, y = (0, 0.0, 0.0) if own else (front, near[front], far[front])
                    begins = bool(np.allclose(near[begin:last] - x, far[begin:last] - y, rtol=ALIKE, atol=1e-12))
                    return begins and _even(far[front : len(far) - back], every)
    return True


def _even(line: Numbers, every: int) -> bool:
    """Says whether numbers go on by even steps, each from the one so many before it."""
    steps = line[every:] - line[:-every]
    return bool(np.abs(steps[every:] - steps[:-every]).max(initial=0.0) <= ALIKE * np.abs(line).max(initial=1e-6))


def _number_lasts(short: float, longer: float, far: float, times: float) -> bool:
    """Says whether a number outside of loops stays as it is, or grows with the clip.

    Behind a stride of 2, clips of 13 and 26 frames have 5 and 12 entries, or 20 and 48 rows: one entry may be rounding.
    """
    if short == longer or not short.is_integer():
        return far == short or short != longer
    grown = longer - short
    one = min(math.gcd(int(short), int(longer)), abs(grown) / 2) if abs(grown) > 1 else 0
    return abs(far) >= abs(short + math.copysign(abs(grown) - one, grown) * times)


def _lists_last(near: Sequence[Sequence[float]], far: Sequence[Sequence[float]]) -> bool:
    """Says whether lists go on as they do in a clip."""
    return all(_column_lasts(np.array(x), np.array(y), False) for x, y in zip(near, far, strict=False))


def _count(value: Tensor, far: Tensor) -> Count | None:
    """Says of a constant whether it goes on; None where it does not grow, or has other numbers throughout."""
    grown = [d for d, (n, m) in enumerate(zip(value.shape, far.shape, strict=False)) if n != m]
    if value.dim() != far.dim() or not grown or any(value.shape[d] > far.shape[d] for d in grown):
        return None
    front = far
    for d in grown:
        front = front.narrow(d, 0, value.shape[d])
    begins = torch.allclose(front.double(), value.double(), rtol=ALIKE, atol=1e-9)
    if all(bool((value == value.narrow(d, 0, 1)).all()) for d in grown):
        return Count(value, begins and all(bool((far == far.narrow(d, 0, 1)).all()) for d in grown), alike=True)
    if progression(value) is not None:
        return Count(value, begins and progression(far) is not None)
    return Count(value, _same_band(limits, far)) if (limits := band(value)) is not None else None


def _same_band(limits: tuple[int, int], far: Tensor) -> bool:
    """Says whether a mask lets frames see those within some distances, and no others."""
    places = torch.arange(far.shape[-1])
    distances = places[:, None] - places
    allowed = far.reshape(far.shape[-2:]) if far.dtype == torch.bool else far.reshape(far.shape[-2:]) == 0
    return torch.equal(allowed, (distances >= limits[0]) & (distances <= limits[1]))


def _same_count(a: Tensor, b: Tensor) -> bool:
    """Says whether two constants count the same, or let the same frames see each other, whatever dims they have."""
    if (bands := (band(a), band(b))) != (None, None):
        return bands[0] == bands[1]
    lines = progression(a), progression(b)
    if lines[0] is None or lines[1] is None:
        return False
    return bool(np.allclose(lines[0][1:], lines[1][1:], rtol=ALIKE, atol=1e-9))
