"""Concatenation: over other dims operands are aligned, over time constants in front are an offset of the index."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import selected, sliced
from co3d_compile.ir.index_equation import EDGE, Kernel, Outside
from co3d_compile.ir.layout import BATCH, TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import (
    Fact,
    Kind,
    NoExtension,
    combine,
    constant_of,
    fact_of,
    is_start,
    is_stream,
    known,
    own_of,
)
from co3d_compile.rules.base import Rule, register
from co3d_compile.rules.pointwise import broadcast
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
CROPS = {
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.repeat.default,
    aten.unsqueeze.default,
    aten.repeat_interleave.self_int,
    aten.flip.default,
    aten.cat.default,
}


@register(aten.cat.default)
class Concatenation(Rule):
    """``cat`` of tensors."""

    why = "joins several sequences along time"

    def parts(self, node: Node) -> tuple[list[Node], int]:
        """Reads the tensors and the dim."""
        given = Arguments(node)
        parts = given.tensors("tensors")
        return parts, given.dim(parts[0])

    def layout(self, node: Node) -> Layout:
        parts, dim = self.parts(node)
        if any(map(is_start, parts)) and any(map(is_stream, parts)):
            return known(self.main(node)).resize_dim(dim, shape_of(node)[dim])
        dynamic = [p for p in parts if fact_of(p).kind is not Kind.STATIC]
        others = [known(p).replace(dim, ()) for p in dynamic]
        own = [[a for a in known(p).dims[dim] if a != Axis(TIME, 1)] for p in dynamic]
        if any(a.label and len(d) > 1 for d in own for a in d):
            raise LayoutLost
        labels = {a.label for d in own for a in d} - {""}
        if labels == {BATCH} and len(dynamic) == len(parts):  # a stack, as it is written without a new dim
            floating = {a for p in dynamic for a in known(p).dims[dim] if a == Axis(TIME, 1)}
            return broadcast(others).replace(dim, [Axis("", len(parts)), *own[0], *floating])
        if any(len(known(p).dims[dim]) > 1 for p in dynamic):
            raise LayoutLost
        labels |= {a.label for p in dynamic for a in known(p).dims[dim]} - {""}
        axis = Axis(labels.pop() if labels else "", shape_of(node)[dim])
        return broadcast(others).replace(dim, [axis])

    def flow(self, node: Node) -> Fact:
        parts, dim = self.parts(node)
        if not any(_along(p, dim) for p in parts):
            for p in parts:
                if not is_stream(p):
                    self._check_constant(node, p, parts, dim)
            try:
                fact = combine([fact_of(p) for p in parts], self.layout(node))
                frames = [shape_of(p)[dim] for p in parts if fact_of(p).single]
                return replace(fact, lost=fact.lost or (len(frames) > 1 and 1 in frames))
            except LayoutLost:
                raise NoExtension("concatenates tensors with time in different dims") from None
        return self._over_time(node, parts, dim)

    def _check_constant(self, node: Node, part: Node, parts: list[Node], dim: int) -> None:
        stream = next(p for p in parts if is_stream(p))
        place = known(stream).time
        if place is None or place.size == 1 or shape_of(part)[place.dim] == 1 or constant_of(part).filling:
            return
        if place.dim not in constant_of(part).alike:
            raise NoExtension("concatenates a constant with a time axis")

    def _over_time(self, node: Node, parts: list[Node], dim: int) -> Fact:
        main = self.main(node)
        place = known(main).time
        if place is None or not place.alone:
            raise NoExtension("concatenates along a dim into which time is folded")
        kernel = self.kernel(node)
        assert kernel is not None
        fact = fact_of(main)
        front, back = self.outside(node)
        return fact.through(kernel, known(main), (front == EDGE, back == EDGE))

    def main(self, node: Node) -> Node:
        """Finds the part that is the stream; the others only fill the ends.

        Raises:
            NoExtension: More than one part is a stream of its own, or a part is a learned constant.
        """
        parts, dim = self.parts(node)
        streams = [p for p in parts if is_stream(p)]
        main = max(streams, key=lambda p: shape_of(p)[dim])
        at = parts.index(main)
        for p in (*parts[:at], *parts[at + 1 :]):
            whole = fact_of(_root(p, dim)).clip
            own = _root(p, dim) is _root(main, dim) and 2 * _extent(p, dim) < whole <= 2 * shape_of(main)[dim]
            filling = own if is_stream(p) else constant_of(p).filling or is_start(p)
            if not filling or 2 * shape_of(main)[dim] < shape_of(node)[dim]:
                raise NoExtension("joins several sequences along time")
        return main

    def kernel(self, node: Node) -> Kernel | None:
        parts, dim = self.parts(node)
        if not any(_along(p, dim) for p in parts):
            return None
        main = self.main(node)
        at = parts.index(main)
        front = sum(shape_of(p)[dim] for p in parts[:at])
        return Kernel(1, 1, 1, front, sum(shape_of(p)[dim] for p in parts[at + 1 :]))

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        parts, dim = self.parts(node)
        main = self.main(node)
        at = parts.index(main)
        first, last = span(main, dim)
        front = None if any(map(is_start, parts[:at])) else common(parts[:at], dim, first)
        return front, common(parts[at + 1 :], dim, last)

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        parts, dim = self.parts(node)
        if self.kernel(node) is not None:
            return low.entry(self.main(node), i)
        place = known(node).entry_dims()[dim]
        news = []
        for p in parts:
            if is_stream(p):
                news.append(low.entry(p, i))
            else:
                news.append(self._filling(node, p, low, i))
        at = parts.index(next(filter(is_stream, parts)))
        batch = known(parts[at]).entry().batch
        if batch is not None and batch.dim != place:
            news = [new if is_stream(p) else low.with_batch_of(new, news[at], batch.dim, batch.dim)
                   for new, p in zip(news, parts, strict=True)]  # fmt: skip
        return low.call(aten.cat.default, news, place)

    def _filling(self, node: Node, part: Node, low: StepGraph, i: int) -> Node:
        """Makes a constant that stands beside the stream, for one entry of it."""
        time = known(node).time
        if time is not None and time.alone:
            return low.one_of(part, time.dim)
        new = low.plain(part)
        if time is None or shape_of(part)[time.dim] == 1:
            return new
        like = next(low.entry(p, i) for p in self.parts(node)[0] if is_stream(p))  # time is folded into this dim
        return low.call(aten.slice.Tensor, new, time.dim, 0, low.sizes(like)[time.dim])

    def window(self, node: Node, low: StepGraph) -> Node:
        parts, dim = self.parts(node)
        dynamic = next(p for p in parts if fact_of(p).kind is not Kind.STATIC)
        like, layout = low.plain(dynamic), fact_of(dynamic).layout
        batch = layout.batch.dim if layout is not None and layout.batch is not None else 0
        several = layout.batch is not None if layout is not None else low.sizes(like)[batch] == low.batch
        if batch == dim or not several:
            return low.same(node)
        news = [
            low.with_batch_of(low.plain(p), like, batch, batch) if fact_of(p).kind is Kind.STATIC else low.plain(p)
            for p in parts
        ]
        return low.call(aten.cat.default, news, dim)


def _along(part: Node, dim: int) -> bool:
    """Says whether a dim is the time of a stream: a single entry belongs to each of its numbers, wherever it stands."""
    return is_stream(part) and known(part).has(TIME, dim) and not fact_of(part).single


def repeats_edge(front: list[Node], main: Node, dim: int) -> bool:
    """Says whether what stands in front of a stream is its first entry, repeated: a pad that is written as ``cat``."""
    return all(_root(p, dim) is _root(main, dim) for p in front) and common(front, dim, span(main, dim)[0]) == EDGE


def common(parts: list[Node], dim: int, edge: int) -> Outside:
    """Finds what all parts at one end of a concatenation are: one number, or the entry at the edge."""
    values: set[Outside] = set()
    for part in parts:
        constant = own_of(part).constant
        if constant is not None:
            values.add(constant.fill)
        else:
            values.add(EDGE if span(part, dim) == (edge, edge) else None)
    return values.pop() if len(values) == 1 else None if values else 0.0


def span(part: Node, dim: int) -> tuple[int, int]:
    """Finds the first and last entry, counted in the root, of a crop; (-1, -2) for what is more than a crop."""
    if part.target is aten.cat.default and _common_root(part, dim) is not None:
        spans = {span(p, dim) for p in part.all_input_nodes}
        return spans.pop() if len(spans) == 1 else (-1, -2)
    if part.target is aten.unsqueeze.default and operand(part).target is aten.select.int:
        x, own, index = selected(operand(part))
        alike = Arguments(part).dim(part) == own == dim
        first, last = span(x, dim)
        return (first + index, first + index) if alike and last >= first else (-1, -2)
    if part.target is aten.slice.Tensor and sliced(part)[-1] == 1:
        x, own, start, end, _ = sliced(part)
        first, last = span(x, dim)
        return (first + start, first + end - 1) if own == dim and last >= first else (-1, -2)
    cropped = part.target in CROPS and part.target is not aten.cat.default
    return (-1, -2) if cropped else (0, shape_of(part)[dim] - 1)


def _root(node: Node, dim: int) -> Node:
    """Finds the tensor that a chain of crops, repeats and pads starts from."""
    while node.target in CROPS and node.target is not aten.cat.default:
        node = node.all_input_nodes[0]
    common_root = _common_root(node, dim) if node.target is aten.cat.default else None
    return node if common_root is None else common_root


def _extent(node: Node, dim: int) -> int:
    """Counts the entries of its root, side by side, over which a chain of crops, repeats and pads reaches at most."""
    if node.target is aten.cat.default and _common_root(node, dim) is not None:
        return max(_extent(p, dim) for p in node.all_input_nodes)
    if node.target not in CROPS or node.target is aten.cat.default:
        return fact_of(node).clip
    x = node.all_input_nodes[0]
    if node.target is aten.slice.Tensor:
        _, own, start, end, _ = sliced(node)
        return min(end - start, _extent(x, dim)) if own == dim else _extent(x, dim)
    if node.target is aten.select.int and selected(node)[1] == dim:
        return 1
    return _extent(x, dim)


def _common_root(node: Node, dim: int) -> Node | None:
    """Finds the root of what a concatenation only adds constants or its own entries to.

    None: it joins more than that.
    """
    main, *others = sorted(node.all_input_nodes, key=lambda p: -shape_of(p)[dim])
    root = _root(main, dim)
    more = [p for p in others if fact_of(p).kind is not Kind.STATIC]
    return root if all(_root(p, dim) is root for p in more) else None
