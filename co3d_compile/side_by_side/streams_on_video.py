"""Runs streams and the sliding window on the same video."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from co3d_compile.errors import UsageError
from co3d_compile.media.predictor import Prediction, Predictor
from co3d_compile.media.preprocess import Settings
from co3d_compile.media.video import VideoFrame
from co3d_compile.media.video_steps import Pictures, Rate, frames_per_entry
from co3d_compile.runtime.open_model import Serializable
from co3d_compile.runtime.step_inputs import Pulse
from co3d_compile.side_by_side.comparison import Comparison, Scores, Track
from co3d_compile.side_by_side.segments import Segment
from co3d_compile.side_by_side.sliding_window import SlidingWindow


@dataclass
class _Stream:
    """A compiled model on its way through the video."""

    predictor: Predictor
    answers: dict[int, Prediction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pulse, output = Pulse(self.predictor.info), self.predictor.output
        each = frames_per_entry(self.predictor.info, output)
        self.every = max(1, round(each * pulse.frames / pulse.first))  # frames of the video for an entry
        self.whole = output.has_time and not math.isclose(output.entries_per_step * each, pulse.first)
        self.middle = output.has_time and not self.whole
        self.delay = max(0, (output.delay + 1) * self.every)

    def last(self, prediction: Prediction, length: int) -> int:
        """Finds the last frame of the clip whose answer is about the same place."""
        if not self.middle:
            return prediction.frame + self.every - 1
        return prediction.frame - (length // self.every // 2) * self.every + length - 1


def run_side_by_side(
    models: Mapping[str, str | bytes | Serializable],
    network: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None,
    frames: Iterable[VideoFrame],
    *,
    preprocess: Settings | None = None,
    output: str | None = None,
    activation: str = "auto",
    every: int = 1,
    segments: Callable[[int, Sequence[str]], Sequence[Segment]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Answers of compiled models and of the clip model they came from, about the same frames of a video.

    An answer of a stream is compared with the clip that ends with the newest frame that it is about; of an output with
    an entry for each frame, with the clip that has this frame in its middle. Answers of the warm-up do not count.

    Args:
        models: Compiled models by name, such as one for each window.
        network, example_inputs: The clip model, as for ``co3d.compile``.
        frames: Of the video.
        preprocess, output, activation: As for ``Predictor``.
        every: Compare each so many answers.
        segments: From the number of classes and their names to what is true.
        progress: Called with the frames so far.

    Raises:
        UsageError: The files were not compiled from this network; the video is too short for any answer.
        UnsupportedError: As for ``Predictor``.
    """
    streams = {
        name: _Stream(Predictor(model, preprocess=preprocess, output=output, activation=activation))
        for name, model in models.items()
    }
    first = next(iter(streams.values())).predictor
    truth = segments(first.scores.classes, first.labels) if segments is not None else ()
    kept = max(stream.delay for stream in streams.values()) + 4 * max(s.every for s in streams.values()) + 64
    window = SlidingWindow(network, example_inputs, first.info, first.scores, kept)
    pictures = Pictures(first.info, preprocess)
    clips = _run(list(streams.values()), window, pictures, _taken(frames, first, progress), every)
    for stream in streams.values():
        stream.predictor.close()
    return _compared(streams, window, clips, tuple(truth))


def _compared(
    streams: Mapping[str, _Stream], window: SlidingWindow, clips: Mapping[int, Scores], truth: tuple[Segment, ...]
) -> Comparison:
    """Puts the answers of all runs side by side, about the places where each has one."""
    stream = next(iter(streams.values()))
    first = stream.predictor
    common = sorted(set(clips).intersection(*(each.answers for each in streams.values())))
    if not common:
        raise UsageError(
            "The video is too short: no answer behind the warm-up has a whole clip to compare with.",
            hint=f"A clip has {window.length} frames, and the warm-up {first.info.warmup_steps} steps.",
        )
    slid = Track("sliding window", np.stack([clips[at] for at in common]), float(np.median(window.milliseconds)))
    tracks = [_track(name, [stream.answers[at] for at in common]) for name, stream in streams.items()]
    times = np.array([stream.answers[at].time for at in common])
    return Comparison(times, (slid, *tracks), first.labels, truth)


def _track(name: str, answers: Sequence[Prediction]) -> Track:
    """Computes the answers of one stream."""
    milliseconds = float(np.median([answer.milliseconds for answer in answers]))
    return Track(name, np.stack([answer.scores for answer in answers]), milliseconds)


def _taken(
    frames: Iterable[VideoFrame], predictor: Predictor, progress: Callable[[int], None] | None
) -> Iterable[tuple[VideoFrame, float]]:
    """Yields the frames that the model's rate takes, numbered anew so that each is taken once; and their own times."""
    rate, fps = Rate(predictor.fps), predictor.fps or 1.0
    count = 0
    for frame in frames:
        for _ in range(rate(frame.time)):
            yield VideoFrame(frame.image, count / fps, count), frame.time
            count += 1
        if progress is not None:
            progress(frame.index + 1)


def _run(
    streams: Sequence[_Stream],
    window: SlidingWindow,
    pictures: Pictures,
    frames: Iterable[tuple[VideoFrame, float]],
    every: int,
) -> dict[int, Scores]:
    """Gives all runs each frame, and asks the sliding window once all streams have answered about a place."""
    clips: dict[int, Scores] = {}
    answered: Counter[int] = Counter()
    due: list[int] = []
    times: list[float] = []
    for frame, seconds in frames:
        times.append(seconds)
        window.add(pictures(frame.image))
        for stream in streams:
            for prediction in stream.predictor.push(frame):
                at = stream.last(prediction, window.length)
                if prediction.warmup or (at // stream.every) % every:
                    continue
                stream.answers[at] = replace(prediction, time=times[prediction.frame])
                answered[at] += 1
                if answered[at] == len(streams):
                    due.append(at)
        for at in [at for at in due if at <= frame.index]:
            due.remove(at)
            scores = window.answer(at, streams[0].middle)
            if scores is not None:
                clips[at] = scores
    return clips
