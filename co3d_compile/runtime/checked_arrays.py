"""What a session is given, checked before anything changes: arrays of a step, values of states, whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from co3d_compile.contract.json_readers import Shape
from co3d_compile.contract.model_contract import Contract, InputSpec, resolve
from co3d_compile.errors import SessionError, UsageError
from co3d_compile.support.plain_types import Array

Sizes: TypeAlias = tuple[int | str, ...]
NO_VALID = 'Compile it with boundary="exact".'


class StepInputs:
    """What one step takes beside the states.

    Attributes:
        tensors: Name, shape and dtype of each, for all streams.
        all_valid: Flags that say that every frame is there; empty where the model takes none.
    """

    def __init__(self, info: Contract, batch: int) -> None:
        self._info, self._batch = info, batch
        self.tensors = [(s.name, resolve(s.shape, batch), np.dtype(s.dtype)) for s in info.inputs]
        if info.valid:
            flags = (batch, info.inputs[0].frames_per_step or 1)
            self.tensors.append((info.valid, flags, np.dtype(np.bool_)))
        self.all_valid: list[Array] = [np.ones(self.tensors[-1][1], np.bool_)] if info.valid else []

    def checked(self, frames: Sequence[object], valid: Array | None, count: int) -> list[Array]:
        """Checks the arrays of a step of ``count`` streams. Raises SessionError if they do not fit."""
        specs = self._info.inputs
        if len(frames) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise SessionError(f"Got {len(frames)} inputs, expected {len(specs)}.", hint=f"In this order: {names}.")
        arrays = [_frames(spec, frame, expected(spec.shape, count)) for spec, frame in zip(specs, frames, strict=True)]
        if self._info.valid is None:
            if valid is not None:
                raise SessionError("This model takes no valid flags.", hint=NO_VALID)
            return arrays
        _, (_, *rest), dtype = self.tensors[-1]
        shape = (count, *rest)
        if valid is None:
            return [*arrays, *(self.all_valid if count == self._batch else [np.ones(shape, np.bool_)])]
        if isinstance(valid, np.ndarray) and valid.shape == (count,):
            valid = np.broadcast_to(valid[:, None], shape)
        return [*arrays, checked_array("Input", "valid", valid, shape, dtype)]


def whole_number(name: str, value: int, least: int, most: float = math.inf) -> int:
    """Checks a number, and gives it back. Raises UsageError if it is none from ``least`` to ``most``."""
    if isinstance(value, (int, np.integer)) and least <= value <= most:
        return int(value)
    top = f" to {most}" if most < math.inf else ""
    raise UsageError(f"{name} is {value!r}.", hint=f"It must be a whole number from {least}{top}.")


def expected(shape: Shape, batch: int) -> Sizes:
    """Computes the shape of so many streams; "K" stands for any number of rows."""
    return tuple(batch if dim == "N" else dim for dim in shape)


def checked_array(what: str, name: str, array: object, shape: Sizes, dtype: np.dtype[Any]) -> Array:
    """Checks an array, and gives it back. Raises SessionError if it has another shape or dtype."""
    if not isinstance(array, np.ndarray):
        problem, hint = f"is a {type(array).__name__}, expected a numpy array", "Convert it with numpy.asarray(...)."
    elif array.dtype != dtype:
        problem = f"has dtype {array.dtype}, expected {dtype}"
        hint = f"Convert it with .astype('{dtype}'), frames with the scale and mean of the training."
    elif array.shape != shape and (array.shape[1:] != shape[1:] or shape[:1] != ("K",)):
        problem = f"has shape {array.shape}, expected {shape}"
        hint = "A step takes one row for each stream that advances."
    else:
        return array
    raise SessionError(f"{what} '{name}' {problem}.", hint=hint)


def _frames(spec: InputSpec, frame: object, shape: Sizes) -> Array:
    """Shapes the array for the ONNX input: without the time dim at one frame per step, all rows of the one stream."""
    if isinstance(frame, np.ndarray) and spec.frames_per_step == 1 and frame.ndim == len(shape) + 1:
        dim = spec.time_dim
        frame = frame.squeeze(dim) if dim is not None and frame.shape[dim] == 1 else frame
    array = checked_array("Input", spec.name, frame, shape, np.dtype(spec.dtype))
    if (column := spec.stream_column) is not None and array[:, column].any():
        row = int(np.flatnonzero(array[:, column])[0])
        what = f"Row {row} of input '{spec.name}' is of stream {array[row, column]:g}, and there is stream 0 alone"
        raise SessionError(f"{what}.", hint="Give each stream a session of its own.")
    return array
