"""What a shard counts: answers, refusals, latency percentiles, batch fill."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from co3d_compile.serve.stream import Reply

KEPT = 4096  # the newest values that percentiles are taken of
PERCENTILES = (50, 90, 99)


class Stats:
    """Counts, and the newest values of what varies."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._latency: deque[float] = deque(maxlen=KEPT)
        self._step: deque[float] = deque(maxlen=KEPT)
        self._fill: deque[int] = deque(maxlen=KEPT)

    def count(self, what: str, number: int = 1) -> None:
        """Counts frames, answers, restarts, snapshots, …"""
        self.counts[what] += number
        self.export("events", number, what=what)

    def refuse(self, code: str) -> None:
        """Counts one frame that was not taken."""
        self.refused[code] += 1
        self.export("refused", 1, code=code)

    def answer(self, milliseconds: float) -> None:
        """Counts an answer, and the time from its frame's arrival at the shard."""
        self._latency.append(milliseconds)
        self.counts["answers"] += 1
        self.export("latency_ms", milliseconds)

    def batch(self, streams: int, milliseconds: float) -> None:
        """Counts one run of the model."""
        self._fill.append(streams)
        self._step.append(milliseconds)
        self.counts["runs"] += 1
        self.export("run_ms", milliseconds)
        self.export("batch", streams)

    def export(self, name: str, value: float, **tags: str) -> None:
        """Hands a value on to another collector of metrics: here to none."""

    def read(self) -> Reply:
        """Writes all of it as JSON data. Percentiles are of the newest 4096 values, null where there are none."""
        return {
            "counts": dict(self.counts),
            "refused": dict(self.refused),
            "latency_ms": _percentiles(self._latency),
            "run_ms": _percentiles(self._step),
            "batch_fill": _percentiles(self._fill) | {"mean": float(np.mean(self._fill)) if self._fill else None},
        }


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"p{q}": None for q in PERCENTILES}
    found = np.percentile(list(values), PERCENTILES)
    return {f"p{q}": float(value) for q, value in zip(PERCENTILES, found, strict=True)}
