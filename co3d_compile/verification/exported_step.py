"""A step program of ``torch.export`` beside the ONNX file of the same compilation: both must give the same numbers."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from co3d_compile.contract.model_contract import METADATA_KEY, Contract, resolve
from co3d_compile.contract.read_contract import parse
from co3d_compile.contract.reader_loop import Values, stepped
from co3d_compile.errors import ContractError, LoadError
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.plain_types import Array
from co3d_compile.verification.comparison import absolute_difference
from co3d_compile.verification.verification import Verification

STEPS = 5  # beyond the warm-up
ROUNDING = 8 * float(np.finfo(np.float32).eps)  # of the largest value, is no error


def load_step(path: str | os.PathLike[str]) -> tuple[Callable[..., tuple[Tensor, ...]], Contract]:
    """Loads the step program in a ``.pt2`` archive, ready to be called, and its contract.

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
    sizes = (state.shape[state.batch_dim] for state in info.states)
    batch = next((size for size in sizes if isinstance(size, int)), 1)
    generator = np.random.default_rng(0)
    shapes = [(resolve(spec.shape, batch), spec.dtype) for spec in info.inputs]
    steps = [
        [generator.standard_normal(shape).astype(dtype) for shape, dtype in shapes]
        for _ in range(info.warmup_steps + STEPS)
    ]
    names = [*(output.name for output in info.outputs), *(state.output for state in info.states)]

    def run(given: Values) -> Values:
        values = module(*map(torch.from_numpy, given.values()))
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    with StreamSession(model, batch=batch, layout="plain") as session, torch.no_grad():
        results = [r if isinstance(r, tuple) else (r,) for r in map(session.step, steps)]
        values = list(stepped(info, batch, steps, run))
    for k, spec in enumerate(info.outputs):
        right = np.stack([result[k] for result in results[info.warmup_steps :]])
        found = _with(found, spec.name, right, np.stack([v[spec.name] for v in values[info.warmup_steps :]]))
    return found


def _with(found: Verification, name: str, expected: Array, actual: Array) -> Verification:
    """The finding with the larger error of the two."""
    error = float(absolute_difference(actual, expected).max())
    # Probabilities that are almost flat differ by less than a float32 can tell.
    beyond = max(0.0, error - ROUNDING * float(np.abs(expected).max())) if math.isfinite(error) else error
    relative = beyond / (float(np.std(expected)) or 1.0)
    if relative <= found.relative_error:
        return found
    passed = found.passed and relative <= found.tolerance
    return replace(
        found,
        passed=passed,
        max_error=max(error, found.max_error),
        relative_error=relative,
        worst=f"{name}, torch.export program beside ONNX",
        reason=found.reason or ("" if passed else "The torch.export program differs from the ONNX model."),
    )
