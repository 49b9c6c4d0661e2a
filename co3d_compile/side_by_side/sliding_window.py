"""The clip model as people run it on a stream today: on the newest frames, a whole clip for each answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import UsageError
from co3d_compile.media.class_scores import ClassScores
from co3d_compile.support.plain_types import Array
from co3d_compile.support.silence_torch import quiet
from co3d_compile.verification.clip_model import example_of


class SlidingWindow:
    """The clip model on the frames of a video. It keeps the newest ones, as many as it may be asked for.

    Args:
        model, example_inputs: The clip model, as for ``co3d.compile``.
        info: The contract of a file that was compiled from it.
        scores: Reads the same output of both.
        kept: Frames that are kept beyond the clip.

    Attributes:
        length: Frames of a clip, of the input that takes the most.
        milliseconds: What each answer took.

    Raises:
        UsageError: The file was not compiled from this model.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        example_inputs: Sequence[Any] | None,
        info: Contract,
        scores: ClassScores,
        kept: int,
    ) -> None:
        leaves, self._structure = pytree.tree_flatten(example_of(model, example_inputs or None))
        self._leaves, self._info, self._scores = leaves, info, scores
        self._places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(self._places) != len(info.inputs):
            what = f"The file takes {len(info.inputs)} inputs, and the model {len(self._places)}."
            raise UsageError(what, hint="Give the model that the file was compiled from.")
        most = max(info.frames_per_step.values())
        self._every = [most // (spec.frames_per_step or 1) for spec in info.inputs]
        lengths = [leaves[at].shape[spec.time_dim or 0] for at, spec in zip(self._places, info.inputs, strict=True)]
        self.length = max(count * every for count, every in zip(lengths, self._every, strict=True))
        self.milliseconds: list[float] = []
        self._model = model.module() if isinstance(model, ExportedProgram) else model
        self._frames: deque[Sequence[Array]] = deque(maxlen=self.length + kept)
        self._count = 0

    def add(self, frame: Sequence[Array]) -> None:
        """Takes the next frame, an array for each input."""
        self._frames.append(frame)
        self._count += 1

    def answer(self, last: int, middle: bool) -> npt.NDArray[np.float32] | None:
        """Computes the scores of the clip that ends with this frame; None: it begins before the first one.

        Args:
            middle: Of an output with an entry for each frame, the middle entry is read, and the last one otherwise.
        """
        first = last - self.length + 1
        oldest = self._count - len(self._frames)
        if first < oldest or last >= self._count:
            return None
        frames = [self._frames[at - oldest] for at in range(first, last + 1)]
        start = time.perf_counter()
        with torch.inference_mode(), quiet(stdout=True):
            args, kwargs = pytree.tree_unflatten(self._clip(frames), self._structure)
            results = self._model(*args, **kwargs)
        self.milliseconds.append((time.perf_counter() - start) * 1e3)
        found: list[Tensor] = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
        if self._scores.index >= len(found):
            what = f"{self._scores.spec.name} is no output of the clip model."
            raise UsageError(what, hint="Compare one of its own outputs.")
        return self._read(found[self._scores.index][:1].float().numpy(), middle)

    def _clip(self, frames: Sequence[Sequence[Array]]) -> list[Any]:
        """Makes the arguments of one call, with these frames in place of the example's tensors."""
        leaves = list(self._leaves)
        for index, (place, spec, every) in enumerate(zip(self._places, self._info.inputs, self._every, strict=True)):
            clip = np.stack([frame[index] for frame in frames[::every]], axis=spec.time_dim or 0)
            batch = leaves[place].shape[0]
            leaves[place] = torch.from_numpy(np.ascontiguousarray(np.repeat(clip, batch, 0)))
        return leaves

    def _read(self, values: Array, middle: bool) -> npt.NDArray[np.float32]:
        spec = self._scores.spec
        if spec.has_time and spec.time_dim is not None:
            entry = values.shape[spec.time_dim] // 2 if middle else -1
            values = np.take(values, [entry], axis=spec.time_dim)
        return self._scores.of(values)[0]
