"""The loop of a reader (docs/contract.md): what a step gives as a state goes into the next one.

It shares nothing with ``StreamSession``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.support.plain_types import Array

Values: TypeAlias = dict[str, Array]


def stepped(
    info: Contract,
    batch: int,
    steps: Iterable[Sequence[Array]],
    run: Callable[[Values], Values],
    states: Mapping[str, Array] | None = None,
) -> Iterator[Values]:
    """Yields all values of each step by name.

    Args:
        info: The contract.
        batch: Streams.
        steps: The inputs of every step.
        run: Computes one step: from inputs, ``valid`` and states in the order of the contract to results and states.
        states: What the first step reads. Default: the start of a stream.
    """
    if states is None:
        states = {s.input: np.full(resolve(s.shape, batch), s.initial, s.dtype) for s in info.states}
    flags = np.ones((batch, info.inputs[0].frames_per_step or 1), np.bool_)
    valid = {} if info.valid is None else {info.valid: flags}
    for arrays in steps:
        given = {**{spec.name: x for spec, x in zip(info.inputs, arrays, strict=True)}, **valid, **states}
        values = given | run(given)
        states = {state.input: values[state.output] for state in info.states}
        yield values
