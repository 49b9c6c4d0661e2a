"""Operators that compute each element by itself: all share one rule."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.ir.index_equation import NO_COPIES
from co3d_compile.ir.layout import BATCH, TIME, Axis, Layout
from co3d_compile.ir.node_reading import operands, rank_of, shape_of
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, Uneven, combine, constant_of, fact_of, is_stream, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


def broadcast(layouts: list[Layout]) -> Layout:
    """Broadcasts the layouts of operands against each other.

    Raises:
        NoExtension: Time stands in two different dims, or entries in blocks of different sizes.
    """
    rank = max(layout.rank for layout in layouts)
    dims: list[tuple[Axis, ...]] = []
    for right in range(rank, 0, -1):
        options = [layout.dims[layout.rank - right] for layout in layouts if layout.rank >= right]
        if len({_blocks(axes) for axes in options} - {None}) > 1:
            raise Uneven
        dims.append(max(options, key=_weight))
    return with_time_once(Layout(tuple(dims)), "time stands in two different dims")


def with_time_once(layout: Layout, why: str) -> Layout:
    """Leaves time in one dim: a single entry that rides on the batch gives way to the real time dim.

    So does a batch of one, which PyTorch may fold into any dim, to one in another dim.

    Raises:
        NoExtension: Time stands in two dims, which is said as ``why``, or the batch does.
    """
    batches = [d for d in range(layout.rank) if Axis(BATCH, 1) in layout.dims[d]]
    if len(batches) > 1:
        kept = next((d for d in batches if not layout.has(TIME, d)), batches[0])
        for d in set(batches) - {kept}:
            layout = layout.replace(d, [a for a in layout.dims[d] if a.label != BATCH])
    if sum(layout.has(BATCH, d) for d in range(layout.rank)) > 1:
        raise NoExtension("each clip of a batch meets each other one")
    places = [d for d in range(layout.rank) if layout.has(TIME, d)]
    if len(places) > 1:
        single = [d for d in places if Axis(TIME, 1) in layout.dims[d] and len(layout.dims[d]) > 1]
        if len(places) - len(single) != 1:
            raise NoExtension(why)
        for d in single:
            layout = layout.replace(d, [a for a in layout.dims[d] if a.label != TIME])
    return layout


def _blocks(axes: tuple[Axis, ...]) -> tuple[int, int] | None:
    """Counts how often a dim goes through time, and how many places an entry has in it; None for one entry."""
    place = Layout((axes,)).time
    return (place.outer, place.inner) if place is not None and place.size > 1 else None


def _weight(axes: tuple[Axis, ...]) -> tuple[bool, int, int]:
    size = prod(axis.size for axis in axes)
    return (any(a.label == TIME for a in axes) and size > 1, size, sum(bool(a.label) for a in axes))


class Pointwise(Rule):
    """y[n] = f(a[n], b[n], …): operands are combined at equal index, broadcast over the other dims."""

    def layout(self, node: Node) -> Layout:
        layouts = [known(n) for n in operands(node) if fact_of(n).kind is not Kind.STATIC]
        statics = [Layout.plain(shape_of(n)) for n in operands(node) if fact_of(n).kind is Kind.STATIC]
        return broadcast([*layouts, *statics])

    def flow(self, node: Node) -> Fact:
        layout = broadcast([known(n) for n in operands(node) if is_stream(n)])
        place = layout.time
        if place is not None:
            right = layout.rank - place.dim
            for n in operands(node):
                if is_stream(n) and place.size > 1 and _beside(n, place.dim, layout.rank):
                    raise NoExtension("meets a mask of the whole clip")
                filling = constant_of(n).filling or counts_on(n, layout) or _same(n, layout)
                if fact_of(n).kind is Kind.STATIC and rank_of(n) >= right and shape_of(n)[-right] != 1 and not filling:
                    time_here = place.alone or shape_of(n)[-right] % (place.size * place.inner) == 0
                    if time_here and place.size > 1:
                        raise NoExtension("meets a constant with a time axis")
        fact = combine([fact_of(n) for n in operands(node)], self.layout(node))
        if any(counts_on(n, layout) for n in operands(node)):
            return replace(fact, copies=NO_COPIES)  # copies of one entry differ by what is counted
        return fact

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        layout = known(node)
        place = layout.time
        right = layout.rank - place.dim if place is not None and place.alone else 0

        def operand(arg: Any) -> Any:
            if not isinstance(arg, Node):
                return arg
            if not is_stream(arg) and counts_on(arg, layout):
                return count(arg, node, low, i)
            if right and rank_of(arg) >= right and not is_stream(arg):
                return low.one_of(arg, rank_of(arg) - right)
            if not is_stream(arg) and not right and _same(arg, layout):
                return low.first_row(arg, rank_of(arg) - layout.rank + place.dim)  # type: ignore[union-attr]
            new = low.entry(arg, i) if is_stream(arg) else low.plain(arg)
            own = known(arg).time if is_stream(arg) else None
            dropped = own is not None and own.alone
            if right and rank_of(arg) >= right and not dropped:
                return low.call(aten.squeeze.dim, new, rank_of(arg) - right)
            if own is not None and own.alone and not right:  # a single entry beside several numbers
                return low.call(aten.unsqueeze.default, new, own.dim)
            return new

        args = torch.fx.map_arg(node.args, operand)
        kwargs = torch.fx.map_arg(node.kwargs, operand)
        return low.call(node.target, *args, **kwargs)


def _beside(stream: Node, dim: int, rank: int) -> bool:
    """Says whether a stream has several numbers where another one has time: a mask of the clip by its length."""
    layout = known(stream)
    own = dim - rank + layout.rank
    return own >= 0 and layout.shape[own] > 1 and not layout.has(TIME, own)


def _same(constant: Node, layout: Layout) -> bool:
    """Says whether a constant says the same to each frame, on a dim that has time among its factors."""
    place = layout.time
    dim = rank_of(constant) - layout.rank + place.dim if place is not None else -1
    return dim >= 0 and (constant_of(constant).filling or dim in constant_of(constant).alike)


def counts_on(constant: Node, layout: Layout) -> bool:
    """Says whether a constant counts the entries of what it meets (``arange``), so that it goes on beyond the clip.

    Nothing counts on where the rows of several clips are numbered in one go.
    """
    place, line = layout.time, constant_of(constant).progression
    if place is None or line is None or is_stream(constant):
        return False
    here = line[0] == rank_of(constant) - layout.rank + place.dim
    return here and place.outer == 1 and not layout.has(BATCH, place.dim)


def count(constant: Node, node: Node, low: StepGraph, i: int) -> Node:
    """Writes entry ``i`` of a constant that counts along time: from a state that counts the entries of the stream."""
    line, layout, dtype = constant_of(constant).progression, known(node), constant.meta["val"].dtype
    place = layout.time
    assert line is not None and place is not None
    _, first, step = line
    like = next(low.entry(n, i) for n in operands(node) if is_stream(n))
    seen = low.call(aten._to_copy.default, low.counter(like, low.pulse(node)), dtype=dtype)
    places = torch.arange(place.inner) + (i - fact_of(node).delay) * place.inner
    offsets = (first + step * places).to(dtype)
    rank = len(layout.entry().dims)
    value = _beside_rows(low, seen, layout.entry())
    value = low.call(aten.mul.Tensor, value, torch.tensor(step * place.inner).to(dtype).item())
    if place.inner == 1:
        value = low.call(aten.add.Tensor, value, offsets.item())
    else:  # each entry has several places, which are counted too
        offsets = offsets.reshape([-1, *[1] * (rank - 1 - place.dim)])
        value = low.call(aten.add.Tensor, value, low.constant(f"{node.name}_counted_{i}", offsets))
    streamed = torch.broadcast_shapes(*(shape_of(n) for n in operands(node) if is_stream(n)))
    return value if streamed == shape_of(node) else low.call(aten.expand.default, value, layout.entry().sizes())


def _beside_rows(low: StepGraph, seen: Node, layout: Layout) -> Node:
    """Gives a number for each stream the shape in which it meets a tensor: once for each row folded into the batch."""
    batch = layout.batch
    dim = batch.dim if batch is not None else 0
    seen = low.beside_rows(seen, batch)
    return low.call(aten.reshape.default, seen, [*[1] * dim, -1, *[1] * (layout.rank - 1 - dim)])


POINTWISE = Pointwise()
register(
    aten._to_copy,
    aten.hardtanh,
    aten.relu6,
    aten.clamp,
    aten.prelu.default,
    aten._prelu_kernel.default,
    aten.softplus,
    aten.hardswish,
    aten.masked_fill,
)(Pointwise)
