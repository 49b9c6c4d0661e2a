"""Entries of earlier steps: the lists that step graphs read them from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

from torch.fx import Node

from co3d_compile.ir.layout import Layout
from co3d_compile.ir.node_reading import whole
from co3d_compile.step_graph.builder import Entry, Slot
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


class LazyEntries(Sequence[Entry]):
    """A list of entries, each made only when read."""

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...

    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(len(self)))]
        return self.make(index)

    @abstractmethod
    def make(self, index: int) -> Entry:
        """Makes the entry of an index from 0 on."""

    @abstractmethod
    def origin(self, index: int) -> tuple[int, Entry]:
        """Says how many steps ago an entry was new, and which of the new ones it was."""


def origin(entries: Sequence[Entry], index: int) -> tuple[int, Entry]:
    """Says how many steps ago an entry of any list was new, and which of the new ones it was."""
    return entries.origin(index) if isinstance(entries, LazyEntries) else (0, entries[index])


@dataclass
class PastEntries(LazyEntries):
    """The ``n`` entries before this step, which are state, and its new ones."""

    low: EntryOperators
    new: list[Entry]
    n: int
    layout: Layout | None = None
    queue: Node | None = None
    start: InitialPast | None = None

    def __len__(self) -> int:
        return self.n + len(self.new)

    def make(self, index: int) -> Entry:
        if index >= self.n:
            return self.new[index - self.n]
        back = self.n - index
        if self.queue is not None:
            return Slot(self.queue, whole(self.queue, 1) - back, tuple(self.low.sizes(self.low.resolve(self.new[0]))))
        steps, entry = self.origin(index)
        start = self.start or InitialPast(0.0)
        fix = partial(start.fix, -back % len(self.new)) if start.fix is not None else None
        return self.low.before(self.low.resolve(entry), steps, self.layout, start.number or 0.0, fix)

    def origin(self, index: int) -> tuple[int, Entry]:
        if index >= self.n:
            return 0, self.new[index - self.n]
        back, pulse = self.n - index, len(self.new)
        return -(-back // pulse), self.new[pulse - 1 - (back - 1) % pulse]


@dataclass
class ChosenEntries(LazyEntries):
    """Some of the entries of a list."""

    entries: Sequence[Entry]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def make(self, index: int) -> Entry:
        return self.entries[self.indices[index]]

    def origin(self, index: int) -> tuple[int, Entry]:
        return origin(self.entries, self.indices[index])


@dataclass(frozen=True)
class AgedEntry:
    """An entry: ``node`` as it was so many steps ago."""

    node: Node
    steps: int
