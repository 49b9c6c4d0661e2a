"""Looks for values that are not finite: NaN in what a step gives, NaN and infinity in states that never forget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import SessionError
from co3d_compile.support.plain_types import Array

Finite: TypeAlias = Literal["ignore", "reset", "raise"]
CHOICES: tuple[Finite, ...] = ("ignore", "reset", "raise")


class FiniteCheck:
    """A check that says which streams a step has spoilt.

    Infinity in an output is no fault: minus infinity can be an answer. NaN in an output is one. During the warm-up it
    is not, where the model begins with infinity or reads behind the ends of the stream. A state of unbounded memory
    (a recurrent layer's) hands on what it holds for good, so neither may be in it. In a file that does not say which
    states these are, and has some, NaN in any state is a fault.

    Attributes:
        states: Names of the states that are looked at.
    """

    def __init__(self, info: Contract, batch: int, *, raises: bool) -> None:
        self._info, self._raises = info, raises
        self._age = np.zeros(batch, np.int64)  # steps since the start of each stream
        begins_odd = not all(math.isfinite(state.initial) for state in info.states)
        self._patience = info.warmup_steps if begins_odd or info.boundary == "exact" else 0
        floats = [state for state in info.states if state.dtype.startswith("float")]
        endless = [state for state in floats if state.unbounded]
        self._bad_state = np.isnan if not endless else _not_finite
        self._states = endless or (floats if info.receptive_field is None else [])
        self.states = [state.input for state in self._states]

    def begin(self, index: slice | Array | int, warm: bool = False) -> None:
        """Notes that streams start, or that they come from elsewhere and are as good as warm."""
        self._age[index] = self._info.warmup_steps if warm else 0

    def spoilt(self, outputs: Mapping[str, Array], states: Mapping[str, Array], index: slice | Array) -> dict[int, str]:
        """Finds the streams at ``index`` that this step has spoilt, and what shows it.

        Raises:
            SessionError: There are some, and ``raises`` was asked for: the step does not count.
        """
        places = np.arange(len(self._age))[index]
        found: dict[int, str] = {}
        for what, bad in self._bad_rows(outputs, states, self._age[index] >= self._patience):
            for place in places[bad]:
                found.setdefault(int(place), what)
        if found and self._raises:
            streams = "; ".join(f"stream {place}: {what}" for place, what in list(found.items())[:5])
            hint = 'The state is that of before the step. Leave the frame out, or open it with finite="reset".'
            raise SessionError(f"A step gave values that are not finite ({streams}).", hint=hint)
        self._age[index] += 1
        return found

    def _bad_rows(
        self, outputs: Mapping[str, Array], states: Mapping[str, Array], settled: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
        for spec in self._info.outputs:
            values = outputs[spec.name]
            if values.dtype.kind == "f" and (bad := np.isnan(values)).any():
                yield f"output '{spec.name}' holds NaN", _by_stream(bad, spec.shape, len(settled)) & settled
        for state in self._states:
            if (bad := self._bad_state(states[state.input])).any():
                yield f"state '{state.input}' is not finite", _by_stream(bad, state.shape, len(settled))


def _not_finite(values: Array) -> npt.NDArray[np.bool_]:
    return np.logical_not(np.isfinite(values))


def _by_stream(bad: npt.NDArray[np.bool_], shape: Sequence[int | str], streams: int) -> npt.NDArray[np.bool_]:
    """Says whether anything of each stream is bad. Where nothing says which values are whose, they are everybody's."""
    if "N" not in shape:
        return np.full(streams, True)
    rows = np.moveaxis(bad, list(shape).index("N"), 0).reshape(streams, -1)
    return np.asarray(rows.any(axis=1), np.bool_)
