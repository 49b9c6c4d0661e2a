"""Where batch and time are inside a tensor: every dim is an ordered product of named factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod

BATCH = "N"
TIME = "T"
PLAIN = ""


class LayoutLost(Exception):
    """A view splits or tears the batch or time factor: nothing can be said about the result."""


@dataclass(frozen=True)
class Axis:
    """One factor of a dim: ``label`` is ``"N"``, ``"T"`` or ``""``; ``size`` is its size in the captured clip."""

    label: str
    size: int


@dataclass(frozen=True)
class Place:
    """Where a labelled axis is: its dim, and the product of the factors before and after it inside that dim."""

    dim: int
    outer: int
    inner: int
    size: int
    alone: bool


@dataclass(frozen=True)
class Layout:
    """The dims of a tensor in the captured clip, each a tuple of axes in row-major order."""

    dims: tuple[tuple[Axis, ...], ...]

    @staticmethod
    def plain(shape: Iterable[int]) -> Layout:
        """Makes a layout without batch or time."""
        return Layout(tuple(_tidy([Axis(PLAIN, int(s))]) for s in shape))

    @staticmethod
    def of(shape: Sequence[int], batch: int | None = 0, time: int | None = None) -> Layout:
        """Makes the layout of a model input: ``batch`` and ``time`` name whole dims."""
        labels = {batch: BATCH, time: TIME}
        return Layout(tuple(_tidy([Axis(labels.get(d, PLAIN), int(s))]) for d, s in enumerate(shape)))

    @property
    def rank(self) -> int:
        return len(self.dims)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(a.size for a in dim) for dim in self.dims)

    def find(self, label: str) -> Place | None:
        """Finds the place of a labelled axis, or None."""
        for d, dim in enumerate(self.dims):
            for i, axis in enumerate(dim):
                if axis.label == label:
                    outer = prod(a.size for a in dim[:i])
                    inner = prod(a.size for a in dim[i + 1 :])
                    return Place(d, outer, inner, axis.size, len(dim) == 1)
        return None

    @cached_property
    def time(self) -> Place | None:
        return self.find(TIME)

    @cached_property
    def batch(self) -> Place | None:
        return self.find(BATCH)

    def has(self, label: str, dim: int) -> bool:
        """Says whether a dim contains the labelled axis."""
        return any(a.label == label for a in self.dims[dim % self.rank])

    def resize(self, label: str, size: int) -> Layout:
        """Gives the labelled axis another size."""
        return Layout(tuple(tuple(Axis(a.label, size) if a.label == label else a for a in d) for d in self.dims))

    def without(self, label: str) -> Layout:
        """Makes a labelled axis plain or, where its size is one, forgets it."""
        return Layout(tuple(_tidy([Axis(PLAIN, a.size) if a.label == label else a for a in d]) for d in self.dims))

    def replace(self, dim: int, axes: Iterable[Axis]) -> Layout:
        dims = list(self.dims)
        dims[dim] = _tidy(list(axes))
        return Layout(tuple(dims))

    def resize_dim(self, dim: int, size: int) -> Layout:
        """Gives a dim another size; its label is kept."""
        label = next((a.label for a in self.dims[dim] if a.label), PLAIN)
        return self.replace(dim, [Axis(label, size)])

    def sized(self, shape: Sequence[int], dims: Iterable[int]) -> Layout:
        """Gives some dims the sizes that they have in a shape; their labels are kept."""
        changed = [d for d in dims if self.shape[d] != shape[d]]
        return reduce(lambda layout, d: layout.resize_dim(d, shape[d]), changed, self)

    def permute(self, order: Sequence[int]) -> Layout:
        return Layout(tuple(self.dims[d] for d in order))

    def insert(self, dim: int, axes: tuple[Axis, ...] = ()) -> Layout:
        return Layout((*self.dims[:dim], _tidy(list(axes)), *self.dims[dim:]))

    def remove(self, dims: Iterable[int]) -> Layout:
        """Drops dims; a batch or time axis of size one among them moves to the front (it belongs to each entry)."""
        gone = {d % self.rank for d in dims}
        floating = [a for d in sorted(gone) for a in self.dims[d] if a.label]
        if any(a.size != 1 for a in floating):
            raise LayoutLost
        kept = [dim for d, dim in enumerate(self.dims) if d not in gone]
        if floating:
            if not kept:
                return Layout(())
            kept[0] = (*[a for a in kept[0] if a.label], *floating, *[a for a in kept[0] if not a.label])
        return Layout(tuple(kept))

    def view(self, shape: Sequence[int]) -> Layout:
        """Finds the layout after a row-major view to ``shape``.

        Raises:
            LayoutLost: A labelled axis would be torn apart.
        """
        queue = [a for dim in self.dims for a in dim]
        floating: list[Axis] = []
        dims = [_take(queue, int(size), floating) for size in shape]
        if any(not a.label and a.size != 1 for a in queue):
            raise LayoutLost
        for axis in [
            *floating,
            *queue,
        ]:  # of size one, without a dim of their own: they belong to each row of the batch
            if axis.label and dims:
                dims[0].append(axis)
        return Layout(tuple(_tidy(d) for d in dims)).as_clip()

    def as_clip(self) -> Layout:
        """Puts a single clip's batch into the free dim in front: ``x[0]`` became ``x[0][None]``."""
        batch = self.batch
        if batch is None or batch.size != 1 or batch.alone or not self.dims or self.dims[0]:
            return self
        first, *others = self.dims[batch.dim]
        frames = next((a.size for a in others[:1] if a.label == TIME), 0) if first.label == BATCH else 0
        if frames == 1 or (frames and batch.dim != 1):
            return self  # the batch is where it was: a single entry rides on it, or frames were folded into it
        return self.without(BATCH).replace(0, [Axis(BATCH, 1)])

    def entry_dims(self) -> list[int | None]:
        """Says for each dim its index in one entry (time removed): None for the dim that was time alone."""
        time = self.time
        result: list[int | None] = []
        for d in range(self.rank):
            if time is not None and time.alone and d == time.dim:
                result.append(None)
            else:
                result.append(d - (1 if time is not None and time.alone and d > time.dim else 0))
        return result

    def entry(self) -> Layout:
        """Takes time out of the layout: its dim is dropped where time was alone in it."""
        time = self.time
        if time is None:
            return self
        dims = [tuple(a for a in d if a.label != TIME) for d in self.dims]
        if time.alone:
            del dims[time.dim]
        return Layout(tuple(dims))

    def sizes(self, batch: int = -1) -> list[int]:
        """Lists the sizes to write into a view: the batch's dim as ``batch`` (-1), the others as they are.

        A table of clips by clips has two such dims: it is of as many as were captured.
        """
        rows = [d for d in range(self.rank) if self.has(BATCH, d)]
        return [batch if [d] == rows else s for d, s in enumerate(self.shape)]

    def __str__(self) -> str:
        return "(" + ", ".join("·".join(f"{a.label}{a.size}" for a in d) or "1" for d in self.dims) + ")"


