"""Readers of single JSON values that name what is wrong with them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeAlias

from co3d_compile.errors import ContractError

MAX_ELEMENTS = 2**32  # of all tensors of one stream together: 16 GiB of float32, more is damage
MAX_RANK = 16
Dim: TypeAlias = int | Literal["N"]
Shape: TypeAlias = tuple[Dim, ...]
_HINT = "The file is damaged or was not written by co3d-compile: compile the model again."


def _fail(problem: str) -> NoReturn:
    raise ContractError(f"Bad co3d metadata: {problem}.", hint=_HINT)


def _kind(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


# A reader of one JSON value: takes the value and where it is, returns what the dataclass holds.
_Read: TypeAlias = Callable[[Any, str], Any]


def _a(*kinds: type) -> _Read:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            _fail(f"{where} must be {' or '.join(kind.__name__ for kind in kinds)}, not {_kind(value)}")
        return value

    return read


def _whole(least: int) -> _Read:
    def read(value: Any, where: str) -> int:
        number: int = _a(int)(value, where)
        if not least <= number <= MAX_ELEMENTS:
            _fail(f"{where} must be from {least} to {MAX_ELEMENTS}, not {_kind(number)}")
        return number

    return read


def _or_null(read: _Read) -> _Read:
    return lambda value, where: None if value is None else read(value, where)


def _each(read: _Read) -> _Read:
    return lambda value, where: tuple(read(item, f"{where}[{i}]") for i, item in enumerate(_a(list)(value, where)))


def _one_of(*choices: str) -> _Read:
    def read(value: Any, where: str) -> str:
        if _a(str)(value, where) not in choices:
            _fail(f"{where} must be one of {', '.join(choices)}, not {_kind(value)}")
        return str(value)

    return read


def _text(value: Any, where: str) -> str:
    if not _a(str)(value, where):
        _fail(f"{where} is empty")
    return str(value)


def _shape(value: Any, where: str) -> Shape:
    if len(_a(list)(value, where)) > MAX_RANK:
        _fail(f"{where} has {len(value)} dims")
    return tuple("N" if dim == "N" else _whole(1)(dim, where) for dim in value)


def _number(value: Any, where: str) -> float:
    try:
        return float(_a(int, float, str)(value, where))
    except (ValueError, OverflowError):
        _fail(f"{where} is not a number: {_kind(value)}")


def _frames(value: Any, where: str) -> dict[str, int]:
    return {name: _whole(1)(count, f"{where}.{name}") for name, count in _a(dict)(value, where).items()}
