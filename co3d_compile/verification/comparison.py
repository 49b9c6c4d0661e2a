"""Streamed results beside what is expected: the largest error, where it is, and how much of it is rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from co3d_compile.contract.model_contract import Contract
from co3d_compile.verification.output_plans import Wanted


@dataclass(frozen=True)
class Worst:
    """The largest error of all; ``missing`` says what could not be compared.

    ``steps`` holds the largest error of each step: absolute, and in standard deviations of what is expected.
    """

    absolute: float = 0.0
    relative: float = 0.0
    where: str = "nowhere"
    missing: str = ""
    steps: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def joined(self, other: Worst) -> Worst:
        """The larger of two errors, and of each step the larger one."""
        steps = dict(self.steps)
        for step, error in other.steps.items():
            steps[step] = max(error, steps.get(step, error), key=lambda e: e[1])
        return replace(max(self, other, key=lambda e: e.relative), steps=steps)


class Comparison:
    """The streamed results beside what is expected."""

    def __init__(self, info: Contract, results: Mapping[int, tuple[Any, ...]]) -> None:
        self.info, self.results = info, results

    def agrees(self, expected: dict[Wanted, list[Tensor]]) -> bool:
        """Whether everything is about right: the reference is worth a closer look."""
        worst = self.worst(expected)
        return not worst.missing and worst.relative <= 1e-2

    def worst(self, expected: dict[Wanted, list[Tensor]]) -> Worst:
        """The largest error over all outputs."""
        found = Worst()
        for k in range(len(self.info.outputs)):
            own = {w: v for w, v in expected.items() if w.output == k}
            answers = max((len(v) for v in own.values()), default=1)
            options = [self._output(k, {w: v[i : i + 1] for w, v in own.items()}) for i in range(max(1, answers))]
            best = min(options, key=lambda e: e.relative)
            if best.missing:
                return best
            found = found.joined(best)
        return found

    def _output(self, k: int, expected: dict[Wanted, list[Tensor]]) -> Worst:
        """The largest error of one output, in standard deviations of all that is expected of it."""
        name = self.info.outputs[k].name
        errors: list[tuple[int, float, str]] = []
        for w, values in expected.items():
            actual, where = self.results[w.step][k], f"output '{name}' at step {w.step}"
            if not values or _squeezed(values[0].shape) != _squeezed(actual.shape):
                return Worst(math.inf, math.inf, where, _missing(name, w, actual, values))
            error, index = _error(actual, values[0])
            errors.append((w.step, error, f"{where}, index {index}"))
        return _largest(errors, [v[0] for v in expected.values()])


def _largest(errors: list[tuple[int, float, str]], expected: list[Tensor]) -> Worst:
    """The largest of these errors."""
    if not errors:
        return Worst()
    scale = spread(expected)
    found = Worst(steps={step: (absolute, absolute / scale) for step, absolute, _ in errors})
    _, absolute, where = max(errors, key=lambda e: e[1])
    return replace(found, absolute=absolute, relative=absolute / scale, where=where)


def spread(expected: Sequence[Tensor]) -> float:
    """The deviation of what is expected, a hundredth of the largest value at least; 1 where all is the same.

    A float32 of 1.1 is only known to 1e-7, whatever the deviation of its like.
    """
    values = torch.cat([v.flatten().double() for v in expected])
    deviation = float(values.std(correction=0))
    return max(deviation, float(values.abs().max()) / 100) if deviation > 0 else 1.0


def _error(actual: Any, expected: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute error and its index; infinite where a value is not finite."""
    wanted = expected.numpy()
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual.reshape(wanted.shape).astype(np.float64) - wanted.astype(np.float64))
    difference = np.where(np.isfinite(difference), difference, np.inf).reshape(actual.shape)
    index = np.unravel_index(int(difference.argmax()), difference.shape) if difference.size else ()
    return (float(difference[index]) if difference.size else 0.0), tuple(int(i) for i in index)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(s) for s in shape if s != 1)


def _missing(name: str, w: Wanted, actual: Any, candidates: Sequence[Tensor]) -> str:
    if candidates:
        shapes = [tuple(c.shape) for c in candidates]
        return f"Output '{name}' has shape {tuple(actual.shape)}, expected {shapes[0]}."
    where = f"entries {w.entries[0]} to {w.entries[-1]}" if w.entries else f"the clip from frame {_shown(w.starts)} on"
    return f"Output '{name}' at step {w.step} would be {where}, which the model does not have: its delay is wrong."


def rounding(in_float32: dict[Wanted, list[Tensor]], exact: dict[Wanted, list[Tensor]]) -> float:
    """How far the untouched model in float32 is from itself in float64, in standard deviations of its output."""
    worst = 0.0
    for output in {w.output for w in exact}:
        own = [w for w in exact if w.output == output]
        pairs = [pair for w in own for pair in zip(in_float32[w], exact[w], strict=False)]
        if pairs:
            scale = spread([b for _, b in pairs])
            worst = max(worst, *(float((a.double() - b).abs().max()) / scale for a, b in pairs))
    return worst


def _shown(starts: Sequence[Fraction]) -> str:
    return " or ".join(map(str, starts)) or "none"


__all__ = ["Comparison", "Worst", "rounding"]