def _take(queue: list[Axis], size: int, floating: list[Axis]) -> list[Axis]:
    """Takes axes off the front of ``queue`` until their product is ``size``; splits a plain axis where needed.

    A single entry of time that would be swallowed by a larger dim is put into ``floating`` instead.
    """
    taken: list[Axis] = []
    rest = size
    while queue:
        axis = queue[0]
        if axis.size == 1 and axis.label == TIME and size != 1 and rest != 1:
            floating.append(queue.pop(0))
        elif axis.size == 1:
            if size == 1 and taken:
                break
            if rest == 1 and size != 1:
                break
            taken.append(queue.pop(0))
        elif rest == 1:
            break
        elif rest % axis.size == 0:
            taken.append(queue.pop(0))
            rest //= axis.size
        elif not axis.label and axis.size % rest == 0:
            taken.append(Axis(PLAIN, rest))
            queue[0] = Axis(PLAIN, axis.size // rest)
            rest = 1
        else:
            raise LayoutLost
    if rest != 1:
        raise LayoutLost
    return taken


def _tidy(axes: list[Axis]) -> tuple[Axis, ...]:
    """Drops plain axes of size one and merges plain neighbours."""
    result: list[Axis] = []
    for axis in axes:
        if not axis.label and axis.size == 1:
            continue
        if result and not axis.label and not result[-1].label:
            result[-1] = Axis(PLAIN, result[-1].size * axis.size)
        else:
            result.append(axis)
    return tuple(result)
