"""The states of a session's streams: where they lie, and how they go in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from co3d_compile.contract.model_contract import Contract, StateSpec, resolve
from co3d_compile.native.running_form import RunningForm
from co3d_compile.runtime.buffers import Buffer, Scratch, make_rings
from co3d_compile.support.plain_types import Array


class States:
    """Rings of buffers through which values move by a slot at each step, and no value is copied.

    What goes in and out of them is laid out as the given file has it, whatever form of it runs.

    Args:
        info: The contract of the given file.
        form: The form that runs.

    Attributes:
        phase: Where in their rings the states lie now.
        period: After how many steps all lie as before.
    """

    def __init__(self, info: Contract, form: RunningForm, batch: int, device: tuple[str, int]) -> None:
        self._info, self._form, self._batch = info, form, batch
        self._rings, self.period = make_rings(form.contract, batch, device)
        self.phase = 0
        self._scratch = {state.input: Scratch() for state in info.states}

    def written(self, phase: int) -> Iterator[tuple[str, Buffer]]:
        """Yields the outputs of the model at this phase, and where they go.

        Into the buffer after the newest state's.
        """
        for chain, ring in self._rings:
            yield chain[0].output, ring[phase % len(ring)]

    def read(self, phase: int) -> Iterator[tuple[str, Buffer]]:
        """Yields every state, and the buffer that it is read from: one buffer further on at each step."""
        for chain, ring in self._rings:
            for age, state in enumerate(chain):
                yield state.input, ring[(phase - 1 - age) % len(ring)]

    def begin(self, index: int | slice) -> None:
        """Puts the streams at ``index`` back to their start."""
        for state, buffer in self._current():
            buffer.put(state.initial, index, state.batch_dim)

    def values(self, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Copies all states, or those of these names."""
        wanted = [(s, buffer) for s, buffer in self._current() if names is None or s.input in names]
        return {s.input: self._form.to_given(s, buffer.read()) for s, buffer in wanted}

    def write(self, values: Mapping[str, Array]) -> None:
        """Takes over all states."""
        for state, buffer in self._current():
            buffer.write(self._form.from_given(state, values[state.input]))

    def packed(self, index: slice) -> list[bytes]:
        """Packs all states of some streams into bytes, in the order of the metadata."""
        parts = [(state, buffer.take(index, state.batch_dim, Scratch())) for state, buffer in self._current()]
        return [self._form.to_given(state, part).tobytes() for state, part in parts]

    def size(self, count: int) -> int | None:
        """Counts the bytes of the states of so many streams, if that is known beforehand."""
        return sum(math.prod(resolve(s.shape, count)) * np.dtype(s.dtype).itemsize for s in self._info.states)

    def unpack(self, packed: memoryview, index: slice) -> None:
        """Takes over ``packed`` as the states of the streams at ``index``."""
        for state, buffer in self._current():
            shape = resolve(state.shape, index.stop - index.start)
            size = math.prod(shape) * buffer.dtype.itemsize
            part = np.frombuffer(packed[:size], buffer.dtype).reshape(shape)
            buffer.put(self._form.from_given(state, part), index, state.batch_dim)
            packed = packed[size:]

    def gathered(self, index: slice | Array) -> dict[str, Array]:
        """Gathers the states of some streams as onnxruntime takes them; they are good until the next call."""
        return {s.input: b.take(index, s.batch_dim, self._scratch[s.input]) for s, b in self._current()}

    def outputs(self) -> list[str]:
        """Lists the outputs of the model that are next states."""
        return [chain[0].output for chain, _ in self._rings]

    def next_values(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Finds the next value of each state, from what a step took and gave."""
        return {state.input: values[state.output] for chain, _ in self._rings for state in chain}

    def scatter(self, values: Mapping[str, Array], index: slice | Array) -> None:
        """Puts the next states of some streams, of what a step took and gave, in their place."""
        buffers = {state.input: buffer for state, buffer in self._current()}
        for chain, _ in self._rings:
            for state in reversed(chain):  # the oldest first: what it takes may be the next one's own memory
                buffers[state.input].put(values[state.output], index, state.batch_dim)

    def _current(self) -> list[tuple[StateSpec, Buffer]]:
        """Lists every state with the buffer that the next step reads it from, in the order of the metadata."""
        place = dict(self.read(self.phase))
        return [(state, place[state.input]) for state in self._info.states]
