"""Refuses streams of a length at which their ends are not exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import SessionError
from co3d_compile.support.plain_types import Array
from co3d_compile.support.readable_numbers import plural


class StreamLengths:
    """How long streams must be, and how long they are by the counters among their states."""

    def __init__(self, info: Contract) -> None:
        self._least = 0 if info.shortest is None else info.shortest.least_frames
        self._multiple, self._remainder = info.length_multiple, info.length_remainder
        self._which, self._counters = info.lengths, info.counters
        self._frames = info.inputs[0].frames_per_step or 1

    def check(self, valid: Array, states: Mapping[str, Array], streams: Sequence[int] | Array | None = None) -> None:
        """Looks at the streams that end.

        Args:
            valid: Flags of the frames of this step.
            states: The counters as they are before it.
            streams: Which streams these are; default: all.

        Raises:
            SessionError: One has begun, and ends where it must not.
        """
        if valid.all():
            return
        steps, lacking = (states[name].reshape(-1) for name in self._counters)
        frames = steps * self._frames - lacking + valid.sum(1)
        wrong = (frames < self._least) | (frames % self._multiple != self._remainder)
        ending = np.flatnonzero(~valid.all(1) & (frames > 0) & wrong)
        if not len(ending):
            return
        stream = int(ending[0] if streams is None else streams[ending[0]])
        length = plural(int(frames[ending[0]]), "frame")
        raise SessionError(
            f"Stream {stream} ends after {length}. Ends are exact in streams {self._which}.",
            hint="Reset this stream and drop its results; run such a clip through the network itself.",
        )
