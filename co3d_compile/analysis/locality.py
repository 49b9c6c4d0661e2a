"""Whether each entry of a result depends on a few entries of the inputs, the same ones for every entry (or block)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from co3d_compile.analysis.entry_dependence import Tracker

LONGEST_PERIOD = 64
MANY = 3e8
"""Numbers to be marked, of all entries together: where there are more, some entries speak for the others."""


@dataclass(frozen=True)
class Reach:
    """What a block of a result depends on, in entries.

    Args:
        before: Entries in front of the block.
        after: Entries behind it.
        period: Entries of a block: each of them is a function of its own.
    """

    before: int
    after: int
    period: int


@dataclass(frozen=True)
class Dependence:
    """Which entries of a result (rows) depend on which entries of an input (columns)."""

    rows: int
    columns: dict[int, Tensor]

    def distances(self) -> list[tuple[int, ...]]:
        """Measures, for each entry, the distances to the entries that it depends on, as far as they were marked."""
        entries, rows = torch.stack(list(self.columns.values())).nonzero(as_tuple=True)
        return self._per_row(torch.tensor(list(self.columns))[entries] - rows, rows)

    def all_distances(self) -> list[tuple[int, ...]]:
        """The distances as if all entries had been marked: the others depend as the one in the middle does."""
        marked = sorted(self.columns)
        if len(marked) == self.rows:
            return self.distances()
        middle = marked[len(marked) // 2]
        near = middle - self.columns[middle].nonzero().flatten()
        rows, distances = torch.arange(self.rows).repeat_interleave(len(near)), near.repeat(self.rows)
        unmarked = torch.tensor([e for e in range(self.rows) if e not in self.columns])
        moved = torch.isin(rows + distances, unmarked)
        there = zip(self.distances(), self._per_row(distances[moved], rows[moved]), strict=True)
        return [tuple(sorted({*some, *others})) for some, others in there]

    def _per_row(self, distances: Tensor, rows: Tensor) -> list[tuple[int, ...]]:
        found: list[list[int]] = [[] for _ in range(self.rows)]
        for row, distance in zip(rows.tolist(), distances.tolist(), strict=True):
            found[row].append(distance)
        return [tuple(row) for row in found]


def dependences(module: GraphModule, inputs: list[Tensor], dims: Sequence[int], dim: int) -> list[Dependence]:
    """Finds which entries of the result of a graph depend on which of each input.

    Args:
        module: The graph at one length.
        inputs: One clip of each input, of any values.
        dims: The time dim of each input.
        dim: The time dim of the result.
    """
    tracker = Tracker(module, inputs)
    size = sum(_numbers(shape) for shape in tracker.structure.shapes.values())
    found = []
    for i, (x, over) in enumerate(zip(inputs, dims, strict=True)):
        columns = {e: _rows(tracker, i, x, over, e, dim) for e in _chosen(x.shape[over], size)}
        found.append(Dependence(len(next(iter(columns.values()))), columns))
    return found


def spread(module: GraphModule, inputs: list[Tensor], dims: Sequence[int], dim: int) -> int:
    """Counts the entries of the result that depend on the entry in the middle of some input.

    From the first to the last.
    """
    tracker = Tracker(module, inputs)
    rows = [
        _rows(tracker, i, x, over, x.shape[over] // 2, dim)
        for i, (x, over) in enumerate(zip(inputs, dims, strict=True))
    ]
    extents = [r.nonzero().flatten() for r in rows]
    return max((int(e.max() - e.min()) + 1 for e in extents if len(e)), default=0)


def _rows(tracker: Tracker, i: int, x: Tensor, over: int, entry: int, dim: int) -> Tensor:
    """Finds which entries of the result depend on one entry of an input."""
    result = tracker.result
    mark = torch.zeros(x.shape, dtype=torch.bool)
    mark.select(over, entry).fill_(True)
    marks = tracker.follow({i: mark}).get(result)
    if marks is None:
        return torch.zeros(tracker.structure.shape(result)[dim], dtype=torch.bool)
    return marks.movedim(dim, 0).flatten(1).any(1)


def _numbers(shape: object) -> int:
    if isinstance(shape, list):
        return sum(_numbers(part) for part in shape)
    return int(torch.Size(shape).numel())  # type: ignore[arg-type]


def _chosen(entries: int, size: int) -> list[int]:
    """Chooses the entries that are marked: all, or some at both ends and a run of them in the middle."""
    if entries * size <= MANY:
        return list(range(entries))
    middle = entries // 2
    return sorted({0, 1, *range(middle - 4, middle + 4), entries - 2, entries - 1} & set(range(entries)))


def reach_of(found: Sequence[Dependence]) -> Reach | None:
    """Finds the reach of a result; None if it is not local, or the clip is too short to show that.

    Of all periods the smallest with two blocks at least of the same pattern in the interior. What is in front of them
    and behind them depends on the ends of the clip, and may be anything.
    """
    distances = [d.all_distances() for d in found]
    rows = found[0].rows
    for period in range(1, min(LONGEST_PERIOD, rows // 2) + 1):
        found_reach = _at_period(distances, rows, period)
        if found_reach is not None:
            return found_reach
    return None


def ends_meet(found: Sequence[Dependence], reach: Reach | None) -> bool:
    """Says whether entries at one end depend on those at the other: beyond the reach (``roll``), or all (``flip``)."""
    pairs = [(n, distance) for d in found for n, row in enumerate(d.distances()) for distance in row]
    if reach is not None:
        return any(abs(distance) > reach.before + reach.after + reach.period for _, distance in pairs)
    middles = {2 * n + distance for n, distance in pairs}
    return bool(middles) and 2 * (max(middles) - min(middles)) < found[0].rows


def _at_period(distances: list[list[tuple[int, ...]]], rows: int, period: int) -> Reach | None:
    count = rows // period
    patterns = [tuple(tuple(d[m * period : (m + 1) * period]) for d in distances) for m in range(count)]
    middle = count // 2
    same = [pattern == patterns[middle] for pattern in patterns]
    front = next((m + 1 for m in reversed(range(middle)) if not same[m]), 0)
    stop = next((m for m in range(middle, count) if not same[m]), count)
    if stop - front < 2:
        return None
    offsets = list(_offsets(patterns[middle]))
    back = rows - stop * period
    before = max([0, front * period, *(-least for least, _ in offsets)])
    after = max([0, back, *(most - period + 1 for _, most in offsets)])
    if before + after + 2 * period > rows:
        return None
    return Reach(before, after, period)


def _offsets(pattern: Sequence[tuple[tuple[int, ...], ...]]) -> Iterator[tuple[int, int]]:
    """Yields the first and the last entry that each row of a block depends on, counted from the block's first entry."""
    for of_input in pattern:
        for i, row in enumerate(of_input):
            if row:
                yield min(row) + i, max(row) + i
