"""The step graph in the making: entries without a time dim, their past, and the operators that lowering writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from co3d_compile.errors import UnsupportedError
from co3d_compile.facts import Kind, fact_of, is_stream
from co3d_compile.graph import fake_mode, shape_of_call
from co3d_compile.layout import BATCH, PLAIN, TIME, Axis, Layout, Place
from co3d_compile.primitive import carry, expand_batch, fifo, previous
from co3d_compile.program import Program, get_constant, module_path, set_constant
from co3d_compile.rules import rule_for

aten = torch.ops.aten

SMALL = 16384  # elements of an entry up to which its past is kept in one tensor instead of one per entry
CONV = [aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]
TRANSPOSED = [aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input]


@dataclass(frozen=True)
class Slot:
    """An entry that is kept in a queue: row ``index`` of ``queue`` (batch, entries, features), viewed as ``shape``."""

    queue: Node
    index: int
    shape: tuple[int, ...]


@dataclass
class Past:
    """A list of entries whose older ones are state: made only when read."""

    low: Lowering
    new: list[Any]
    n: int
    layout: Layout | None = None
    queue: Node | None = None

    def __len__(self) -> int:
        return self.n + len(self.new)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index >= self.n:
            return self.new[index - self.n]
        back = self.n - index
        if self.queue is not None:
            capacity = int(self.queue.args[1])  # type: ignore[arg-type]
            return Slot(self.queue, capacity - back, tuple(self.low.sizes(self.low.resolve(self.new[0]))))
        pulse = len(self.new)
        node = self.low.resolve(self.new[pulse - 1 - (back - 1) % pulse])
        return self.low.before(node, -(-back // pulse), self.layout)


class Lowering:
    """Builds the step graph node by node, and remembers what each node of the clip graph became."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = Graph()
        self.mode = fake_mode(program)
        self.batch = program.inputs[0].shape[0]
        self.streams: dict[Node, Any] = {}
        self.windows: dict[Node, Node] = {}
        self.tuples: dict[Node, list[list[Node]]] = {}
        self.path = ""
        self._known: dict[Any, Node] = {}
        self._constants: dict[Node, str] = {}
        self._capacity: dict[Node, int] = {}
        self._count = 0

    # --- writing nodes

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """An operator on nodes of the new graph; the same call gives the same node, constants are computed."""
        args = tuple(self.resolve(a) if isinstance(a, Slot) else a for a in args)
        key = (target, _hashable(args), _hashable(tuple(sorted(kwargs.items()))))
        if key in self._known:
            return self._known[key]
        operands: list[Node] = []
        map_arg((args, kwargs), operands.append)
        if operands and all(n in self._constants for n in operands):
            node = self._compute(target, args, kwargs)
        else:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["path"] = self.path
            node.meta["val"] = self._shape(target, args, kwargs)
        self._known[key] = node
        return node

    def _shape(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is previous:
            return args[0].meta["val"]
        if target is fifo:
            rows, entries, features = args[0].meta["val"].shape
            return self._empty((rows, entries + args[1], features), args[0].meta["val"].dtype)
        if target is expand_batch:
            shape = list(args[0].meta["val"].shape)
            shape[args[2]] = args[1].meta["val"].shape[args[3]]
            return self._empty(shape, args[0].meta["val"].dtype)
        return shape_of_call(self.mode, target, args, kwargs)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(list(shape), dtype=dtype)

    def constant(self, name: str, value: torch.Tensor) -> Node:
        """A new constant."""
        key = (name, "constant")
        if key in self._known:
            return self._known[key]
        set_constant(self.program.module, name, value)
        node = self.graph.get_attr(name)
        node.meta = {"path": self.path, "val": self.mode.from_tensor(value, static_shapes=True)}
        self._known[key] = node
        self._constants[node] = name
        return node

    def _compute(self, target: Any, args: Any, kwargs: Any) -> Node:
        def value(n: Node) -> torch.Tensor:
            return get_constant(self.program.module, self._constants[n])

        real_args, real_kwargs = map_arg((args, kwargs), value)
        with torch.no_grad():
            result = target(*real_args, **real_kwargs)
        self._count += 1
        return self.constant(f"lowered.constant_{self._count}", result.contiguous())

    def carry(self, like: Node, features: int) -> Node:
        """A state of (batch, features) that a recurrent layer writes itself, through ``meta["next"]``."""
        node = self.graph.call_function(carry, (like, features))
        node.meta = {"path": self.path, "val": self._empty((like.meta["val"].shape[0], features), like.meta["val"].dtype)}
        return node

    # --- reading what clip nodes became

    def pulse(self, node: Node) -> int:
        """How many entries of a tensor there are: its new ones, and past ones where it is a history."""
        return len(self.streams[node]) if node in self.streams else int(fact_of(node).pulse)

    def ref(self, node: Node, i: int) -> Any:
        """Entry ``i``, as a node or a slot of a queue."""
        return self.streams[node][i]

    def entry(self, node: Node, i: int) -> Node:
        """Entry ``i`` of a streaming tensor, as a node."""
        return self.resolve(self.streams[node][i])

    def resolve(self, ref: Any) -> Node:
        """The node of an entry."""
        if isinstance(ref, Slot):
            return self.call(aten.reshape.default, self.call(aten.select.int, ref.queue, 1, ref.index), [-1, *ref.shape[1:]])
        return ref  # type: ignore[no-any-return]

    def items(self, node: Node) -> list[list[Node]]:
        """The entries of each output of an operator that has several."""
        if node not in self.tuples:
            rule: Any = rule_for(node.target)
            self.tuples[node] = rule.lower_items(node, self)
        return self.tuples[node]

    def plain(self, node: Node, slot: tuple[int, int] | None = None) -> Node:
        """A constant, or one slice of it, or the result of a window."""
        if node in self.windows:
            return self.windows[node]
        if node.op != "get_attr":
            raise AssertionError(f"{node.name} is neither constant nor window")
        name = str(node.target)
        value = get_constant(self.program.module, name)
        if slot is None:
            return self.constant(name, value)
        dim, index = slot
        return self.constant(f"{name}_tap_{index}", value.select(dim, index).contiguous())

    def one_of(self, constant: Node, dim: int) -> Node:
        """A constant that is the same along a dim, without that dim."""
        return self.call(aten.select.int, self.plain(constant), dim, 0)

    def sizes(self, node: Node) -> list[int]:
        """The shape of a node of the new graph, at the captured batch."""
        return [int(s) for s in node.meta["val"].shape]

    def features(self, node: Node) -> int:
        """Numbers in one stream's share of a node of the new graph."""
        return prod(self.sizes(node)) // self.batch

    # --- the past

    def capacity(self, marker: Node, n: int) -> None:
        """Notes how far back a tensor is read, so that its readers share one queue."""
        self._capacity[marker] = max(n, self._capacity.get(marker, 0))

    def past(self, new: Sequence[Any], n: int, source: Node | None = None, layout: Layout | None = None) -> Past:
        """The list of ``n`` past and the new entries.

        Small entries with a long past are kept in one queue, others in one state per entry.
        """
        first = self.resolve(new[0])
        capacity = max(n, self._capacity.get(source, 0)) if source is not None else n
        leading = layout is None or _leading(layout)
        if n < 2 or capacity < 4 or self.features(first) > SMALL or not leading:
            return Past(self, list(new), n, layout)
        return Past(self, list(new), n, layout, self.queue([self.resolve(x) for x in new], capacity))

    def before(self, node: Node, steps: int, layout: Layout | None) -> Node:
        """The value of a node so many steps ago. A state has the batch, and nothing else, in its first dim."""
        place = layout.entry().batch if layout is not None else None
        shape = self.sizes(node)
        order = _batch_first(place, len(shape))
        if order is not None:
            node = self.call(aten.permute.default, node, order)
        elif shape[0] != self.batch:
            if place is not None and (place.dim or place.outer != 1):
                raise UnsupportedError("The batch is folded behind other dims where a state is needed.",
                                       module_path=self.path, hint="Keep the batch in front of folded dims.")
            node = self.call(aten.reshape.default, node, [-1, self.features(node)])
        for _ in range(steps):
            node = self.call(previous, node)
        if order is not None:
            return self.call(aten.permute.default, node, [order.index(d) for d in range(len(order))])
        return node if self.sizes(node) == shape else self.call(aten.reshape.default, node, [-1, *shape[1:]])

    def queue(self, new: Sequence[Node], capacity: int) -> Node:
        """A queue (batch, capacity + new entries, features)."""
        return self.call(fifo, self.rows(new), capacity)

    def rows(self, entries: Sequence[Node]) -> Node:
        """Entries as (batch, entries, features)."""
        rows = [self.call(aten.reshape.default, e, [-1, 1, self.features(e)]) for e in entries]
        return rows[0] if len(rows) == 1 else self.call(aten.cat.default, rows, 1)

    def stacked(self, refs: Sequence[Any]) -> Node:
        """Entries as (batch, entries, features); a run in one queue is a slice of it."""
        slots = [r for r in refs if isinstance(r, Slot)]
        if slots and len(refs) > 1:
            run = self._run(refs, slots[0].queue)
            if run is not None:
                start, step = run
                stop = start + step * (len(refs) - 1) + 1
                return self.call(aten.slice.Tensor, slots[0].queue, 1, start, stop, step)
        return self.rows([self.resolve(r) for r in refs])

    def _run(self, refs: Sequence[Any], queue: Node) -> tuple[int, int] | None:
        """Start and step of entries that lie evenly in one queue (the new ones are at its end)."""
        capacity = int(queue.args[1])  # type: ignore[arg-type]
        rows = queue.args[0]
        assert isinstance(rows, Node)
        new = list(rows.args[0]) if rows.target is aten.cat.default else [rows]  # type: ignore[arg-type]
        place: dict[Node, int] = {}
        for i, row in enumerate(new):
            place[row] = capacity + i
        positions = []
        for ref in refs:
            if isinstance(ref, Slot):
                positions.append(ref.index if ref.queue is queue else None)
            else:
                row = self.call(aten.reshape.default, ref, [-1, 1, self.features(ref)])
                positions.append(place.get(row))
        if None in positions:
            return None
        steps = {b - a for a, b in zip(positions, positions[1:], strict=False)}  # type: ignore[operator]
        step = steps.pop()
        return (positions[0], step) if not steps and step > 0 else None  # type: ignore[return-value]

    def as_clip(self, refs: Sequence[Any], layout: Layout) -> Node:
        """Entries as one tensor in which time is an ordinary dim, laid out as in the clip."""
        time = layout.time
        assert time is not None
        length = len(refs)
        target = layout.resize(TIME, length)
        if length == 1 and not time.alone:
            return self.resolve(refs[0])
        if length == 1:
            return self.call(aten.unsqueeze.default, self.resolve(refs[0]), time.dim)
        entry = layout.entry()
        order = _batch_first(entry.batch, entry.rank)
        if order is not None:
            refs = [self.call(aten.permute.default, self.resolve(r), order) for r in refs]
        stacked = self.stacked(refs)
        axes = [a for dim in entry.dims for a in dim]
        source = [Axis(BATCH, 0), Axis(TIME, length), *[a for a in axes if a.label != BATCH]]
        wanted = [a for dim in _split_like(target, entry) for a in dim]
        order, used = [], [False] * len(source)
        for axis in wanted:
            i = next(i for i, a in enumerate(source) if not used[i] and a.label == axis.label
                     and (a.label != PLAIN or a.size == axis.size))
            used[i] = True
            order.append(i)
        view = self.call(aten.reshape.default, stacked, [-1 if a.label == BATCH else a.size for a in source])
        if order != sorted(order):
            view = self.call(aten.permute.default, view, order)
        return self.call(aten.reshape.default, view, target.sizes())

    # --- operators that rules share

    def sum(self, parts: Sequence[Node]) -> Node:
        """The sum of tensors."""
        total = parts[0]
        for part in parts[1:]:
            total = self.call(aten.add.Tensor, total, part)
        return total

    def stack(self, parts: Sequence[Node]) -> Node:
        """Tensors along a new first dim."""
        rows = [self.call(aten.unsqueeze.default, p, 0) for p in parts]
        return rows[0] if len(rows) == 1 else self.call(aten.cat.default, rows, 0)

    def reduce_entries(self, refs: Sequence[Any], kind: str) -> Node:
        """Mean, sum, maximum or minimum over entries."""
        if len(refs) == 1:
            return self.resolve(refs[0])
        if len(refs) > 4:
            rows = self.stacked(refs)
            target = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "amax": aten.amax.default}.get(kind, aten.amin.default)
            reduced = self.call(target, rows, [1], False)
            return self.call(aten.reshape.default, reduced, [-1, *self.sizes(self.resolve(refs[-1]))[1:]])
        nodes = [self.resolve(r) for r in refs]
        if kind in ("mean", "sum"):
            total = self.sum(nodes)
            return self.call(aten.mul.Tensor, total, 1.0 / len(nodes)) if kind == "mean" else total
        total = nodes[0]
        for node in nodes[1:]:
            total = self.call(aten.maximum.default if kind == "amax" else aten.minimum.default, total, node)
        return total

    def convolution(
        self, entries: list[Node], taps: list[Node], bias: Node | None,
        stride: list[int], padding: list[int], dilation: list[int], groups: int,
    ) -> Node:
        """One output entry of a continual convolution: over space alone, one tap per entry.

        A depthwise or grouped kernel is a sum of its taps; a dense one is one convolution over the channels of all.
        """
        if len(entries) > 1 and groups == 1 and all(self.sizes(e)[2:] == self.sizes(entries[0])[2:] for e in entries):
            x = self.call(aten.cat.default, entries, 1)
            return self._convolve(x, self.call(aten.cat.default, taps, 1), bias, stride, padding, dilation, groups)
        total: Node | None = None
        for x, tap in zip(entries, taps, strict=True):
            part = self._convolve(x, tap, bias if total is None else None, stride, padding, dilation, groups)
            total = part if total is None else self.call(aten.add.Tensor, total, part)
        assert total is not None
        return total

    def _convolve(self, x: Node, weight: Node, bias: Node | None, stride: list[int], padding: list[int],
                  dilation: list[int], groups: int) -> Node:
        if stride:
            return self.call(CONV[len(stride)], x, weight, bias, stride, padding, dilation, groups)
        if groups == 1:
            return self.call(aten.linear.default, x, weight, bias)
        one = [self.call(aten.unsqueeze.default, t, 2) for t in (x, weight)]
        return self.call(aten.squeeze.dim, self.call(aten.conv1d.default, *one, bias, [1], [0], [1], groups), 2)

    def transposed(self, x: Node, tap: Node, geometry: list[list[int]], groups: int) -> Node:
        """One tap of a transposed convolution, over space alone."""
        stride, padding, output_padding, dilation = geometry
        if stride:
            return self.call(TRANSPOSED[len(stride) - 1], x, tap, None, stride, padding, output_padding, groups, dilation)
        one = [self.call(aten.unsqueeze.default, t, 2) for t in (x, tap)]
        return self.call(aten.squeeze.dim, self.call(TRANSPOSED[0], *one, None, [1], [0], [0], groups, [1]), 2)

    def zeros_like(self, x: Node) -> Node:
        """Zeros in the shape of one entry."""
        value = torch.zeros([1, *self.sizes(x)[1:]], dtype=x.meta["val"].dtype)
        return self.with_batch_of(self.constant(f"zeros_{'x'.join(map(str, value.shape[1:]))}", value), x)

    def add_bias(self, x: Node, bias: Node | None, space: int) -> Node:
        """Adds a bias per channel."""
        if bias is None:
            return x
        return self.call(aten.add.Tensor, x, self.call(aten.reshape.default, bias, [-1] + [1] * space))

    def with_dims(self, node: Node, x: Node, dims: list[int], keep: bool) -> Node:
        """A reduction over other dims of one entry."""
        if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim):
            return self.call(node.target, x, node.args[1], dims, keep)
        if node.target in (aten.var.correction, aten.std.correction):
            return self.call(node.target, x, dims, correction=node.kwargs.get("correction", 1), keepdim=keep)
        if isinstance(node.args[1], int):
            return self.call(node.target, x, dims[0], keep)
        return self.call(node.target, x, dims, keep, *node.args[3:], **node.kwargs)

    def with_time_of_one(self, node: Node, i: int) -> Node:
        """The operator as it stands on entries ``i`` of its operands, given a time dim of one."""

        def operand(n: Node) -> Node:
            if not is_stream(n):
                return self.plain(n)
            place = fact_of(n).layout.time  # type: ignore[union-attr]
            x = self.entry(n, i)
            return self.call(aten.unsqueeze.default, x, place.dim) if place is not None and place.alone else x

        args, kwargs = map_arg((node.args, node.kwargs), operand)
        result = self.call(node.target, *args, **kwargs)
        layout = fact_of(node).layout
        place = layout.time if layout is not None else None
        return self.call(aten.squeeze.dim, result, place.dim) if place is not None and place.alone else result

    def with_batch_of(self, x: Node, like: Node, x_dim: int = 0, like_dim: int = 0) -> Node:
        """A constant of batch one, expanded to the batch of another tensor."""
        if x not in self._constants or self.sizes(x)[x_dim] != 1:
            return x
        return self.call(expand_batch, x, like, x_dim, like_dim)

    def same(self, node: Node) -> Node:
        """The operator as it stands in the clip."""
        args, kwargs = map_arg((node.args, node.kwargs), self.plain)
        return self.call(node.target, *args, **kwargs)

    def resized(self, node: Node) -> Node:
        """A view or expansion with the window's own length, and any batch."""
        fact = fact_of(node)
        if fact.layout is None or node.target not in VIEWS:
            return self.same(node)
        layout = fact.layout
        if layout.time is not None and fact.length != fact.clip:
            layout = layout.resize(TIME, fact.length)
        return self.call(node.target, self.plain(node.args[0]), layout.sizes())  # type: ignore[arg-type]


VIEWS = {aten.reshape.default, aten.expand.default}


def _batch_first(place: Place | None, rank: int) -> list[int] | None:
    """The permutation that brings the batch's dim to the front, if it is not there."""
    if place is None or not place.alone or not place.dim:
        return None
    return [place.dim, *(d for d in range(rank) if d != place.dim)]


def _leading(layout: Layout) -> bool:
    place = layout.entry().batch
    return place is not None and place.dim == 0 and place.outer == 1


def _split_like(target: Layout, entry: Layout) -> list[tuple[Axis, ...]]:
    """The dims of ``target`` with plain axes as they are in ``entry`` (a layout merges neighbours)."""
    pieces = [a for dim in entry.dims for a in dim if not a.label]
    result = []
    for dim in target.dims:
        axes: list[Axis] = []
        for axis in dim:
            if axis.label:
                axes.append(axis)
                continue
            rest = axis.size
            while rest > 1:
                piece = pieces.pop(0)
                axes.append(piece)
                rest //= piece.size
        result.append(tuple(axes))
    return result


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, slice):
        return (value.start, value.stop, value.step)
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


__all__ = ["Kind", "Lowering", "Past", "Slot", "module_path"]
