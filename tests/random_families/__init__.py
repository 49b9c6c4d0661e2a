"""Random networks of many families of operators: how each is drawn, the oracle that examines one, and a search."""

from __future__ import annotations

from .examine import Outcome, examine
from .sketch import Block, Sketch, draw

__all__ = ["Block", "Outcome", "Sketch", "draw", "examine"]
