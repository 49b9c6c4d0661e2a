"""A converted file against the given one: a few steps of both on random frames, from random states."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.contract.reader_loop import stepped
from co3d_compile.native.running_form import RunningForm
from co3d_compile.support.cpu_session import by_name
from co3d_compile.support.plain_types import Array

STEPS, STREAMS = 3, 2
# Largest difference, by the largest value: where the given file rounds to 8 or 16 bits a last bit may turn.
FULL, HALF, EIGHT_BITS = 1e-3, 1e-2, 5e-2


def difference(given: ort.InferenceSession, converted: ort.InferenceSession, info: Contract, form: RunningForm) -> str:
    """Says where the results or the states of the two differ; empty if they agree.

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
    steps = [[_noise(chance, resolve(i.shape, streams), i.dtype) for i in info.inputs] for _ in range(STEPS)]
    ours = stepped(form.contract, streams, steps, by_name(converted), own)
    theirs = stepped(info, streams, steps, by_name(given), states)
    for step, (right, found) in enumerate(zip(theirs, ours, strict=True)):
        pairs = [(output.name, right[output.name], found[output.name]) for output in info.outputs]
        both = zip(info.states, form.contract.states, strict=True)
        pairs += [(s.input, right[s.output], form.to_given(s, found[same.output])) for s, same in both]
        for name, value, other in pairs:
            if not _agree(value, other, _tolerance(info)):
                return f"'{name}' in step {step}"
    return ""


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
    """Draws numbers between 0 and 1, as a root or a logarithm takes them. Whole numbers are indices: zeros."""
    return chance.random(shape).astype(dtype) if dtype.startswith("float") else np.zeros(shape, dtype)


def _start(chance: np.random.Generator, shape: tuple[int, ...], dtype: str, initial: float) -> Array:
    return _noise(chance, shape, dtype) if dtype.startswith("float") else np.full(shape, initial, dtype)
