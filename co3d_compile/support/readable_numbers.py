"""Words of messages and reports."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def plural(count: float, thing: str) -> str:
    """Writes ``1 frame``, ``2 frames``."""
    number = str(count) if isinstance(count, int) else f"{count:g}"
    return f"{number} {thing}" if count == 1 else f"{number} {thing}s"


def number_text(value: float) -> str:
    """Writes three digits and a unit: 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def bytes_text(value: float) -> str:
    """Writes ``1.2 MB``."""
    number, _, unit = number_text(value).partition(" ")
    return f"{number} {unit}B"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Asks ``Did you mean mean?``, if a known name is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    near = near or [each for each in known if each.lower() == word.lower()]
    return f"Did you mean {near[0]}?" if near else None
