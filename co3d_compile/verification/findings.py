"""What verification finds: errors per step, and where two graphs begin to differ."""

from __future__ import annotations

from dataclasses import dataclass


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
