"""What ``verify`` found, as data."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepError:
    """The largest error of one step: absolute, and in standard deviations of what is expected of that output."""

    step: int
    absolute: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """The first operator of the file that does not compute what the model does.

    Attributes:
        operator, module_path: Which one, by the names of the untouched model.
        before: Largest error of what it reads, in standard deviations of what is expected there.
        after: The same of its result.
        rounding: What rounding makes of the untouched model's own result there, in the same unit.
        through: Operators of the file on the way to it that the model has not, as ``operator in module``.
    """

    operator: str
    module_path: str
    before: float
    after: float
    rounding: float
    through: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.operator} in {self.module_path or 'the model itself'}"
        through = f" (on the way to it the file has {', '.join(self.through)})" if self.through else ""
        return f"{where}{through}: error {self.before:.1e} before it, {self.after:.1e} behind it"


@dataclass(frozen=True)
class Bisection:
    """Where a file that failed differs first.

    Attributes:
        difference: The operator; None where none was found.
        message: One sentence for people: what was found, or why nothing was.
        compared: Operators whose results were compared.
        operators: Operators of the model that the file could have a result of.
    """

    difference: Difference | None
    message: str
    compared: int = 0
    operators: int = 0


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        passed: Whether every compared value is finite and within the tolerance.
        max_error: Largest absolute error.
        relative_error: Largest error in standard deviations of the output that is expected.
        tolerance: The relative error that is allowed.
        worst: Where the relative error is largest.
        steps: How many steps were compared, from ``warmup_steps`` on.
        warmup_steps: What the file says.
        receptive_field: What the file says, in frames; None if unbounded.
        outputs: Names of the outputs that were compared.
        reason: Why it did not pass; empty if it did.
        notes: What was compared with what, where that is not the whole untouched model.
        errors: The error of every step that was compared, in order.
        streamed: How many steps were run.
        nan_states: How many states held NaN at the start.
        finite_from: The first step from which on all outputs were finite; None if even the last one was not.
        memory: Bytes that the process held when the first and the last stretch of a long run were compared.
        bisection: Which operator differs first; None if it passed, or was not asked for.
    """

    passed: bool
    max_error: float
    relative_error: float
    tolerance: float
    worst: str
    steps: int
    warmup_steps: int
    receptive_field: int | None
    outputs: tuple[str, ...]
    reason: str
    notes: tuple[str, ...]
    errors: tuple[StepError, ...] = ()
    streamed: int = 0
    nan_states: int = 0
    finite_from: int | None = 0
    memory: tuple[int, int] | None = None
    bisection: Bisection | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        lists = {"outputs": list(self.outputs), "notes": list(self.notes)}
        memory = None if self.memory is None else dict(zip(("start", "end"), self.memory, strict=True))
        return {**asdict(self), **lists, "errors": [asdict(e) for e in self.errors], "memory": memory}

    def plot(self, path: str | os.PathLike[str], title: str = "") -> Path:
        """Writes the error over time as ``.svg``, ``.png`` or ``.html``; a file of that name is replaced as a whole.

        Raises:
            UsageError: Another kind of file. Co3dError: matplotlib is missing. OutputError: It cannot be written.
        """
        from co3d_compile.error_plot import save_plot

        return save_plot(self, path, title)


__all__ = ["Bisection", "Difference", "StepError", "Verification"]
