"""From predictions to events: what was seen, from when to when, and how surely."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np

from co3d_compile.errors import UsageError
from co3d_compile.media.class_scores import find_class, label_of
from co3d_compile.media.predictor import Prediction

Thresholds: TypeAlias = float | tuple[float, float]
"""The score at which an event begins, or this one and the score below which it ends."""
SILENCE = 1.0  # seconds without a prediction after which nothing goes on
FALL = 0.2  # of the score at which an event begins: so far it falls before the event ends, unless told otherwise


@dataclass(frozen=True)
class Event:
    """Something that was seen for a while. Times are those of the frames, the model's delay is taken off.

    Attributes:
        label: Name of the class, or its number.
        index: Number of the class.
        begin, end: Seconds from the start of the source; ``end`` is where the first result lies that is none of it.
        peak: The highest score.
        peak_time: When that was.
        mean: The mean score, gaps that were closed included.
    """

    label: str
    index: int
    begin: float
    end: float
    peak: float
    peak_time: float
    mean: float

    def __repr__(self) -> str:
        return f"<Event {self.label} from {self.begin:.2f} s to {self.end:.2f} s, peak {self.peak:.2f}>"

    def to_dict(self) -> dict[str, str | int | float]:
        """Writes the event as JSON data."""
        return {"class" if f.name == "index" else f.name: getattr(self, f.name) for f in fields(self)}


class EventFinder:
    """A finder of events in predictions as they come.

    Args:
        on: The score at which an event begins.
        off: The score below which it ends. Default: 0.8 times ``on``.
        shortest: Seconds below which an event is left out.
        gap: Seconds between two events of a class up to which they are one.
        classes: The classes that are looked for, by name or number. As a mapping: to their ``on``, or to their ``on``
            and ``off``. Default: all.

    Raises:
        UsageError: Values that make no sense; with the first prediction: a class that the model has not.
    """

    def __init__(
        self,
        on: float = 0.5,
        off: float | None = None,
        shortest: float = 0.0,
        gap: float = 0.0,
        classes: Sequence[str | int] | Mapping[str | int, Thresholds | None] | None = None,
    ) -> None:
        if not (0 <= shortest < math.inf and 0 <= gap < math.inf):
            raise UsageError("The shortest event and the gap are seconds from 0.")
        self._every = _pair(on if off is None else (on, off))
        self.shortest, self.gap = shortest, gap
        if isinstance(classes, str):
            raise UsageError(f"The classes are the text {classes!r}.", hint="Give a list of names.")
        given = classes if isinstance(classes, Mapping) else dict.fromkeys(classes or ())
        self._given = {name: self._every if pair is None else _pair(pair) for name, pair in given.items()}
        self._all = classes is None
        self._on = self._off = np.empty(0)
        self._runs: dict[int, _Run] = {}
        self._labels: tuple[str, ...] = ()
        self._last = -math.inf
        self._interval: float | None = None

    def add(self, prediction: Prediction) -> list[Event]:
        """Takes the next prediction; returns the events that are over for certain."""
        if not len(self._on):
            self.begin(len(prediction.scores), prediction.labels)
        seconds, found = prediction.time, []
        step = seconds - self._last
        if step < -1e-6 or (math.isfinite(step) and step > max(SILENCE, self.gap, 2 * (self._interval or step))):
            found = self.finish()
        elif 0 < step < math.inf:
            self._interval = step
        self._last = seconds
        scores = np.where(np.isfinite(prediction.scores), prediction.scores, -np.inf)
        if prediction.warmup:
            scores = np.full_like(scores, -np.inf)
        for index in sorted({*np.flatnonzero(scores >= self._on).tolist(), *self._runs}):
            found += self._follow(index, float(scores[index]), seconds)
        return found

    def finish(self) -> list[Event]:
        """Ends what goes on, at the end of the stream; returns these events."""
        found, self._runs = self.now(), {}
        return found

    def now(self) -> list[Event]:
        """Lists the events that are not over for certain, up to the last prediction."""
        end = self._last + (self._interval or 0.0)
        return [event for index, run in self._runs.items() if (event := self._event(index, run, end))]

    def begin(self, count: int, labels: tuple[str, ...]) -> None:
        """Sets the thresholds of every class of a model; where nothing is looked for, they are infinite.

        The first prediction does it, unless it was done before.

        Raises:
            UsageError: The model has no class of a name that is looked for.
        """
        self._labels = labels
        pairs = [self._every if self._all else (math.inf, math.inf)] * count
        for name, pair in self._given.items():
            pairs[find_class(name, count, self._labels)] = pair
        self._on, self._off = np.array(pairs).T

    def _follow(self, index: int, score: float, seconds: float) -> list[Event]:
        """Takes the next score of a class that goes on, or begins."""
        run, found = self._runs.get(index), []
        if run is not None and run.end is not None and seconds - run.end > self.gap + 1e-6:
            found = [event for event in (self._event(index, run, seconds),) if event]
            run = None
            del self._runs[index]
        high = score >= (self._on[index] if run is None or run.end is not None else self._off[index])
        if run is None and high:
            self._runs[index] = _Run(seconds, seconds, score, score, 1)
        elif run is not None and high:
            run.take(score, seconds)
        elif run is not None:
            run.miss(score, seconds)
            if not self.gap:
                found += [event for event in (self._event(index, run, seconds),) if event]
                del self._runs[index]
        return found

    def _event(self, index: int, run: _Run, end: float) -> Event | None:
        end = end if run.end is None else run.end
        if end - run.begin < self.shortest - 1e-6:
            return None
        name = label_of(self._labels, index)
        return Event(name, index, run.begin, end, run.peak, run.peak_time, run.total / run.count)


@dataclass
class _Run:
    """Scores of a class from ``begin``; from ``end`` on they are low, and do not count yet."""

    begin: float
    peak_time: float
    peak: float
    total: float
    count: int
    end: float | None = None
    low: float = 0.0
    lows: int = 0

    def take(self, score: float, seconds: float) -> None:
        self.total, self.count = self.total + self.low + score, self.count + self.lows + 1
        self.end, self.low, self.lows = None, 0.0, 0
        if score > self.peak:
            self.peak, self.peak_time = score, seconds

    def miss(self, score: float, seconds: float) -> None:
        if self.end is None:
            self.end = seconds
        if math.isfinite(score):
            self.low, self.lows = self.low + score, self.lows + 1


def events(
    predictions: Iterable[Prediction],
    *,
    on: float = 0.5,
    off: float | None = None,
    shortest: float = 0.0,
    gap: float = 0.0,
    classes: Sequence[str | int] | Mapping[str | int, Thresholds | None] | None = None,
) -> list[Event]:
    """Finds what was seen from when to when, ordered by begin. Arguments and errors: those of ``EventFinder``.

    An event begins where the score of a class reaches ``on`` and ends where it falls below ``off``. Results of the
    warm-up belong to no event.
    """
    finder = EventFinder(on, off, shortest, gap, classes)
    found = [event for prediction in predictions for event in finder.add(prediction)]
    return sorted([*found, *finder.finish()], key=lambda event: (event.begin, event.index))


def _pair(thresholds: Thresholds) -> tuple[float, float]:
    on, off = thresholds if isinstance(thresholds, tuple) else (thresholds, thresholds - FALL * abs(thresholds))
    if not (math.isfinite(on) and math.isfinite(off) and off <= on):
        raise UsageError(f"An event cannot begin at a score of {on} and end below {off}.", hint="off is at most on.")
    return float(on), float(off)
