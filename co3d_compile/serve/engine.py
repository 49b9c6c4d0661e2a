"""One model and the states of many streams: advances some of them in one run of ONNX Runtime."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from co3d_compile.contract.model_contract import Contract, refuse_free_rows
from co3d_compile.errors import Co3dError, UnsupportedError, UsageError
from co3d_compile.media.class_scores import ClassScores, best_classes
from co3d_compile.media.video import Image
from co3d_compile.media.video_steps import Pictures, frame_about
from co3d_compile.runtime.open_model import Serializable
from co3d_compile.runtime.session import StreamSession
from co3d_compile.runtime.step_inputs import Pulse
from co3d_compile.serve.options import ServeOptions
from co3d_compile.support.plain_types import Array

PICTURES = {"image/jpeg": "JPEG", "image/png": "PNG"}
RGB, TENSOR = "image/x-rgb", "application/octet-stream"
_TWO_CLIPS = "Compile it again, with two clips as the example (docs/semantics.md, The batch)."


class BadFrame(Exception):
    """A frame that the model cannot take. ``status``: 400, 413 or 415, as in HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one stream: its slot, the inputs with a batch of 1, and valid flags if the model takes them."""

    slot: int
    arrays: list[Array]
    valid: Array | None


class Engine:
    """A session whose places are the slots of streams. For one thread at a time, ``prepare`` excepted.

    Args:
        model: As for ``StreamSession``.
        options: ``max_streams`` is the number of slots.

    Raises:
        UnsupportedError: The file is for a fixed number of streams, or frames alone are no step of the model.
        LoadError, ContractError, UsageError: As for ``StreamSession``.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes | Serializable, options: ServeOptions) -> None:
        try:
            self.session = StreamSession(
                model,
                options.max_streams,
                list(options.providers) or None,
                options.threads,
                finite="reset",
                layout=options.layout,
            )
            self.info = self.session.info
            self.pulse = _check(self.info, options.max_streams)
            self._inputs = {spec.name: _batch_dim(spec.name, spec.shape) for spec in self.info.inputs}
            self._outputs = {spec.name: _batch_dim(spec.name, spec.shape) for spec in self.info.outputs}
        except (UnsupportedError, UsageError) as error:
            if isinstance(error, UsageError) and "batch" not in error.message:
                raise
            hint = _TWO_CLIPS if isinstance(error, UsageError) else error.hint
            raise UnsupportedError(f"co3d serve cannot run this model. {error.message}", hint=hint) from error
        self._max_pixels = options.max_pixels
        self.why_no_pictures = ""
        self._pictures: Pictures | None = None
        self._scores: ClassScores | None = None
        try:
            self._pictures = Pictures(self.info)
        except UnsupportedError as error:
            self.why_no_pictures = error.message
        with suppress(UnsupportedError, UsageError):
            self._scores = ClassScores(self.info)

    def prepare(self, kind: str, payload: bytes, size: tuple[int, int] | None = None) -> list[Array]:
        """Takes one frame of each input, with a batch of 1. May be called from any thread.

        Args:
            kind: "image/jpeg" or "image/png"; "image/x-rgb": uint8 (height, width, 3); "application/octet-stream": the
                bytes of one frame of each input, one after another, as the model takes them.
            size: Height and width of an "image/x-rgb".

        Raises:
            BadFrame: What the payload holds is no such frame.
        """
        if kind == TENSOR:
            return self._tensors(payload)
        if self._pictures is None:
            raise BadFrame(415, f"This model takes no pictures: {self.why_no_pictures}")
        image = self._picture(kind, payload) if kind in PICTURES else self._rgb(kind, payload, size)
        try:
            return self._pictures(image)
        except Co3dError as error:
            raise BadFrame(400, str(error)) from error

    def _tensors(self, payload: bytes) -> list[Array]:
        arrays, start = [], 0
        for spec, shape in zip(self.info.inputs, self.pulse.shapes, strict=True):
            size = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            part = payload[start : start + size]
            if len(part) == size:
                arrays.append(np.frombuffer(part, spec.dtype).reshape(shape))
            start += size
        if start != len(payload):
            raise BadFrame(400, f"A frame of this model has {start} bytes, not {len(payload)}.")
        return arrays

    def _rgb(self, kind: str, payload: bytes, size: tuple[int, int] | None) -> Image:
        if kind != RGB:
            known = ", ".join([*PICTURES, RGB, TENSOR])
            raise BadFrame(415, f"Frames of type {kind[:100]!r} are not known: {known}.")
        height, width = size or (0, 0)
        if min(height, width) < 1 or height * width * 3 != len(payload):
            raise BadFrame(400, f"A picture of {width}x{height} pixels has not {len(payload)} bytes.")
        return np.frombuffer(payload, np.uint8).reshape(height, width, 3)

    def _picture(self, kind: str, payload: bytes) -> Image:
        from PIL import Image  # a server of tensors does without

        try:
            with Image.open(io.BytesIO(payload), formats=[PICTURES[kind]]) as image:
                if image.width * image.height > self._max_pixels:
                    raise BadFrame(413, f"The picture has more than {self._max_pixels} pixels.")
                return np.asarray(image.convert("RGB"))
        except BadFrame:
            raise
        except Exception as error:  # Pillow raises a dozen kinds on damaged files
            raise BadFrame(400, f"This is no whole picture of type {kind}: {error}"[:300]) from error

    def advance(self, work: Sequence[Work]) -> list[list[Array]]:
        """Runs one step of several streams at once. Returns for each its outputs, with a batch of 1.

        A slot that the step has spoilt is back at its start: ``session.spoilt`` says which, and what was not finite.

        Raises:
            SessionError: ONNX Runtime failed; no state has changed.
        """
        order = sorted(range(len(work)), key=lambda place: work[place].slot)  # neighbours need no gathering
        own = [work[place] for place in order]
        arrays = zip(*(each.arrays for each in own), strict=True)
        frames = {
            name: np.concatenate(parts, dim) for (name, dim), parts in zip(self._inputs.items(), arrays, strict=True)
        }
        flags = [each.valid for each in own if each.valid is not None]
        valid = np.concatenate(flags) if flags else None
        results = self.session.run(frames, valid=valid, streams=[each.slot for each in own])
        rows: list[list[Array]] = [[] for _ in work]
        for name, dim in self._outputs.items():
            for place, values in zip(order, np.split(results[name], len(own), axis=dim), strict=True):
                rows[place].append(values)
        return rows

    def warm(self, step: int) -> bool:
        """Says whether the results of this step, from 0, no longer depend on the states at the start."""
        return step >= self.info.warmup_steps

    def about(self, steps: int) -> int:
        """Gives the frame, from 0, that the newest result is about after so many steps; below 0: there is none yet."""
        return frame_about(self.info, self._scores.spec if self._scores else self.info.outputs[0], steps)

    def top(self, outputs: list[Array], count: int) -> list[dict[str, int | str | float]] | None:
        """Finds the classes with the highest scores of the newest entry, best first.

        None if the model scores no classes.
        """
        if self._scores is None:
            return None
        newest = self._scores.entries(outputs[self._scores.index])[-1:]
        return [rank.to_dict() for rank in best_classes(self._scores.of(newest)[0], self._scores.labels, count)]


def _check(info: Contract, streams: int) -> Pulse:
    """Says what a step of a stream takes. Refuses what streams cannot share, or frames alone are no step of."""
    refuse_free_rows(info, "It")
    if any(state.shape[state.batch_dim] != "N" for state in info.states):
        raise UnsupportedError(f"The model was compiled for a batch of {streams}.", hint=_TWO_CLIPS)
    return Pulse(info)


def _batch_dim(name: str, shape: Sequence[int | str]) -> int:
    if "N" not in shape:
        raise UnsupportedError(f"'{name}' of shape {list(shape)} has no batch: streams cannot share a run.")
    return list(shape).index("N")
