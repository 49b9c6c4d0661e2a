"""Streamed results beside what is expected: the largest error, where it is, and how much of it is rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from co3d_compile.contract.model_contract import Contract
from co3d_compile.support.plain_types import Array
from co3d_compile.verification.output_plans import ResultIndex

Expected: TypeAlias = Mapping[ResultIndex, Sequence[Tensor]]


@dataclass(frozen=True)
class LargestError:
    """The largest error of all; ``missing`` says what could not be compared.

    ``steps`` has the largest error of each step: absolute, and in standard deviations of what is expected.
    """

    absolute: float = 0.0
    relative: float = 0.0
    where: str = "nowhere"
    missing: str = ""
    steps: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def joined(self, other: LargestError) -> LargestError:
        """Takes the larger of two errors, and of each step the larger one."""
        steps = dict(self.steps)
        for step, error in other.steps.items():
            steps[step] = max(error, steps.get(step, error), key=lambda e: e[1])
        return replace(max(self, other, key=lambda e: e.relative), steps=steps)


def largest_error(info: Contract, results: Mapping[int, tuple[Array, ...]], expected: Expected) -> LargestError:
    """Finds the largest error over all outputs.

    Args:
        info: The contract.
        results: All outputs of each step, by step.
        expected: What they should be. Of several candidates for a result the one that fits best counts.
    """
    found = LargestError()
    for k, output in enumerate(info.outputs):
        own = {index: values for index, values in expected.items() if index.output == k}
        candidates = max([1, *map(len, own.values())])
        errors = [_of_output(output.name, results, own, candidate) for candidate in range(candidates)]
        best = min(errors, key=lambda e: e.relative)
        if best.missing:
            return best
        found = found.joined(best)
    return found


def _of_output(name: str, results: Mapping[int, tuple[Array, ...]], expected: Expected, candidate: int) -> LargestError:
    """Measures the largest error of one output, in standard deviations of all that is expected of it."""
    errors: list[tuple[int, float, str]] = []
    for index, values in expected.items():
        actual, where = results[index.step][index.output], f"output '{name}' at step {index.step}"
        right = values[candidate].numpy() if candidate < len(values) else None
        if right is None or sizes_but_one(right) != sizes_but_one(actual):
            return LargestError(math.inf, math.inf, where, _missing(name, index, actual, right))
        difference = absolute_difference(actual.reshape(right.shape), right).reshape(actual.shape)
        at = np.unravel_index(int(difference.argmax()), difference.shape) if difference.size else ()
        largest = float(difference[at]) if difference.size else 0.0
        errors.append((index.step, largest, f"{where}, index {tuple(map(int, at))}"))
    if not errors:
        return LargestError()
    scale = spread([values[candidate] for values in expected.values()])
    _, absolute, where = max(errors, key=lambda e: e[1])
    steps = {step: (error, error / scale) for step, error, _ in errors}
    return LargestError(absolute, absolute / scale, where, steps=steps)


def absolute_difference(actual: Array, expected: Array) -> Array:
    """Computes the absolute difference, number by number; infinite where it is not finite."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    return np.where(np.isfinite(difference), difference, np.inf)


def spread(expected: Sequence[Tensor]) -> float:
    """Computes the deviation of what is expected, a hundredth of the largest value at least; 1 where all is the same.

    A float32 of 1.1 is only known to 1e-7, whatever the deviation of its like.
    """
    values = torch.cat([v.flatten().double() for v in expected])
    deviation = float(values.std(correction=0))
    return max(deviation, float(values.abs().max()) / 100) if deviation > 0 else 1.0


def rounding(in_float32: Expected, exact: Expected) -> float:
    """Gives how far the untouched model in float32 is from itself in float64, in standard deviations of its output."""
    worst = 0.0
    for output in {index.output for index in exact}:
        own = [index for index in exact if index.output == output]
        pairs = [
            pair for index in own for pair in zip(in_float32[index], exact[index], strict=False) if pair[1].numel()
        ]
        if pairs:
            scale = spread([b for _, b in pairs])
            worst = max(worst, *(float((a.double() - b).abs().max()) / scale for a, b in pairs))
    return worst


def sizes_but_one(array: Array) -> list[int]:
    """Lists the sizes of the dims that have more than one row."""
    return [size for size in array.shape if size != 1]


def _missing(name: str, index: ResultIndex, actual: Array, expected: Array | None) -> str:
    if expected is not None:
        return f"Output '{name}' has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}."
    starts = " or ".join(map(str, index.starts)) or "none"
    entries = f"entries {index.entries[0]} to {index.entries[-1]}" if index.entries else ""
    where = entries or f"the clip from frame {starts} on"
    return f"Output '{name}' at step {index.step} would be {where}, which the model does not have: its delay is wrong."
