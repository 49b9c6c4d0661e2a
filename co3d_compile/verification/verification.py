"""What ``verify`` found, as data."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from co3d_compile.report.facts import verification_text
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.verification.findings import Bisection, StepError


@dataclass(frozen=True, repr=False)
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
        notes: What else there is to say of how it was compared.
        compared_with: The untouched network, or the network with so many gates in the place of its pools over time.
        replaced_distance: How far the network with its gates is from the untouched one on the same clips: the largest
            difference in standard deviations of its output; None without gates, or where it cannot be told.
        errors: The error of every step that was compared, in order.
        streamed: How many steps were run.
        nan_states: How many states were NaN at the start.
        finite_from: The first step from which on all outputs were finite; None if even the last one was not.
        memory: Bytes of memory of the process when the first and the last stretch of a long run were compared.
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
    compared_with: str = "the untouched network"
    replaced_distance: float | None = None

    def __repr__(self) -> str:
        return f"<Verification {'passed' if self.passed else 'FAILED'}, {verification_text(self.to_dict())}>"

    def to_dict(self) -> JsonObject:
        """Writes the result as plain data."""
        lists = {"outputs": list(self.outputs), "notes": list(self.notes)}
        memory = None if self.memory is None else dict(zip(("start", "end"), self.memory, strict=True))
        return {**asdict(self), **lists, "errors": [asdict(e) for e in self.errors], "memory": memory}

    def plot(self, path: str | os.PathLike[str], title: str = "") -> Path:
        """Writes the error over time as ``.svg``, ``.png`` or ``.html``; a file of that name is replaced as a whole.

        Raises:
            UsageError: Another kind of file. Co3dError: matplotlib is missing. OutputError: It cannot be written.
        """
        from co3d_compile.verification.error_plot import save_plot

        verdict = "passed" if self.passed else f"failed: {self.reason}"
        said = [verdict, *([self.bisection.message] if self.bisection else []), *self.notes]
        return save_plot(path, title, self.errors, self.tolerance, said)
