"""The states of a stream with boxes: each state may have another number of rows at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from co3d_compile.contract.model_contract import Contract, StateSpec, resolve
from co3d_compile.runtime.states import States
from co3d_compile.support.plain_types import Array


class RowStates(States):
    """The states of one stream, as arrays that each step makes anew."""

    def __init__(self, info: Contract) -> None:
        self._info = info
        self.phase, self.period = 0, 1
        self._now: dict[str, Array] = {}

    def begin(self, index: int | slice) -> None:
        """Puts the stream back to its start, where no rows wait."""
        self._now = {s.input: np.full(resolve(s.shape, 1), s.initial, s.dtype) for s in self._info.states}

    def values(self, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Copies all states, or those of these names."""
        return {name: array.copy() for name, array in self._now.items() if names is None or name in names}

    def write(self, values: Mapping[str, Array]) -> None:
        """Takes over all states."""
        self._now = {name: np.array(values[name]) for name in self._now}

    def packed(self, index: slice) -> list[bytes]:
        """Packs all states in the order of the metadata, behind how many rows those with free rows have."""
        counts = np.array([len(self._now[s.input]) for s in self._free()], np.int64)
        return [counts.tobytes(), *(self._now[state.input].tobytes() for state in self._info.states)]

    def size(self, count: int) -> None:
        """Gives None: how many bytes the states are only they say themselves."""

    def unpack(self, packed: memoryview, index: slice) -> None:
        """Takes over ``packed``."""
        free = self._free()
        counts = dict(zip(free, np.frombuffer(packed[: 8 * len(free)], np.int64).tolist(), strict=True))
        packed = packed[8 * len(free) :]
        for state in self._info.states:
            shape = (counts.get(state, 1), *resolve(state.shape[1:], 1))
            end = math.prod(shape) * np.dtype(state.dtype).itemsize
            self._now[state.input] = np.frombuffer(packed[:end], state.dtype).reshape(shape).copy()
            packed = packed[end:]

    def gathered(self, index: slice | Array) -> dict[str, Array]:
        """Gathers the states as onnxruntime takes them."""
        return dict(self._now)

    def outputs(self) -> list[str]:
        """Lists the outputs of the model that are next states."""
        return [chain[0].output for chain in self._info.chains()]

    def next_values(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Finds the next value of each state, from what a step took and gave."""
        return {state.input: values[state.output] for state in self._info.states}

    def scatter(self, values: Mapping[str, Array], index: slice | Array) -> None:
        """Puts the next states, of what a step took and gave, in their place."""
        self._now = self.next_values(values)

    def _free(self) -> list[StateSpec]:
        return [state for state in self._info.states if "K" in state.shape]
