"""The settings of a target: fields of a dataclass, with what the command line says of each and what they may be."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any

from co3d_compile.errors import UsageError


def setting(default: str | int, text: str, *, choices: tuple[str, ...] = (), least: int = 1, metavar: str = "N") -> Any:
    """Makes a field of a dataclass of settings.

    Args:
        default: Its value where none is given.
        text: What it does, for ``--help``.
        choices: The words that it may be; without any it is a whole number.
        least: The least number.
        metavar: The unit of the number.
    """
    return field(default=default, metadata={"text": text, "choices": choices, "least": least, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """Settings that check themselves.

    Raises:
        UsageError: A number that makes no sense, or another word.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each, getattr(self, each.name))


def _check(each: Field[Any], value: str | int) -> None:
    """Refuses a value that a setting cannot have."""
    choices, least = each.metadata["choices"], each.metadata["least"]
    if choices and value not in choices:
        raise UsageError(f"{each.name} is {value!r}.", hint=f"It must be one of {', '.join(choices)}.")
    if not choices and (not isinstance(value, int) or value < least):
        raise UsageError(f"{each.name} is {value!r}.", hint=f"It must be a whole number from {least}.")
