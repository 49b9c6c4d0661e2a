"""From pictures of a video to the frames of each step, as a compiled model's file says: frame rate, size, value range.

Needs numpy, and PyAV for pictures that must be resized; nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy.typing as npt

from co3d_compile.contract.model_contract import Contract
from co3d_compile.media.preprocess import Preprocess, stored_preprocess
from co3d_compile.media.video import VideoFrame
from co3d_compile.runtime.step_inputs import Pulse

Array = npt.NDArray[Any]


class Feed:
    """What one video gives a compiled model, step by step.

    Args:
        info: The contract in the file.
        given: Preprocessing that goes before the file's own, by the names of ``Preprocess``.

    Attributes:
        preprocess: One for each input of the model.
        pulse: Frames of the video per step, at the model's rate.
        rate: Says how many times each frame is taken.
        pending: The frames that wait for the rest of their step, each as every input wants it.

    Raises:
        UnsupportedError: The model takes no pictures. UsageError, ContractError: Preprocessing that does not fit.
    """

    def __init__(self, info: Contract, given: Mapping[str, Any] | None = None) -> None:
        self.info = info
        self.preprocess = [stored_preprocess(spec, info.preprocess, given or {}) for spec in info.inputs]
        self._pulse = Pulse(info)
        self.pulse = self._pulse.frames
        self.pending: list[list[Array]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the stream: before another video."""
        self.rate = Rate(self.preprocess[0].fps)
        self.pending.clear()

    def prepare(self, frame: VideoFrame) -> list[Array]:
        """The frame as each input wants it."""
        made: dict[Preprocess, Array] = {}
        for each in self.preprocess:
            if each not in made:
                made[each] = each(frame.image)
        return [made[p].astype(s.dtype, copy=False) for p, s in zip(self.preprocess, self.info.inputs, strict=True)]

    @property
    def full(self) -> bool:
        """Whether there are frames for a step."""
        return len(self.pending) >= self.pulse

    def take(self) -> tuple[Array, ...]:
        """What is pending as ``StreamSession.step`` takes it, filled up with frames that are not there."""
        step, _ = self._pulse.step(self.pending[: self.pulse])
        del self.pending[: self.pulse]
        return tuple(step)

    def steps(self, frames: Iterable[VideoFrame]) -> Iterator[tuple[Array, ...]]:
        """All whole steps of a video."""
        for frame in frames:
            times = self.rate(frame.time)
            made = self.prepare(frame) if times else []
            for _ in range(times):
                self.pending.append(made)
                if self.full:
                    yield self.take()


class Rate:
    """Says how many times each frame of a video is taken, so that a model gets its own frame rate.

    For each tick k / fps the first frame at or after it is taken; a frame that ends a gap fills the ticks in it. After
    a gap of over a second, or a jump back, the ticks are counted afresh.
    """

    LONGEST = 1.0  # seconds that are filled

    def __init__(self, fps: float | None) -> None:
        self.fps = fps
        self.restarts = 0
        self._next: float | None = None
        self._last = -math.inf

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
