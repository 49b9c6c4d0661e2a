"""Readers of single JSON values that name what is wrong with them.

A reader takes the value and where it is, and returns what a dataclass keeps of it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Literal, NoReturn, TypeAlias, TypeVar

from co3d_compile.errors import ContractError

T = TypeVar("T")
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Reader: TypeAlias = Callable[[Json, str], T]
Dim: TypeAlias = int | Literal["N", "K"]
Shape: TypeAlias = tuple[Dim, ...]

MAX_ELEMENTS = 2**32  # of all tensors of one stream together: 16 GiB of float32, more is damage
MAX_RANK = 16
HINT = "The file is damaged or was not written by co3d-compile: compile the model again."


def fail(problem: str) -> NoReturn:
    """Raises the ContractError for metadata that cannot be right."""
    raise ContractError(f"Bad co3d metadata: {problem}.", hint=HINT)


def forbid(wrong: bool, problem: str) -> None:
    """Fails if metadata is wrong in this way."""
    if wrong:
        fail(problem)


def shown(value: Json) -> str:
    """Shows the kind of a value and its beginning."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def typed(*kinds: type[T]) -> Reader[T]:
    """Reads a value of one of these Python types; a bool is no number."""

    def read(value: Json, where: str) -> T:
        if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
            return value
        fail(f"{where} must be {' or '.join(kind.__name__ for kind in kinds)}, not {shown(value)}")

    return read


def whole(least: int) -> Reader[int]:
    """Reads a whole number from ``least`` to ``MAX_ELEMENTS``."""

    def read(value: Json, where: str) -> int:
        number = typed(int)(value, where)
        if not least <= number <= MAX_ELEMENTS:
            fail(f"{where} must be from {least} to {MAX_ELEMENTS}, not {shown(number)}")
        return number

    return read


def or_null(read: Reader[T]) -> Reader[T | None]:
    """Reads None for null, and anything else by the reader."""
    return lambda value, where: None if value is None else read(value, where)


def each(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """Reads each item of a list."""
    return lambda value, where: tuple(read(x, f"{where}[{i}]") for i, x in enumerate(typed(list)(value, where)))


def text(*choices: str) -> Reader[str]:
    """Reads one of these strings, or any that is not empty."""

    def read(value: Json, where: str) -> str:
        found = typed(str)(value, where)
        if choices and found not in choices:
            fail(f"{where} must be one of {', '.join(choices)}, not {shown(found)}")
        return found or fail(f"{where} is empty")

    return read


def shape(value: Json, where: str) -> Shape:
    """Reads a list of sizes, the batch as ``"N"``, as many as there are rows at a step as ``"K"``."""
    dims = typed(list)(value, where)
    if len(dims) > MAX_RANK:
        fail(f"{where} has {len(dims)} dims")
    return tuple(dim if dim in ("N", "K") else whole(1)(dim, where) for dim in dims)


def number(value: Json, where: str) -> float:
    """Reads a number, or a string such as ``"-inf"`` for one that JSON does not have."""
    read: Reader[float | str] = typed(int, float, str)
    try:
        return float(read(value, where))
    except (ValueError, OverflowError):
        fail(f"{where} is not a number: {shown(value)}")


def counts(value: Json, where: str) -> dict[str, int]:
    """Reads an object of whole numbers from 1 on."""
    return {name: whole(1)(count, f"{where}.{name}") for name, count in typed(dict)(value, where).items()}
