"""The operators that lowering writes for several families: sums, reductions over entries, transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import TRANSPOSED_CONVOLUTIONS
from co3d_compile.ir.layout import Layout, Place
from co3d_compile.ir.markers import previous
from co3d_compile.ir.node_reading import operand, whole
from co3d_compile.ir.program import Program
from co3d_compile.step_graph.builder import Builder, Entry, Slot

aten = torch.ops.aten


class EntryOperators(Builder):
    """Operators on entries: time is not among their dims.

    Attributes:
        streams: The entries that each streaming node of the clip graph became.
        queued: The new entries that each queue has at its end.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.streams: dict[Node, Sequence[Entry]] = {}
        self.queued: dict[Node, Sequence[Node]] = {}

    def before(
        self,
        node: Node,
        steps: int,
        layout: Layout | None,
        initial: float = 0.0,
        fix: Callable[[int, Node], Node] | None = None,
    ) -> Node:
        """The value of a node so many steps ago.

        ``initial``, or what ``fix`` makes of it, where a stream begins.
        """
        node, restore = self.batch_first(node, layout)
        for t in range(1, steps + 1):
            node = self.call(previous, node, initial)
            node = fix(t, node) if fix is not None else node
        return restore(node)

    def batch_first(self, node: Node, layout: Layout | None) -> tuple[Node, Callable[[Node], Node]]:
        """Writes an entry as states have it, the batch and nothing else in its first dim; also gives the way back."""
        place = layout.entry().batch if layout is not None else None
        shape = self.sizes(node)
        order = _batch_first(place, len(shape))
        if order is not None:
            node = self.call(aten.permute.default, node, order)
        elif place is not None and (place.dim or place.outer != 1):
            return self._apart(node, place)
        elif shape[:1] != [self.batch]:
            node = self.call(aten.reshape.default, node, [-1, self.features(node)])

        def restore(x: Node) -> Node:
            if order is not None:
                return self.call(aten.permute.default, x, [order.index(d) for d in range(len(order))])
            return x if self.sizes(x) == shape else self.call(aten.reshape.default, x, [-1, *shape[1:]][: len(shape)])

        return node, restore

    def _apart(self, node: Node, place: Place) -> tuple[Node, Callable[[Node], Node]]:
        """Does :meth:`batch_first` with an entry whose batch is folded behind other factors of a dim.

        (batch, features).
        """
        shape = self.sizes(node)
        before, behind = shape[: place.dim], shape[place.dim + 1 :]
        order = [len(before) + 1, *range(len(before) + 1), *range(len(before) + 2, len(shape) + 2)]
        split = self.call(aten.reshape.default, node, [*before, place.outer, -1, place.inner, *behind])
        first = self.call(aten.permute.default, split, order)

        def restore(x: Node) -> Node:
            x = self.call(aten.reshape.default, x, [-1, *before, place.outer, place.inner, *behind])
            x = self.call(aten.permute.default, x, [order.index(d) for d in range(len(order))])
            return self.call(aten.reshape.default, x, [*before, -1, *behind])

        return self.call(aten.reshape.default, first, [-1, self.features(node)]), restore

    def rows(self, entries: Sequence[Node]) -> Node:
        """Writes the entries as (batch, entries, features)."""
        part = self._selected(entries)
        if part is not None:
            x, dim = part
            order = [0, dim, *(d for d in range(1, len(self.sizes(x))) if d != dim)]
            x = self.call(aten.permute.default, x, order) if dim > 1 else x
            return self.call(aten.reshape.default, x, [-1, len(entries), self.features(entries[0])])
        rows = [self.call(aten.reshape.default, e, [-1, 1, self.features(e)]) for e in entries]
        return rows[0] if len(rows) == 1 else self.call(aten.cat.default, rows, 1)

    def _selected(self, entries: Sequence[Node]) -> tuple[Node, int] | None:
        """Finds the part of a tensor that entries are, and in which dim: selected one after the other from it."""
        if len(entries) == 1 or any(e.target is not aten.select.int or e.args[1] == 0 for e in entries):
            return None
        x, dim, first = operand(entries[0]), whole(entries[0], 1), whole(entries[0], 2)
        if any(e.args != (x, dim, first + i) for i, e in enumerate(entries)):
            return None
        return self.places(x, dim, first, len(entries)), dim

    def places(self, x: Node, dim: int, start: int, count: int, step: int = 1) -> Node:
        """Takes some places of a dim, from ``start`` on each ``step``-th."""
        if (start, step, count) == (0, 1, self.sizes(x)[dim]):
            return x
        return self.call(aten.slice.Tensor, x, dim, start, start + step * (count - 1) + 1, step)

    def stacked(self, refs: Sequence[Entry]) -> Node:
        """Stacks the entries as (batch, entries, features); a run in one queue is a slice of it."""
        run = self._run(refs)
        return run if run is not None else self.rows([self.resolve(r) for r in refs])

    def joined(self, refs: Sequence[Entry]) -> Node:
        """Joins the entries side by side in dim 1; a run in one queue is a slice of it."""
        entries = [self.resolve(r) for r in refs]
        shape, features = self.sizes(entries[0]), self.features(entries[0])
        if features == prod(shape[1:]):
            run = self._run(refs)
            rows = self.rows(entries) if run is None and self._selected(entries) is not None else run
            if rows is not None:
                return self.call(aten.reshape.default, rows, [-1, len(refs) * shape[1], *shape[2:]])
        return self.call(aten.cat.default, entries, 1)

    def _run(self, refs: Sequence[Entry]) -> Node | None:
        """Takes entries that lie evenly in one queue as (batch, entries, features); the new ones are at its end."""
        queue = next((r.queue for r in refs if isinstance(r, Slot)), None)
        if queue is None or len(refs) == 1:
            return None
        at_end: dict[Entry, int] = {entry: whole(queue, 1) + i for i, entry in enumerate(self.queued[queue])}
        at = [r.index if isinstance(r, Slot) and r.queue is queue else at_end.get(r, -1) for r in refs]
        step = at[1] - at[0]
        if -1 in at or step < 1 or at != list(range(at[0], at[-1] + 1, step)):
            return None
        return self.places(queue, 1, at[0], len(at), step)

    def beside_rows(self, x: Node, batch: Place | None) -> Node:
        """Repeats what each stream has of its own, (batch, features), for each row folded into the batch's dim."""
        if batch is None or batch.outer * batch.inner == 1:
            return x
        features = self.features(x)
        rows = self.call(aten.reshape.default, x, [1, -1, 1, features])
        rows = self.call(aten.expand.default, rows, [batch.outer, -1, batch.inner, features])
        return self.call(aten.reshape.default, rows, [-1, features])

    def from_rows(self, x: Node, batch: Place, dim: int, by: Node, rows: Sequence[int]) -> Node:
        """Takes the rows of a dim, which lie ``by`` (batch, 1) farther on for each stream.

        Beyond an end the last one.
        """
        sizes, batch_dim, by = self.sizes(x), batch.dim, self.beside_rows(by, batch)
        index = self.call(aten.add.Tensor, by, self.new_constant(torch.tensor(list(rows)).view(1, -1)))
        index = self.call(aten.clamp.default, index, 0, sizes[dim] - 1)
        index = self.call(aten.reshape.default, index, [-1, len(rows)])
        index = index if batch_dim < dim else self.call(aten.permute.default, index, [1, 0])
        shape = [-1 if d == batch_dim else len(rows) if d == dim else 1 for d in range(len(sizes))]
        whole = [-1 if d == batch_dim else len(rows) if d == dim else size for d, size in enumerate(sizes)]
        index = self.call(aten.expand.default, self.call(aten.reshape.default, index, shape), whole)
        return self.call(aten.gather.default, x, dim, index)

    def sum(self, parts: Sequence[Node]) -> Node:
        """Adds tensors."""
        total = parts[0]
        for part in parts[1:]:
            total = self.call(aten.add.Tensor, total, part)
        return total

    def minus(self, x: Node, y: Node) -> Node:
        """Subtracts a tensor from another one."""
        return self.call(aten.sub.Tensor, x, y)

    def stack(self, parts: Sequence[Node]) -> Node:
        """Stacks tensors along a new first dim."""
        rows = [self.call(aten.unsqueeze.default, p, 0) for p in parts]
        return rows[0] if len(rows) == 1 else self.call(aten.cat.default, rows, 0)

    def reduce_entries(self, refs: Sequence[Entry], kind: str) -> Node:
        """Computes the mean, sum, maximum or minimum over entries."""
        if len(refs) == 1:
            return self.resolve(refs[0])
        if len(refs) > 4:
            target = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "amax": aten.amax.default}.get(
                kind, aten.amin.default
            )
            part = self._selected([self.resolve(r) for r in refs])
            if part is not None:
                return self.call(target, part[0], [part[1]], False)
            reduced = self.call(target, self.stacked(refs), [1], False)
            return self.call(aten.reshape.default, reduced, [-1, *self.sizes(self.resolve(refs[-1]))[1:]])
        nodes = [self.resolve(r) for r in refs]
        if kind in ("mean", "sum"):
            total = self.sum(nodes)
            return self.call(aten.mul.Tensor, total, 1.0 / len(nodes)) if kind == "mean" else total
        total = nodes[0]
        for node in nodes[1:]:
            total = self.call(aten.maximum.default if kind == "amax" else aten.minimum.default, total, node)
        return total

    def transposed(self, x: Node, tap: Node, geometry: list[list[int]], groups: int) -> Node:
        """Writes one tap of a transposed convolution, over space alone."""
        stride, padding, output_padding, dilation = geometry
        if stride:
            target = TRANSPOSED_CONVOLUTIONS[len(stride) - 1]
            return self.call(target, x, tap, None, stride, padding, output_padding, groups, dilation)
        x, tap = (self.call(aten.unsqueeze.default, t, 2) for t in (x, tap))
        result = self.call(TRANSPOSED_CONVOLUTIONS[0], x, tap, None, [1], [0], [0], groups, [1])
        return self.call(aten.squeeze.dim, result, 2)

    def zeros_like(self, x: Node) -> Node:
        """Makes zeros in the shape of one entry."""
        value = torch.zeros([1, *self.sizes(x)[1:]], dtype=x.meta["val"].dtype)
        return self.with_batch_of(self.constant(f"zeros_{'x'.join(map(str, value.shape[1:]))}", value), x)

    def add_bias(self, x: Node, bias: Node | None, space: int) -> Node:
        """Adds a bias per channel."""
        if bias is None:
            return x
        return self.call(aten.add.Tensor, x, self.call(aten.reshape.default, bias, [-1] + [1] * space))


def _batch_first(place: Place | None, rank: int) -> list[int] | None:
    """Finds the permutation that brings the batch's dim to the front, if it is not there."""
    if place is None or not place.alone or not place.dim:
        return None
    return [place.dim, *(d for d in range(rank) if d != place.dim)]
