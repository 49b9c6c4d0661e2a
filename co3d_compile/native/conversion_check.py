"""A converted file against the given one: a few steps of both on random frames, from random states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.native.running_form import RunningForm

Array = NDArray[Any]
STEPS, STREAMS = 3, 2
# Largest difference, by the largest value: where the given file rounds to 8 or 16 bits a last bit may turn.
FULL, HALF, EIGHT_BITS = 1e-3, 1e-2, 5e-2


def difference(given: ort.InferenceSession, converted: ort.InferenceSession, info: Contract, form: RunningForm) -> str:
    """Where the results or the states of the two differ; empty if they agree.

    Args:
        given, converted: The two files, opened.
        info: The contract of the given file.
        form: That of the converted one.
    """
    dynamic = all(state.shape[state.batch_dim] == "N" for state in info.states)
    streams = STREAMS if dynamic and all(spec.shape[:1] in ((), ("N",)) for spec in info.inputs) else 1
    chance = np.random.default_rng(0)
    states = {s.input: _start(chance, resolve(s.shape, streams), s.dtype, s.initial) for s in info.states}
    own = {s.input: form.from_given(s, states[s.input]) for s in info.states}
    for step in range(STEPS):
        frames = {i.name: _noise(chance, resolve(i.shape, streams), i.dtype) for i in info.inputs}
        if info.valid:
            frames[info.valid] = np.ones((streams, info.inputs[0].frames_per_step or 1), np.bool_)
        results, states = _stepped(given, info, frames, states)
        others, own = _stepped(converted, form.contract, frames, own)
        for state in info.states:
            results[state.input] = states[state.input]
            others[state.input] = form.to_given(state, own[state.input])
        for name, value in results.items():
            if not _agree(value, others[name], _tolerance(info)):
                return f"'{name}' in step {step}"
    return ""


def _stepped(
    session: ort.InferenceSession, info: Contract, frames: Mapping[str, Array], states: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The results of a step, and the next states."""
    values = {**frames, **states}
    names = [output.name for output in session.get_outputs()]
    values |= zip(names, session.run(names, values), strict=True)
    results = {output.name: values[output.name] for output in info.outputs}
    return results, {state.input: values[state.output] for state in info.states}


def _agree(one: Array, other: Array, tolerance: float) -> bool:
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    a, b = one.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    if a.shape != b.shape or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return False
    largest = np.abs(a[finite]).max(initial=0.0)
    return bool((np.abs(a - b)[finite] <= tolerance * largest + 1e-6).all())


def _tolerance(info: Contract) -> float:
    if info.options.get("int8"):
        return EIGHT_BITS
    dtypes = {spec.dtype for spec in info.inputs} | {state.dtype for state in info.states}
    return HALF if "float16" in dtypes else FULL


def _noise(chance: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Between 0 and 1: what follows may take a root or a logarithm of it. Whole numbers are indices: zeros."""
    return chance.random(shape).astype(dtype) if dtype.startswith("float") else np.zeros(shape, dtype)


def _start(chance: np.random.Generator, shape: tuple[int, ...], dtype: str, initial: float) -> Array:
    return _noise(chance, shape, dtype) if dtype.startswith("float") else np.full(shape, initial, dtype)


__all__ = ["difference"]
