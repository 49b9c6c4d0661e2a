"""Words of messages and reports."""

from __future__ import annotations


def plural(count: float, thing: str) -> str:
    """``1 frame``, ``2 frames``"""
    number = str(count) if isinstance(count, int) else f"{count:g}"
    return f"{number} {thing}" if count == 1 else f"{number} {thing}s"
