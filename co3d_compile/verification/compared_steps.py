"""Which steps of a run are compared, and the long clips that say what they must answer.

A run may be as long as one likes: only the frames are kept that the newest steps depend on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from math import ceil
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import UsageError
from co3d_compile.support.plain_types import Array
from co3d_compile.verification.clip_model import off_by_rounding
from co3d_compile.verification.long_boxes import all_boxes
from co3d_compile.verification.output_plans import Plan, ResultIndex
from co3d_compile.verification.reference import Reference

WHOLE = 32  # steps behind the warm-up up to which all are compared
POINTS = 9  # segments of a longer run
LONGEST = 1000  # steps of a model that remembers all frames: its reference is one clip of them
Frames: TypeAlias = list[Tensor]


@dataclass(frozen=True)
class Step:
    """The frames that a step took, one tensor per input with its time dim, and all results."""

    frames: Frames
    results: tuple[Array, ...]


@dataclass(frozen=True)
class Segment:
    """Steps that are compared, in a long clip of all frames that they depend on with others around them.

    Attributes:
        steps: The steps that are compared.
        base: The step whose frames are the first of the stream's in the clip.
        clip: One tensor per model input, with time.
        front: Where the stream's frame 0 is in the clip; below 0 where the clip begins later.
        inside: Where the stream's frames are in the clip.
        results: All outputs of each step, by step.
    """

    steps: range
    base: int
    clip: Frames
    front: int
    inside: range
    results: dict[int, tuple[Array, ...]]

    def surrounded(self, reference: Reference) -> Frames:
        """Puts NaN before and after the stream in the clip's first input."""
        first, *rest = self.clip
        dim = reference.inputs[0].time_dim
        if dim is None or not first.is_floating_point():
            return self.clip
        first = first.clone()
        first.narrow(dim, 0, self.inside.start).fill_(torch.nan)
        first.narrow(dim, self.inside.stop, first.shape[dim] - self.inside.stop).fill_(torch.nan)
        return [first, *rest]

    def perturbed(self, count: int) -> Iterator[Frames]:
        """Yields the clip so many times, each number of it off by as much as float32 rounds."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            yield off_by_rounding(self.clip, generator)


class Timeline:
    """The steps of a run, and what their results are.

    Args:
        reference: What the model must answer.
        info: What the file says.
        steps: Steps to run behind the warm-up; None: a few.

    Raises:
        UsageError: A model that remembers all frames, and too many steps.
    """

    def __init__(self, reference: Reference, info: Contract, steps: int | None) -> None:
        self.reference, self.warmup = reference, info.warmup_steps
        self.recurrent = bool(reference.recurrent_paths())
        self.pulse = next(f for i in info.inputs if (f := i.frames_per_step))
        self.few = max(3, 8 // self.pulse + 2)
        pairs = zip(reference.plans, info.outputs, strict=True)
        self._plans = [(plan, plan.late(output.delay, output.has_time)) for plan, output in pairs]
        if info.boundary == "exact":  # what begins later than the stream, behind a start of its own, has its end there
            self.warmup += -(-reference.clip // self.pulse)
        begin, steps = self._first_whole_clip() if self.recurrent else self.warmup, steps or self.few
        if self.recurrent and steps > LONGEST:
            raise UsageError(
                f"This model remembers all frames, and {steps} steps cannot be compared on one clip of them.",
                hint=f"Compare at most {LONGEST} steps.",
            )
        self.ranges = [range(self.warmup, begin + steps)]
        if steps > WHOLE and not self.recurrent:
            begins = [begin + i * (steps - self.few) // (POINTS - 1) for i in range(POINTS)]
            self.ranges = [range(b, b + self.few) for b in dict.fromkeys(begins)]
        self.stop = self.ranges[-1].stop
        least = min(reference.clip, max(8, 2 * reference.unit))
        # What is cut out of the end of a clip belongs to a clip that begins before the stream, or lies before it; what
        # is cut out of its front to one that ends behind the stream.
        starts = self._starts(self.warmup)
        before = ceil(-min([*starts, *self._entries(self.warmup)], default=0))
        behind = ceil(max(starts, default=0)) + reference.clip - (self.warmup + 1) * self.pulse
        self.margin, self._behind = (
            -(-frames // reference.unit) * reference.unit
            for frames in (0 if self.recurrent else max(least, before), max(least, behind))
        )

    def _starts(self, step: int) -> list[Fraction]:
        """Says where the clips start whose results a step gives."""
        seen = (step + 1) * self.pulse
        return [start for plan, delay in self._plans for start in plan.starts(seen, delay)]

    def _entries(self, step: int) -> list[Fraction]:
        """Says where the oldest entries are, in frames, that a step gives of each streaming output."""
        found = []
        for plan, delay in self._plans:
            if plan.streams:
                several = int(self.pulse / plan.claim.rate)
                found.append((step * several - delay) * plan.claim.rate)
        return found

    def _first_whole_clip(self) -> int:
        """Finds the first step at which a whole clip has been seen.

        Before the first frame of a stream stands nothing.
        """
        step = self.warmup
        while any(start < 0 for start in self._starts(step)):
            step += 1
        return step

    def index(self, output: int, plan: Plan, step: int, delay: int, entries: range) -> ResultIndex | None:
        """Finds what a result is by the index equations; None where nothing stands before the first frame.

        Args:
            output: Its number.
            plan: How the reference computes it.
            step: The step that gives it.
            delay: Entries by which the newest one lags behind.
            entries: Which entries, counted back from the newest one of the step.
        """
        if plan.sort == "static":
            return ResultIndex(output, step, kept=len(entries))
        if plan.sort == "window":
            starts = tuple(plan.starts((step + 1) * self.pulse, delay))
            return None if self.recurrent and any(s < 0 for s in starts) else ResultIndex(output, step, (), starts)
        newest = (step + 1) * int(self.pulse / plan.claim.rate) - 1 - delay
        found = tuple(newest - back for back in reversed(entries))
        return None if self.recurrent and found[0] < 0 else ResultIndex(output, step, found)

    def segments(self, run: Iterable[Step]) -> Iterator[Segment]:
        """Yields each segment, once its last step has been run; where the run ends early, one of its last steps.

        Raises:
            UsageError: It ends before the first step that can be compared.
        """
        longest = max(map(len, self.ranges))
        recent: deque[Step] = deque(maxlen=None if self.recurrent else self.warmup + longest + self.reference.unit)
        left, seen, done = list(self.ranges), 0, 0
        for seen, step in enumerate(run, 1):
            recent.append(step)
            if seen == left[0].stop:
                yield self._segment(left[0], recent, seen)
                done = left.pop(0).stop
                if not left:
                    return
        if seen <= self.warmup:
            raise UsageError(
                f"After {seen} steps there are no more frames, and results are right from step {self.warmup} on.",
                hint=f"Give at least {(self.warmup + 1) * self.pulse} frames.",
            )
        first = left[0].start if left[0].start < seen else max(done, seen - self.few)
        if first < seen:
            yield self._segment(range(first, seen), recent, seen)

    def _base(self, first: int) -> int:
        """Finds the step from which on there must be frames, so that this one's results are right."""
        base = 0 if self.recurrent else max(0, first - self.warmup)
        while base * self.pulse % self.reference.unit:  # clips begin at each phase of a dense model
            base -= 1
        return base

    def _segment(self, steps: range, recent: Sequence[Step], seen: int) -> Segment:
        base, oldest = self._base(steps.start), seen - len(recent)
        items = [recent[i] for i in range(base - oldest, len(recent))]
        inside = range(self.margin, self.margin + len(items) * self.pulse)
        total = self.reference.length(inside.stop + self._behind)
        generator = torch.Generator().manual_seed(1 + base)
        before = self.reference.random_clips.draw(self.reference.shapes(inside.start), generator)
        behind = self.reference.random_clips.draw(self.reference.shapes(total - inside.stop), generator)
        clip = [
            all_boxes([item.frames[k] for item in items])
            if i.boxes is not None
            else items[0].frames[k]
            if i.time_dim is None
            else torch.cat([x, *(item.frames[k] for item in items), y], i.time_dim)
            for k, (i, x, y) in enumerate(zip(self.reference.inputs, before, behind, strict=True))
        ]
        results = {step: recent[step - oldest].results for step in steps}
        return Segment(steps, base, clip, self.margin - base * self.pulse, inside, results)


