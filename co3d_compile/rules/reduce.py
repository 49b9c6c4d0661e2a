"""Reductions and norms: over space they stream; over time they are windows, or gates where they meet the stream."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import SEPARABLE, reduced
from co3d_compile.ir.layout import BATCH, TIME, Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import Fact, fact_of, known
from co3d_compile.rules.base import Rule, one_entry, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
NEUTRAL = {"mean": 0.0, "sum": 0.0, "amax": -inf, "amin": inf}


@register(
    *SEPARABLE,
    aten.any.dim,
    aten.all.dim,
    aten.var.correction,
    aten.std.correction,
    aten.argmax,
    aten.argmin,
    aten.logsumexp,
    aten.norm.ScalarOpt_dim,
    aten.linalg_vector_norm,
    aten.prod.dim_int,
    aten.any.dims,
)
class Reduction(Rule):
    """Reductions over dims."""

    why = "reduces over the whole time axis"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x, dims, _ = reduced(node)
        return [(x, dims)]

    def layout(self, node: Node) -> Layout:
        x, dims, keep = reduced(node)
        out = known(x)
        time = out.time
        if time is not None and time.dim in dims and time.alone:
            out = out.resize(TIME, 1)
        for d in dims:
            labels = [a for a in out.dims[d] if a.label and a.size == 1]
            if any(a.label == BATCH for a in out.dims[d]) > any(a.label == BATCH for a in labels):
                raise LayoutLost  # of several clips one is made
            out = out.replace(d, labels)
        return out if keep else out.remove(dims)

    def gate(self, node: Node, scope: str) -> Fact | None:
        x, dims, _ = reduced(node)
        place = known(x).time
        if node.target not in SEPARABLE or place is None or not place.alone or place.dim not in dims:
            return None
        return one_entry(fact_of(x), self.layout(node))

    def slides_again(self, node: Node, dims: Sequence[int]) -> bool:
        place = known(operand(node)).time
        return place is not None and place.alone and place.dim in dims

    def split(self, node: Node) -> tuple[Node, Node] | None:
        """Reduces over space first: what is left to remember is small."""
        if node.target not in SEPARABLE:
            return None
        x, dims, keep = reduced(node)
        place, batch = known(x).time, known(x).batch
        space = [d for d in dims if (place is None or d != place.dim) and (batch is None or d != batch.dim)]
        if place is None or place.dim not in dims or not place.alone or not space:
            return None
        with node.graph.inserting_before(node):
            target: Any = node.target
            first = node.graph.call_function(target, (x, space, True))
            over_time = node.graph.call_function(target, (first, dims, keep))
        return first, over_time

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, dims, _ = reduced(node)
        place = known(x).entry_dims()
        if node.target in SEPARABLE and all(place[d] is None for d in dims):
            return low.entry(x, i)  # the mean, sum or extreme of a single entry; but not its variance, norm or place
        return low.along_dims(node, i)

    def over_newest(self, node: Node, low: StepGraph, past: int, step: int) -> list[Node]:
        """Reduces over the newest entries, for every new entry (``pool_scope="window"``)."""
        x, _, _ = reduced(node)
        kind = SEPARABLE[node.target]
        new = [self.entry(node, low, i) for i in range(low.pulse(x))]
        ends = low.opening(node)
        if ends is None:
            entries = low.past(new, past)
            return [low.reduce_entries(entries[o : o + past + 1 : step], kind) for o in range(low.pulse(x))]
        entries = low.newest(ends, new, fact_of(x), fact_of(node).layout, past, NEUTRAL[kind])
        results = [low.reduce_entries(entries[o : o + past + 1], kind) for o in range(low.pulse(x))]
        if kind != "mean":
            return results
        layout = fact_of(node).layout
        return [ends.mean_of_newest(r, fact_of(x), i, past + 1, layout) for i, r in enumerate(results)]


@register(aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default)
class Norm(Rule):
    """Layer, group and instance norm: over time (mean and variance of the whole clip) they are gates."""

    why = "normalises over the whole time axis"

    def _dims(self, node: Node) -> list[int]:
        x = operand(node)
        if node.target == aten.layer_norm.default:
            return list(range(rank_of(x) - len(Arguments(node).integers("normalized_shape")), rank_of(x)))
        first = 1 if node.target == aten.group_norm.default else 2
        return list(range(first, rank_of(x)))

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x, dims = operand(node), self._dims(node)
        scaled = node.target == aten.instance_norm.default and Arguments(node).optional("weight") is not None
        return [(x, [1, *dims] if scaled else dims)]  # a scale for each entry of dim 1 has no more of them

    def weights(self, node: Node) -> Iterable[object]:
        return node.args[1:]

    def gate(self, node: Node, scope: str) -> Fact | None:
        x = operand(node)
        place = known(x).time
        if place is None or not place.alone or place.dim not in self._dims(node):
            return None
        if node.target == aten.layer_norm.default and len(node.args) > 2 and node.args[2] is not None:
            return None  # weights over time: nothing that a single entry could use
        if scope == "frame" and prod(shape_of(x)[d] for d in self._dims(node) if d != place.dim) == self._groups(node):
            return None  # one number by itself: its mean is the number, and nothing would be left of it
        return fact_of(x)

    def _groups(self, node: Node) -> int:
        """Counts over how many groups of the dims it mixes an entry is normalised, each by itself."""
        return Arguments(node).integer("num_groups") if node.target == aten.group_norm.default else 1

    def _rows(self, node: Node) -> int:
        """Counts the sets of numbers of an entry that are normalised, each by itself."""
        return self._groups(node) * prod(shape_of(operand(node))[1 : self._dims(node)[0]])

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x = operand(node)
        args = [low.plain(a) if isinstance(a, Node) else a for a in node.args[1:]]
        place = known(x).time
        if node.target == aten.instance_norm.default and place is not None and place.dim == 1:
            eps = Arguments(node).number("eps")  # frames stand where channels do: each is normalised as a whole
            return low.call(aten.layer_norm.default, low.entry(x, i), list(shape_of(x)[2:]), None, None, eps)
        if node.target == aten.layer_norm.default and place is not None and place.alone:
            args[0] = [size for d, size in enumerate(shape_of(x)) if d in self._dims(node) and d != place.dim]
            if not args[0]:  # over a single entry of time alone
                return low.with_time_of_one(node, i)
        return low.call(node.target, low.entry(x, i), *args, **node.kwargs)

    def over_newest(self, node: Node, low: StepGraph, past: int, step: int) -> list[Node]:
        """Computes the mean and variance over the newest entries, for every new entry (``pool_scope="window"``).

        What is remembered are the first two moments of each entry, not the entry.
        """
        x = operand(node)
        news = [low.entry(x, i) for i in range(low.pulse(x))]
        shape = [int(s) for s in news[0].meta["val"].shape]
        g = self._rows(node)
        rows = [low.call(aten.reshape.default, new, [-1, g, prod(shape[1:]) // g]) for new in news]
        squares = [low.call(aten.mul.Tensor, r, r) for r in rows]
        moments = [[low.call(aten.mean.dim, r, [2], True) for r in both] for both in (rows, squares)]
        ends = low.opening(node)
        if ends is not None:
            first, second = (low.newest(ends, m, fact_of(x), None, past, 0.0) for m in moments)
        else:
            first, second = (low.past(m, past) for m in moments)
        results = []
        for o, r in enumerate(rows):
            mean = low.reduce_entries(first[o : o + past + 1 : step], "mean")
            square = low.reduce_entries(second[o : o + past + 1 : step], "mean")
            if ends is not None:
                mean, square = (ends.mean_of_newest(m, fact_of(x), o, past + 1, None) for m in (mean, square))
            results.append(self._affine(node, low, self._normal(node, low, r, mean, square), shape))
        return results

    def _normal(self, node: Node, low: StepGraph, x: Node, mean: Node, square: Node) -> Node:
        eps = Arguments(node).number("eps")
        variance = low.call(aten.sub.Tensor, square, low.call(aten.mul.Tensor, mean, mean))
        safe = low.call(aten.add.Tensor, low.call(aten.clamp.default, variance, 0.0), eps)
        return low.call(aten.mul.Tensor, low.call(aten.sub.Tensor, x, mean), low.call(aten.rsqrt.default, safe))

    def _affine(self, node: Node, low: StepGraph, rows: Node, shape: list[int]) -> Node:
        result = low.call(aten.reshape.default, rows, [-1, *shape[1:]])
        if node.target == aten.layer_norm.default:
            return result
        given, tail = Arguments(node), [1] * (len(shape) - 2)
        for operator, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            vector = given.optional(name)
            if vector is not None:
                result = low.call(operator, result, low.call(aten.reshape.default, low.plain(vector), [-1, *tail]))
        return result


@register(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.flip.default,
    aten.roll.default,
    aten.glu.default,
)
class AlongDims(Rule):
    """Operators that compute along given dims and keep the shape."""

    why = "computes along the whole time axis"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        name = "dims" if node.target in (aten.roll.default, aten.flip.default) else "dim"
        return [(operand(node), Arguments(node).dims(operand(node), name))]

    def layout(self, node: Node) -> Layout:
        x = operand(node)
        if node.target == aten.glu.default:
            d = Arguments(node).dim(x)
            return known(x).replace(d, Layout.plain([shape_of(node)[d]]).dims[0])
        return known(x)

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        return low.along_dims(node, i)
