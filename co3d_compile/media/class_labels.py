"""Names of classes: read from a file, and made fit for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from co3d_compile.errors import LoadError, UsageError

MAX_BYTES = 16_000_000
MAX_LENGTH = 200  # characters of one name


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Reads the names of the classes, in the order of the model's scores.

    Args:
        path: A text file with one name per line; or JSON: a list of names, or an object from names to numbers or from
            numbers to names, with the numbers 0, 1, 2, ….

    Raises:
        LoadError: The file cannot be read, or holds no such names.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise LoadError(f"{path} is too large for a list of labels.")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read as labels: {getattr(error, 'strerror', None) or error}.") from error
    if text.lstrip()[:1] in ("[", "{"):
        names = _from_json(path, text)
    else:
        names = [*text.rstrip().splitlines()] if text.strip() else []
    if not names:
        raise LoadError(f"{path} holds no labels.", hint="Write one name per line.")
    return clean_labels(names)


def clean_labels(names: Sequence[str | int]) -> tuple[str, ...]:
    """Makes names short texts without control characters: they may come from anyone's file.

    Raises:
        UsageError: It is one text, whose letters would be the names.
    """
    if isinstance(names, (str, bytes)):
        raise UsageError(f"The labels are the text {names!r}.", hint="Give a list of names, one for each class.")
    return tuple(_clean(name) for name in names)


def _clean(name: str | int) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in str(name)[:MAX_LENGTH])
    return text.strip().strip('"').strip()


def _from_json(path: str | Path, text: str) -> list[str | int]:
    hint = "Write a list of names, or an object from names to the numbers 0, 1, 2, …"
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not JSON: {error}.", hint=hint) from error
    if isinstance(data, dict):
        try:
            pairs = {int(name): number for name, number in data.items()}
        except ValueError:
            numbers = [number for number in data.values() if isinstance(number, int)]
            pairs = dict(zip(numbers, data, strict=False))
        if sorted(pairs) != list(range(len(data))):
            raise LoadError(f"{path} does not number its labels 0 to {len(data) - 1}.", hint=hint)
        data = [pairs[index] for index in range(len(pairs))]
    if not all(isinstance(name, (str, int)) for name in data):
        raise LoadError(f"{path} holds something else than names.", hint=hint)
    return list(data)
