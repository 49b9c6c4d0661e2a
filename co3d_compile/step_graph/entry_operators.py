"""The operators that lowering writes for several families: sums, reductions over entries, transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import prod

import torch
from torch.fx import Node
from torch.fx.node import Argument, Target

from co3d_compile.ir.aten_operators import TRANSPOSED_CONVOLUTIONS, is_pointwise
from co3d_compile.ir.layout import Layout, Place
from co3d_compile.ir.markers import fifo, previous
from co3d_compile.ir.node_reading import Kwargs, operand, whole, whole_list
from co3d_compile.ir.program import Program
from co3d_compile.step_graph.builder import Builder, Entry, Slot

aten = torch.ops.aten


MANY = 4  # entries of a step from which on they are computed together, where time can be a dim of a small tensor


class EntryOperators(Builder):
    """Operators on entries: time is not among their dims.

    Attributes:
        streams: The entries that each streaming node of the clip graph became.
        queued: The new entries that each queue has at its end.
        together: Results in which several entries of a step lie.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.streams: dict[Node, Sequence[Entry]] = {}
        self.queued: dict[Node, Sequence[Node]] = {}
        self.together: set[Node] = set()
        self._constants_of: dict[Hashable, set[tuple[Node, ...]]] = {}

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

    def call(self, target: Target, *args: Argument | Slot, **kwargs: Argument) -> Node:
        """Writes an operator on nodes; a pointwise one, or a view, is written once for all entries of a tensor."""
        together = None
        if is_pointwise(target):
            together = self._together(target, args, kwargs)
        elif target is aten.reshape.default and isinstance(args[0], Node) and not isinstance(args[1], Slot):
            together = self._viewed_together(args[0], whole_list(args[1]))
        return super().call(target, *args, **kwargs) if together is None else together

    def _together(self, target: Target, args: Sequence[Argument | Slot], kwargs: Kwargs) -> Node | None:
        """Writes the operator on the whole tensors that its operands were selected from, and takes one entry of it.

        None where they were not, or where few entries lie in them.
        """
        operands = [self.resolve(a) if isinstance(a, Slot) else a for a in args]
        lanes = [a for a in operands if isinstance(a, Node) and a.target is aten.select.int and a.args[1]]
        others = [a for a in operands if isinstance(a, Node) and a not in lanes]
        own = [a for a in lanes if operand(a).target is not fifo]  # of a queue it would be computed again
        if not own or not all(map(self.is_constant, others)) or any(isinstance(a, Node) for a in kwargs.values()):
            return None
        beside = self._constants_of.setdefault((target, *map(operand, lanes)), set())
        beside.add(tuple(others))
        if len(beside) > 2:  # constants of single entries: each would be computed with all
            return None
        count, like = min(((self.sizes(operand(a))[whole(a, 1)], a) for a in own), key=lambda found: found[0])
        dim, rank = whole(like, 1), len(self.sizes(like))
        if count < MANY or rank > 3 or any(len(self.sizes(a)) != rank for a in lanes):
            return None
        whole_operands = [self._all_places(a, like, count, rank - dim) if isinstance(a, Node) else a for a in operands]
        if any(a is None and b is not None for a, b in zip(whole_operands, operands, strict=True)):
            return None
        return self.entries_of(super().call(target, *whole_operands, **kwargs), dim, [whole(like, 2)])[0]

    def _viewed_together(self, entry: Node, shape: Sequence[int]) -> Node | None:
        """Views the whole tensor that an entry was selected from, and takes the entry of that; None where it cannot."""
        if entry.target is not aten.select.int or operand(entry).target is fifo or list(shape[:1]) != [-1]:
            return None
        x, dim, place = operand(entry), whole(entry, 1), whole(entry, 2)
        sizes, count = self.sizes(entry), self.sizes(operand(entry))[dim]
        if dim == 0 or sizes[0] != self.batch or count < MANY or max(len(sizes), len(shape)) > 3:
            return None
        before, behind = prod(sizes[1:dim]), prod(sizes[dim:])
        cuts = (k for k in range(1, len(shape) + 1) if (prod(shape[1:k]), prod(shape[k:])) == (before, behind))
        k = next(cuts, None)
        if k is None:
            return None
        viewed = super().call(aten.reshape.default, x, [-1, *shape[1:k], count, *shape[k:]])
        return self.entries_of(viewed, k, [place])[0]

    def entries_of(self, x: Node, dim: int, places: Iterable[int]) -> list[Node]:
        """Lists entries of a step that were computed together, from their places in a dim of the result."""
        self.together.add(x)
        return [self.call(aten.select.int, x, dim, i) for i in places]

    def _all_places(self, x: Node, like: Node, count: int, behind: int) -> Node | None:
        """Finds an operand of all entries beside each other, its own at the place of the entry ``like``."""
        if self.is_constant(x):
            rank = len(self.sizes(x))
            return x if rank <= behind else self.call(aten.unsqueeze.default, x, rank - behind)
        source, dim, to = operand(x), whole(x, 1), whole(like, 1)
        first = whole(x, 2) - whole(like, 2)
        if first < 0 or first + count > self.sizes(source)[dim]:
            return None
        part = self.places(source, dim, first, count)
        order = [d for d in range(len(self.sizes(source))) if d != dim]
        return part if dim == to else self.call(aten.permute.default, part, [*order[:to], dim, *order[to:]])

    def is_vector(self, entry: Node) -> bool:
        """Says whether an entry is (batch, features): numbers of one stream in each row."""
        return len(self.sizes(entry)) == 2 and self.features(entry) == self.sizes(entry)[1]

    def rows(self, entries: Sequence[Node]) -> Node:
        """Lays the entries side by side as (batch, entries, features)."""
        rows = [self._rows_of_run(run) for run in _runs([self._as_selected(e) for e in entries])]
        return rows[0] if len(rows) == 1 else self.call(aten.cat.default, rows, 1)

    def _rows_of_run(self, run: Sequence[Node]) -> Node:
        if len(run) == 1:
            return self.call(aten.reshape.default, run[0], [-1, 1, self.features(run[0])])
        x, dim = self._part(run)
        rows, *rest = self.sizes(x)
        if rows != self.batch:  # several for each stream, which belong to its features
            x, dim = self.call(aten.reshape.default, x, [-1, rows // self.batch, *rest]), dim + 1
        order = [0, dim, *(d for d in range(1, len(self.sizes(x))) if d != dim)]
        x = self.call(aten.permute.default, x, order) if dim > 1 else x
        return self.call(aten.reshape.default, x, [-1, len(run), self.features(run[0])])

    def _as_selected(self, entry: Node) -> Node:
        """Looks through views of an entry that keep the order of its numbers."""
        while entry.target is aten.reshape.default and self.features(operand(entry)) == self.features(entry):
            entry = operand(entry)
        return entry

    def _part(self, run: Sequence[Node]) -> tuple[Node, int]:
        """Takes the part of a tensor that a run was selected from, and says in which dim it lies."""
        x, dim, first = operand(run[0]), whole(run[0], 1), whole(run[0], 2)
        return self.places(x, dim, first, len(run)), dim

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
        first = self.resolve(refs[0])
        shape, rows = self.sizes(first), None
        if self.features(first) == prod(shape[1:]):
            rows = self._run(refs)
            if rows is None and len(_runs([self.resolve(r) for r in refs])) == 1 < len(refs):
                rows = self.stacked(refs)
        if rows is None:
            return self.call(aten.cat.default, [self.resolve(r) for r in refs], 1)
        return self.call(aten.reshape.default, rows, [-1, len(refs) * shape[1], *shape[2:]])

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
            past = any(isinstance(r, Slot) for r in refs)  # a slice of a queue: one by one they are thousands of sound
            runs = [] if past else _runs([self.resolve(r) for r in refs])
            if len(runs) == 1:
                x, dim = self._part(runs[0])
                return self.call(target, x, [dim], False)
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


def _runs(entries: Sequence[Node]) -> list[list[Node]]:
    """Groups entries that were selected one after the other from one tensor of four dims at most, behind its batch."""
    runs: list[list[Node]] = []
    for entry in entries:
        last = runs[-1][-1] if runs else entry
        selected = last.target is aten.select.int and last.args[1] != 0 and last.meta["val"].dim() < 4
        args = (*last.args[:2], whole(last, 2) + 1) if selected else ()
        if runs and entry.target is aten.select.int and entry.args == args:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
