"""Refuses streams that end before a part of the network that is local in time has all that its ends need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import SessionError
from co3d_compile.runtime.buffers import Array
from co3d_compile.support.readable_numbers import plural


class StreamLengths:
    """How long streams must be, and how long they are by the counters among their states."""

    def __init__(self, info: Contract) -> None:
        assert info.shortest is not None
        self._part, self._counters = info.shortest, info.counters
        self._frames = info.inputs[0].frames_per_step or 1

    def check(self, valid: Array, states: Mapping[str, Array], streams: Sequence[int] | Array | None = None) -> None:
        """Looks at the streams that end.

        Args:
            valid: Flags of the frames of this step.
            states: The counters as they are before it.
            streams: Which streams these are; default: all.

        Raises:
            SessionError: One has begun, and ends too early.
        """
        if valid.all():
            return
        steps, lacking = (states[name].reshape(-1) for name in self._counters)
        frames = steps * self._frames - lacking + valid.sum(1)
        short = np.flatnonzero(~valid.all(1) & (frames > 0) & (frames < self._part.least_frames))
        if not len(short):
            return
        stream = int(short[0] if streams is None else streams[short[0]])
        length, least = plural(int(frames[short[0]]), "frame"), self._part.least_frames
        raise SessionError(
            f"Stream {stream} ends after {length}. What begins with {self._part.place} is local in time, and has exact "
            f"ends in streams of {least} frames or more.",
            hint="Reset this stream and drop its results; run so short a clip through the network itself.",
        )
