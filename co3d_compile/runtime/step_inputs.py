"""From single frames to the inputs of one step: as many frames as the model's strides need, each input at its rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import UnsupportedError
from co3d_compile.support.plain_types import Array


class Pulse:
    """What one step of one stream takes.

    Attributes:
        frames: Frames of one step, of the input that takes the most.
        first: Those of the first input, in which a contract counts.
        shapes: The shape of one frame of each input, with a batch of 1.

    Raises:
        UnsupportedError: An input has no time, or the rates of the inputs do not divide one another.
    """

    def __init__(self, info: Contract) -> None:
        timeless = [spec.name for spec in info.inputs if spec.frames_per_step is None]
        if timeless:
            raise UnsupportedError(
                f"Input '{timeless[0]}' has no time: frames alone are no step of this model.",
                hint="Use StreamSession, which takes arrays of any kind.",
            )
        self._info = info
        self.frames = max(info.frames_per_step.values())
        self.first = info.inputs[0].frames_per_step or 1
        if any(self.frames % frames for frames in info.frames_per_step.values()):
            rates = ", ".join(f"{name} {frames}" for name, frames in info.frames_per_step.items())
            raise UnsupportedError(f"A video cannot be shared among inputs with these frames per step: {rates}.")
        self.shapes: list[tuple[int, ...]] = []
        for spec in info.inputs:
            dims = [d for at, d in enumerate(spec.shape) if spec.frames_per_step == 1 or at != spec.time_dim]
            self.shapes.append(tuple(1 if dim == "N" else int(dim) for dim in dims))

    def step(self, pending: Sequence[Sequence[Array]]) -> tuple[list[Array], Array | None]:
        """Makes one array per input, and the valid flags (1, frames) of a model with ``boundary="exact"``.

        Args:
            pending: Up to ``frames`` frames, each an array per input; the step is filled up with frames that are not
                there.
        """
        nothing = [np.zeros(shape, spec.dtype) for shape, spec in zip(self.shapes, self._info.inputs, strict=True)]
        frames = [*pending, *[nothing] * (self.frames - len(pending))]
        valid = None
        if self._info.boundary == "exact":
            places = range(0, self.frames, self.frames // self.first)
            valid = np.array([[place < len(pending) for place in places]])
        return [self._gather(frames, index) for index in range(len(self._info.inputs))], valid

    def _gather(self, frames: Sequence[Sequence[Array]], index: int) -> Array:
        """Takes one input's share of a step: of an input at a lower rate, every so many frames one."""
        spec = self._info.inputs[index]
        own = [frame[index] for frame in frames[:: self.frames // (spec.frames_per_step or 1)]]
        return own[0] if len(own) == 1 else np.stack(own, axis=spec.time_dim or 0)
