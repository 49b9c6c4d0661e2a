"""Entries of earlier steps: the lists that step graphs read them from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import Node

from co3d_compile.ir.layout import Layout
from co3d_compile.ir.node_reading import whole
from co3d_compile.step_graph.builder import Slot
from co3d_compile.step_graph.entry_operators import EntryOperators


@dataclass
class InitialPast:
    """How the past is made right when a stream has just begun.

    Args:
        number: The one number that all of the past is: the initial value of its states.
        fix: Without such a number: gives the value of entry ``i``, ``t`` steps ago (batch alone in front), from what
            the state holds.
    """

    number: float | None = None
    fix: Callable[[int, int, Node], Node] | None = None


@dataclass
class PastEntries:
    """A list of entries whose older ones are state: made only when read."""

    low: EntryOperators
    new: list[Any]
    n: int
    layout: Layout | None = None
    queue: Node | None = None
    start: InitialPast | None = None

    def __len__(self) -> int:
        return self.n + len(self.new)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index >= self.n:
            return self.new[index - self.n]
        back = self.n - index
        if self.queue is not None:
            return Slot(self.queue, whole(self.queue, 1) - back, tuple(self.low.sizes(self.low.resolve(self.new[0]))))
        steps, entry = self.origin(index)
        start = self.start or InitialPast(0.0)
        fix = partial(start.fix, -back % len(self.new)) if start.fix is not None else None
        return self.low.before(self.low.resolve(entry), steps, self.layout, start.number or 0.0, fix)

    def origin(self, index: int) -> tuple[int, Any]:
        """How many steps ago an entry was new, and which of the new ones it was."""
        if index >= self.n:
            return 0, self.new[index - self.n]
        back, pulse = self.n - index, len(self.new)
        return -(-back // pulse), self.new[pulse - 1 - (back - 1) % pulse]


@dataclass(frozen=True)
class AgedEntry:
    """An entry: ``node`` as it was so many steps ago."""

    node: Node
    steps: int


class ChosenEntries:
    """Some of the entries of a list, made only when read."""

    def __init__(self, entries: Any, indices: list[int]) -> None:
        self.entries, self.indices = entries, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        return self.entries[self.indices[i]]

    def origin(self, i: int) -> tuple[int, Any]:
        """How many steps ago an entry was new, and which of the new ones it was."""
        at = self.indices[i]
        return self.entries.origin(at) if hasattr(self.entries, "origin") else (0, self.entries[at])