def random_frames(reference: Reference, pulse: int, seed: int) -> Iterator[Frames]:
    """Yields random frames of every input, step by step, and one to three boxes.

    An input without time stays the same.
    """
    generator, first = torch.Generator().manual_seed(seed), None
    for step in count(1):
        shapes = [
            [1 + step % 3, *shape[1:]] if i.boxes is not None else shape
            for i, shape in zip(reference.inputs, reference.shapes(pulse), strict=True)
        ]
        frames = reference.random_clips.draw(shapes, generator)
        first = first or frames
        moves = [i.time_dim is not None or i.boxes is not None for i in reference.inputs]
        yield [x if new else y for new, x, y in zip(moves, frames, first, strict=True)]


def given_frames(reference: Reference, pulse: int, steps: Iterable[Any]) -> Iterator[Frames]:
    """Yields the frames as ``StreamSession.step`` takes them, as tensors with time, for all streams of the batch.

    Raises:
        UsageError: They are not what the model takes.
    """
    shapes = reference.shapes(pulse)
    for number, given in enumerate(steps):
        arrays = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(arrays) != len(shapes):
            raise UsageError(f"Step {number} has frames for {len(arrays)} inputs, and the model has {len(shapes)}.")
        frames = []
        for spec, shape, array in zip(reference.inputs, shapes, arrays, strict=True):
            x = torch.from_numpy(np.array(array))  # a copy: whoever gives frames may use the memory again
            x = x.unsqueeze(spec.time_dim) if x.dim() == len(shape) - 1 and spec.time_dim is not None else x
            if spec.boxes is not None:
                shape = list(x.shape[:1]) + shape[1:]
            if [*x.shape[1:]] != shape[1:] or x.shape[0] not in (1, shape[0]) or x.dtype != spec.dtype:
                raise UsageError(
                    f"Step {number}: the frames for '{spec.name}' are {x.dtype} {np.shape(array)}, "
                    f"expected {spec.dtype} {tuple(shape)}.",
                    hint="Give for every step what StreamSession.step takes.",
                )
            frames.append(x.expand(shape).contiguous())
        yield frames
