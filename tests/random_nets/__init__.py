"""Random networks: a drawn description, the module it stands for, and what the specification says of it."""

from __future__ import annotations

from .describe import Net, Op, Out
from .draw import nets
from .entry import entry_of

__all__ = ["Net", "Op", "Out", "entry_of", "nets"]
