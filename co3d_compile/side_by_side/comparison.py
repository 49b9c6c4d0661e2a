"""Answers of several runs about the same frames: how alike they are, and how often they are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from co3d_compile.media.class_scores import label_of
from co3d_compile.side_by_side.segments import Segment
from co3d_compile.support.plain_types import JsonObject

Scores = npt.NDArray[np.float32]
LEAST = 1e-9  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class Track:
    """The answers of one run.

    Attributes:
        name: What ran.
        scores: (answers, classes).
        milliseconds: The median for an answer.
    """

    name: str
    scores: Scores
    milliseconds: float

    @property
    def best(self) -> npt.NDArray[np.intp]:
        """The class with the highest score of each answer."""
        return np.argmax(self.scores, axis=1)


@dataclass(frozen=True)
class Comparison:
    """The sliding window, which is the first track, and streams, about the same frames.

    Attributes:
        times: Seconds of the newest frame that each answer is about.
        tracks: All runs.
        labels: Names of the classes; empty if not known.
        segments: What is true, if it is known.
    """

    times: npt.NDArray[np.float64]
    tracks: tuple[Track, ...]
    labels: tuple[str, ...]
    segments: tuple[Segment, ...] = ()

    def to_dict(self) -> JsonObject:
        """Writes everything as JSON data, but for the scores."""
        window = self.tracks[0]
        rows = []
        for track in self.tracks:
            right = {"frames_right": None, "segments_right": None, "segments": None}
            if self.segments:
                right = _right(self.times, track.scores, self.segments)
            alike: dict[str, float | None] = {"agreement": None, "correlation": None}
            if track is not window:
                same = float(np.mean(track.best == window.best)) if len(self.times) else None
                alike = {"agreement": same, "correlation": correlation(track.scores, window.scores)}
            rows.append({"name": track.name, **alike, **right, "milliseconds": track.milliseconds})
        return {"answers": len(self.times), "runs": rows}

    def shown(self, count: int) -> list[tuple[int, str]]:
        """Finds the classes that matter most: those that were best most often, in any run."""
        classes = self.tracks[0].scores.shape[1]
        wins = np.sum([np.bincount(track.best, minlength=classes) for track in self.tracks], axis=0)
        most = np.max([track.scores.max(axis=0) for track in self.tracks], axis=0)
        order = sorted(range(classes), key=lambda index: (-int(wins[index]), -float(most[index])))[:count]
        return [(index, label_of(self.labels, index)) for index in sorted(order)]


def correlation(a: Scores, b: Scores) -> float | None:
    """Measures how alike scores are: the mean correlation over the classes, of logarithms where all are probabilities.

    Of a single class, the correlation over time. None: one of both never changes.
    """
    if min(a.min(initial=0), b.min(initial=0)) >= 0 and max(a.max(initial=0), b.max(initial=0)) <= 1 + 1e-3:
        a, b = np.log(a + LEAST), np.log(b + LEAST)
    if a.shape[1] == 1:
        a, b = a.T, b.T
    a, b = (each - each.mean(axis=1, keepdims=True) for each in (a, b))
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    there = size > 0
    return float(np.mean((a * b).sum(1)[there] / size[there])) if there.any() else None


def _right(times: npt.NDArray[np.float64], scores: Scores, segments: Sequence[Segment]) -> JsonObject:
    """Counts the share of answers whose best class is that of a segment there, and how many segments are right.

    The class of a segment is the best one of the mean over the answers in it; a segment without answers does not count.
    """
    inside = np.array([[each.begin <= at < each.end for each in segments] for at in times]).reshape(-1, len(segments))
    truth = np.array([each.index for each in segments])
    best = scores.argmax(axis=1)
    hit = (inside & (best[:, None] == truth[None])).any(1)[inside.any(1)]
    counted = [at for at in range(len(segments)) if inside[:, at].any()]
    whole = sum(int(scores[inside[:, at]].mean(0).argmax()) == segments[at].index for at in counted)
    return {
        "frames_right": float(hit.mean()) if len(hit) else None,
        "segments_right": whole,
        "segments": len(counted),
    }
