"""Words of messages and reports."""

from __future__ import annotations


def plural(count: float, thing: str) -> str:
    """``1 frame``, ``2 frames``"""
    number = str(count) if isinstance(count, int) else f"{count:g}"
    return f"{number} {thing}" if count == 1 else f"{number} {thing}s"


def number_text(value: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def bytes_text(value: float) -> str:
    """``1.2 MB``"""
    number, _, unit = number_text(value).partition(" ")
    return f"{number} {unit}B"
