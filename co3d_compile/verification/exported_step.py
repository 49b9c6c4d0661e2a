"""A step program of ``torch.export`` beside the ONNX file of the same compilation: both must give the same numbers."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from typing import Any

import numpy as np
import torch

from co3d_compile.contract.model_contract import METADATA_KEY, Contract, parse, resolve
from co3d_compile.errors import ContractError, LoadError
from co3d_compile.runtime.session import StreamSession
from co3d_compile.verification.verification import Verification

STEPS = 5  # beyond the warm-up
ROUNDING = 8 * float(np.finfo(np.float32).eps)  # of the largest value, is no error


def load_step(path: str | os.PathLike[str]) -> tuple[Any, Contract]:
    """The step program in a ``.pt2`` archive, ready to be called, and its contract.

    Raises:
        LoadError: It is no archive that ``torch.export`` can read.
        ContractError: It is no compiled step.
    """
    extra = {METADATA_KEY: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:
        raise LoadError(f"{os.fspath(path)} is no torch.export archive: {error}") from error
    if not extra[METADATA_KEY]:
        raise ContractError(f"{os.fspath(path)} holds no compiled step.", hint="Write it with co3d-compile.")
    return module, parse(extra[METADATA_KEY])


def verify_step(path: str | os.PathLike[str], model: str | os.PathLike[str], found: Verification) -> Verification:
    """Steps the archive beside the ONNX file, whose own verification is ``found``, and returns what holds of both."""
    module, info = load_step(path)
    session = StreamSession(model, batch=_batch(info))
    generator = np.random.default_rng(0)
    state = [torch.full(resolve(s.shape, session.batch), s.initial, dtype=_dtype(s.dtype)) for s in info.states]
    flags = [torch.ones(session.batch, info.inputs[0].frames_per_step or 1, dtype=torch.bool)] if info.valid else []
    pairs: list[list[tuple[Any, Any]]] = [[] for _ in info.outputs]
    with session, torch.no_grad():
        for step in range(info.warmup_steps + STEPS):
            frames = [generator.standard_normal(resolve(i.shape, session.batch)).astype(i.dtype) for i in info.inputs]
            expected = session.step(frames)
            values = module(*map(torch.from_numpy, frames), *flags, *state)
            state = list(values[len(pairs) :])
            if step >= info.warmup_steps:
                expected = expected if isinstance(expected, tuple) else (expected,)
                for pair, one, other in zip(pairs, expected, values, strict=False):
                    pair.append((one, other.numpy()))
    for spec, pair in zip(info.outputs, pairs, strict=True):
        found = _worse(found, spec.name, *(np.stack(side) for side in zip(*pair, strict=True)))
    return found


def _worse(found: Verification, name: str, expected: Any, actual: Any) -> Verification:
    """The finding with the larger error of the two."""
    error = float(np.abs(np.subtract(expected, actual, dtype=np.float64)).max())
    # Probabilities that are almost flat differ by less than a float32 can tell.
    beyond = max(0.0, error - ROUNDING * float(np.abs(expected).max())) if math.isfinite(error) else error
    relative = beyond / (float(np.std(expected)) or 1.0)
    relative = relative if math.isfinite(relative) else math.inf
    if relative <= found.relative_error:
        return found
    passed = found.passed and relative <= found.tolerance
    reason = found.reason or ("" if passed else "The torch.export program differs from the ONNX model.")
    return dataclasses.replace(
        found,
        passed=passed,
        max_error=max(error, found.max_error),
        relative_error=relative,
        worst=f"{name}, torch.export program beside ONNX",
        reason=reason,
    )


def _batch(info: Contract) -> int:
    """The batch that the states fix, or one."""
    fixed = [s.shape[s.batch_dim] for s in info.states]
    return next((int(n) for n in fixed if n != "N"), 1)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
