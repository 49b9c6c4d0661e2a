"""From pictures of a video to the frames of each step, as a compiled model's file says: frame rate, size, value range.

Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from co3d_compile.contract.model_contract import Contract, OutputSpec
from co3d_compile.media.preprocess import Settings, stored_preprocess
from co3d_compile.media.video import Image, VideoFrame
from co3d_compile.runtime.step_inputs import Pulse
from co3d_compile.support.plain_types import Array


class Pictures:
    """The way from a picture to one frame of each input of a model, as the model's file says.

    Args:
        info: The contract in the file.
        given: Preprocessing that goes before the file's own, by the names of ``Preprocess``.

    Attributes:
        preprocess: One for each input of the model.

    Raises:
        UnsupportedError: The model takes no pictures. UsageError, ContractError: Preprocessing that does not fit.
    """

    def __init__(self, info: Contract, given: Settings | None = None) -> None:
        self.preprocess = [stored_preprocess(spec, info.preprocess, given or {}) for spec in info.inputs]
        self._dtypes = [spec.dtype for spec in info.inputs]

    def __call__(self, image: Image) -> list[Array]:
        """Makes one array for each input. What two inputs want alike is made once."""
        made = {each: each(image) for each in dict.fromkeys(self.preprocess)}
        return [made[each].astype(d, copy=False) for each, d in zip(self.preprocess, self._dtypes, strict=True)]


class Feed:
    """What one video gives a compiled model, step by step. Arguments and errors are those of ``Pictures``.

    Attributes:
        pictures: Turns a picture into a frame of each input.
        pulse: What one step takes.
        rate: Says how many times each frame is taken.
        pending: The frames that wait for the rest of their step, each as every input wants it.
    """

    def __init__(self, info: Contract, given: Settings | None = None) -> None:
        self.pictures = Pictures(info, given)
        self.pulse = Pulse(info)
        self.pending: list[list[Array]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets the stream: before another video."""
        self.rate = Rate(self.pictures.preprocess[0].fps)
        self.pending.clear()

    def add(self, frame: VideoFrame) -> Iterator[bool]:
        """Takes a frame as often as the rate says. Yields after each time whether there are frames for a step."""
        times = self.rate(frame.time)
        made = self.pictures(frame.image) if times else []
        for _ in range(times):
            self.pending.append(made)
            yield len(self.pending) >= self.pulse.frames

    def take(self) -> tuple[list[Array], Array | None]:
        """Takes what is pending as ``Pulse.step`` gives it: inputs and valid flags."""
        step = self.pulse.step(self.pending[: self.pulse.frames])
        del self.pending[: self.pulse.frames]
        return step

    def steps(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[Array, ...]]:
        """Yields the inputs of all whole steps of a video."""
        for frame in frames:
            for full in self.add(frame):
                if full:
                    yield tuple(self.take()[0])


def frame_about(info: Contract, spec: OutputSpec, steps: int, before: int = 0) -> int:
    """Finds the frame, from 0, that an entry of an output is about: the delay is taken off.

    Below 0: it is before the start.

    Args:
        steps: That were run.
        before: By how many entries it lies before the newest one.
    """
    pulse = Pulse(info)
    each = frames_per_entry(info, spec)
    entry = steps * pulse.first / each - 1 - spec.delay - before
    return math.floor(entry * each + 1e-6) * (pulse.frames // pulse.first)


def frames_per_entry(info: Contract, spec: OutputSpec) -> float:
    """Counts the frames of the first input for each entry of an output."""
    return spec.frames_per_entry or Pulse(info).first / max(1, spec.entries_per_step)


class Rate:
    """The number of times that each frame of a video is taken, so that a model gets its own frame rate.

    For each tick k / fps the first frame at or after it is taken; a frame that ends a gap fills the ticks in it. After
    a gap of over a second, or a jump back, the ticks are counted afresh.
    """

    LONGEST = 1.0  # seconds that are filled

    def __init__(self, fps: float | None) -> None:
        self.fps = fps
        self.restarts = 0
        self._next: float | None = None
        self._last = -math.inf

    def state(self) -> tuple[float | None, float | None]:
        """Says where it is, as JSON data, for ``restore``."""
        return self._next, self._last if math.isfinite(self._last) else None

    def restore(self, state: Sequence[float | None]) -> None:
        """Puts back what ``state`` gave."""
        self._next, self._last = state[0], -math.inf if state[1] is None else state[1]

    def __call__(self, seconds: float) -> int:
        jumped = self._next is not None and not -1e-6 <= seconds - self._last <= max(self.LONGEST, 2 / (self.fps or 1))
        self._last = seconds
        if jumped or self._next is None:
            self.restarts += jumped
            self._next = seconds
        if self.fps is None:
            return 1
        slack = min(0.002, 0.25 / self.fps)  # times are rounded to milliseconds in some formats
        count = max(0, math.floor((seconds + slack - self._next) * self.fps) + 1)
        self._next += count / self.fps
        return count
