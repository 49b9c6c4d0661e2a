"""A compiled file that streams from states that hold NaN, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.plain_types import Array
from co3d_compile.verification.compared_steps import Frames, Segment, Step


class StreamedRun:
    """A run of a session.

    Args:
        session: At the start of a stream.
        recurrent: Module paths of the states that start as the file says, not at NaN.

    Attributes:
        nan_states: How many states start at NaN.
        streamed: How many steps were run.
        last_not_finite: The last step with a result that was not finite; -1 if there was none.
    """

    def __init__(self, session: StreamSession, recurrent: Collection[str]) -> None:
        self.session = session
        self.streamed, self.last_not_finite = 0, -1
        states = session.get_state()
        paths = {name: name.removeprefix("state.").rpartition(".")[0] for name in states}
        # A file that was compiled from another form of the network, a traced one, names all modules otherwise.
        other_form = bool(recurrent) and not any(path in recurrent for path in paths.values())
        unknown = {
            name: np.full_like(value, np.nan)
            for name, value in states.items()
            if _is_float(value) and not other_form and paths[name] not in recurrent
        }
        self.nan_states = len(unknown)
        session.set_state(states | unknown)

    def steps(self, source: Iterable[Frames], count: int, done: Callable[[], None]) -> Iterator[Step]:
        """Runs so many steps, or as many as there are frames."""
        for number, frames in zip(range(count), source, strict=False):
            results = self._step(frames)
            self.streamed = number + 1
            if not all(np.isfinite(r).all() for r in results if _is_float(r)):
                self.last_not_finite = number
            done()
            yield Step(frames, results)

    @property
    def finite_from(self) -> int | None:
        """The first step from which on all results were finite; None if even the last one was not."""
        return self.last_not_finite + 1 if self.last_not_finite + 1 < self.streamed else None

    def depends_on_start(self, segment: Segment, steps: Iterable[Frames]) -> int | None:
        """Finds the last step of a segment that gives something else if the states do not start at NaN.

        Args:
            segment: The first one of the run.
            steps: The frames of all steps from the start of the stream on.
        """
        last = None
        self.session.reset()
        for number, frames in enumerate(steps):
            pairs = zip(self._step(frames), segment.results.get(number, ()), strict=False)
            if not all(np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True) for a, b in pairs):
                last = number
        return last

    def _step(self, frames: Frames) -> tuple[Array, ...]:
        result = self.session.step(tuple(np.ascontiguousarray(x.numpy()) for x in frames))
        return result if isinstance(result, tuple) else (result,)


def _is_float(array: Array) -> bool:
    return np.issubdtype(array.dtype, np.floating)
