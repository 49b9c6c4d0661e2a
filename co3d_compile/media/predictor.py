"""From frames of a video to predictions: frame rate, preprocessing, steps of a compiled model, times of the results.

Needs numpy and onnxruntime; nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from co3d_compile.contract.model_contract import Contract, contract_text
from co3d_compile.errors import UsageError
from co3d_compile.media.class_scores import ClassScores, Ranked, best_classes, label_of
from co3d_compile.media.preprocess import Preprocess, Settings
from co3d_compile.media.video import Picture, VideoFrame, image_of
from co3d_compile.media.video_steps import Feed, frame_about, frames_per_entry
from co3d_compile.runtime.finite_values import Finite
from co3d_compile.runtime.open_model import Provider, Serializable
from co3d_compile.runtime.running_model import Layout
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.plain_types import Array, JsonObject

USUAL_RATE = 30.0  # pictures per second where nothing says how fast they come


@dataclass(frozen=True, repr=False)
class Prediction:
    """What the model says about one place of the video.

    Attributes:
        step: Step of the model, from 0.
        frame: Index in the source of the newest frame that the result speaks of: the delay is taken off.
        time: That frame's time, in seconds from the start of the source.
        newest_frame, newest_time: The frame that came last before the result was there.
        warmup: Whether the result still depends on the empty state at the start; such results mean little.
        scores: (classes,), float32: probabilities, unless the activation is "none".
        labels: Names of the classes; empty if not known.
        milliseconds: What the step took, preprocessing and decoding left out.
    """

    step: int
    frame: int
    time: float
    newest_frame: int
    newest_time: float
    warmup: bool
    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...]
    milliseconds: float

    def __repr__(self) -> str:
        best = ", ".join(f"{rank.label} {rank.score:.2f}" for rank in self.top(3))
        return f"<Prediction of frame {self.frame} at {self.time:.2f} s{', warming up' * self.warmup}: {best}>"

    def top(self, count: int = 5) -> list[Ranked]:
        """Ranks the classes with the highest scores, best first."""
        return best_classes(self.scores, self.labels, count)

    def label(self, index: int) -> str:
        """Names a class; by its number where it has no name."""
        return label_of(self.labels, index)


class Predictor:
    """A compiled classifier on one video stream: frames in, predictions out.

    What the model wants is read from the file (``co3d_compile.compile(..., preprocess=..., labels=...)``); what is
    given here goes before it.

    Args:
        model: As for ``StreamSession``.
        preprocess: Values by the names of ``Preprocess``, such as ``{"size": 182, "mean": 0.45, "std": 0.225}``.
        labels: Names of the classes.
        output: Name of the output to read, if the model has several.
        activation: What makes probabilities of the output: "softmax", "sigmoid" or "none"; "auto": none if the first
            result is a distribution already, else softmax (sigmoid for a single class).
        providers, threads, profile, finite, layout: As for ``StreamSession``. With ``finite="reset"`` the stream starts
            anew behind a step that has spoilt it, and warms up again; that step's own predictions count as warm-up.

    Attributes:
        info: The contract in the file.
        output, scores: The output that is read, as the contract describes it, and what makes scores of it.
        preprocess: One for each input of the model.
        frames: Frames that the model took.
        repeated: How many of these were given twice or more, as the video has fewer frames than the model's rate.
        skipped: Frames that the model's rate left out.
        restarts: Times at which the video's clock jumped, and the frame rate was counted afresh.
        spoilt: What was not finite in the last step, if anything was: the stream has started anew.
        resets: How often that was.
        missed: How many frames were missing in the last gap of the source (``VideoFrame.away``), by the model's rate,
            or else by that of the frames taken.
        anew: Whether the stream began anew behind that gap, as it had as many frames as an answer sees. The states stay
            as they are behind a shorter one.
        left_over: Frames at the end that were too few for a step.

    Raises:
        UnsupportedError: The model takes no pictures, or its output is no list of class scores.
        UsageError, LoadError, ContractError: As for ``StreamSession``; preprocessing or labels that do not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Serializable,
        *,
        preprocess: Settings | None = None,
        labels: Sequence[str] | None = None,
        output: str | None = None,
        activation: str = "auto",
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        profile: str | os.PathLike[str] | None = None,
        finite: Finite = "ignore",
        layout: Layout = "auto",
    ) -> None:
        self.session = StreamSession(
            model, providers=providers, threads=threads, profile=profile, finite=finite, layout=layout
        )
        self.info: Contract = self.session.info
        self._feed = Feed(self.info, preprocess)
        self.scores = ClassScores(self.info, output, labels, activation)
        self.output, self.labels = self.scores.spec, self.scores.labels
        self._names = [spec.name for spec in self.info.inputs]
        self._pulse = self._feed.pulse
        self._per_entry = frames_per_entry(self.info, self.output)
        per_step = self.output.entries_per_step * self._per_entry
        self._window = self.output.has_time and per_step != self._pulse.first  # every step returns all of it
        self.frames = self.repeated = self.skipped = self.left_over = self.resets = 0
        self.spoilt = ""
        self.missed, self.anew = 0.0, False
        self.reset()

    @property
    def preprocess(self) -> list[Preprocess]:
        return self._feed.pictures.preprocess

    @property
    def fps(self) -> float | None:
        """Frames per second that the model wants; None: any."""
        return self.preprocess[0].fps

    @property
    def restarts(self) -> int:
        return self._feed.rate.restarts

    def reset(self) -> None:
        """Forgets the stream: before another video."""
        self.session.reset()
        self._feed.reset()
        self._steps = 0
        self._newest: VideoFrame | None = None
        self._begin()

    def push(self, picture: Picture, time: float | None = None) -> list[Prediction]:
        """Takes the next frame of the source. Returns the predictions that are there now, often none or one.

        Args:
            picture: A VideoFrame; or a picture alone, as an array (height, width, 3) of uint8, RGB, or as an image of
                Pillow, which is numbered here.
            time: Seconds from the start of the source, of a picture alone. Default: it follows the one before at the
                model's rate, and none is left out or repeated; at 30 a second if the model has no rate.
        """
        frame = self._numbered(picture, time)
        results = self._behind_gap(frame) if frame.away else []
        before = self.frames
        for full in self._feed.add(frame):
            self._taken.append((frame.index, frame.time))
            self.frames += 1
            if full:
                results += self._step()
        self._newest = frame
        self.skipped += self.frames == before
        self.repeated += self.frames > before + 1
        return results

    def finish(self) -> list[Prediction]:
        """Gives the predictions still due at the end of the video.

        Some if compiled with ``boundary="exact"``, else none.
        """
        self.left_over = len(self._feed.pending)
        if self.info.boundary != "exact" or not self.frames:
            self._feed.pending.clear()
            return []
        results = self._step() if self._feed.pending else []
        for _ in range(self.info.flush_steps):
            results += self._step()
        self.left_over = 0
        return results

    @property
    def memory(self) -> int:
        """Frames that an answer sees; where that has no end, those of the warm-up and the window, which may be none."""
        warmup = self.info.warmup_steps * self._pulse.frames
        return self.info.receptive_field or max(warmup, self.info.window or 0)

    def _numbered(self, picture: Picture, time: float | None) -> VideoFrame:
        """Gives a picture its time and number."""
        if isinstance(picture, VideoFrame):
            image_of(picture.image)
            if time is not None:
                raise UsageError("A VideoFrame has its time already.", hint="Give the picture alone with its time.")
            return picture
        image, last = image_of(picture), self._newest
        if last is None:
            return VideoFrame(image, 0.0 if time is None else time, 0)
        return VideoFrame(image, last.time + 1 / (self.fps or USUAL_RATE) if time is None else time, last.index + 1)

    def _behind_gap(self, frame: VideoFrame) -> list[Prediction]:
        """Begins anew where a gap is too long for the states; what was still due before it is returned."""
        times = [seconds for _, seconds in self._taken]
        seen = (len(times) - 1) / (times[-1] - times[0]) if times and times[-1] > times[0] else math.inf
        self.missed = frame.away * (self.fps or seen)
        self.anew = self.missed >= self.memory
        if not self.anew:
            return []
        results = self.finish()
        self.session.reset()
        self._feed.reset()
        self._begin()
        return results

    def predict(self, frames: Iterable[Picture]) -> Iterator[Prediction]:
        """Yields all predictions of a video, from its frames (``read_source``, ``read_frames``), or from pictures."""
        if isinstance(frames, (str, bytes, os.PathLike)):
            raise UsageError(f"{frames!r} is no frames.", hint="Give read_source(...) of it.")
        for frame in frames:
            yield from self.push(frame)
        yield from self.finish()

    def close(self) -> None:
        """Frees the model."""
        self.session.close()

    def __repr__(self) -> str:
        return f"<Predictor: {self.scores.classes} classes from {self.output.name}; {contract_text(self.info)}>"

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Counts frames from here: the states are at their start."""
        self._begun, self._warm_from = self._steps, self._steps + self.info.warmup_steps
        span = self._pulse.frames * (2 + math.ceil(max(0, self.output.delay) * self._per_entry / self._pulse.first))
        self._first = self.frames
        self._taken: deque[tuple[int, float]] = deque(maxlen=span + self._pulse.frames * (1 + self.info.flush_steps))

    def _step(self) -> list[Prediction]:
        """Runs the model on what is pending, filled up with frames that are not there."""
        arrays, valid = self._feed.take()
        start = time.perf_counter()
        results = self.session.run(dict(zip(self._names, arrays, strict=True)), valid=valid)
        milliseconds = (time.perf_counter() - start) * 1e3
        self.spoilt = self.session.spoilt.get(0, "")
        found = self._predictions(results[self.output.name], milliseconds)
        self._steps += 1
        if self.spoilt:
            self.resets += 1
            self._warm_from = self._steps + self.info.warmup_steps
            if self.info.boundary == "exact":  # what came before the new start is no longer due
                self._begin()
        return found

    def _predictions(self, values: Array, milliseconds: float) -> list[Prediction]:
        entries = self.scores.entries(values)
        scores = self.scores.of(entries[-1:] if self._window else entries)
        results = []
        for place, score in enumerate(scores):
            where = self._place(len(scores) - 1 - place)
            if where is not None:
                frame, warmup = where
                index, seconds = self._taken[frame]
                newest = self._taken[-1]
                results.append(
                    Prediction(self._steps, index, seconds, *newest, warmup, score, self.labels, milliseconds)
                )
        return results

    def _place(self, before: int) -> tuple[int, bool] | None:
        """Finds the place in the frames of the entry so many before the newest one, and whether it is warm-up.

        None: an entry before the first frame or behind the last one.
        """
        frame = frame_about(self.info, self.output, self._steps - self._begun + 1, before)
        taken = self.frames - self._first
        exact = self.info.boundary == "exact"
        if frame < 0 or (exact and frame >= taken):
            return None
        warming = self._steps < self._warm_from and not (exact and self.output.has_time)
        oldest = taken - len(self._taken)
        return min(max(frame, oldest), taken - 1) - oldest, warming or bool(self.spoilt)


def predict(
    model: str | os.PathLike[str] | bytes | Serializable, frames: Iterable[Picture], **options: Any
) -> Iterator[Prediction]:
    """Yields predictions of a compiled model on the frames of a video. Options: those of ``Predictor``."""
    with Predictor(model, **options) as predictor:
        yield from predictor.predict(frames)


def as_dict(prediction: Prediction, count: int) -> JsonObject:
    """Writes a prediction as plain JSON data, with its ``count`` best classes."""
    data = {name: value for name, value in vars(prediction).items() if name not in ("scores", "labels")}
    return data | {"top": [rank.to_dict() for rank in prediction.top(count)]}
