"""Pools: sliding over time like a convolution, or over space alone.

A pool over a whole axis is a mean or a maximum by the time it comes here: the pass canonicalize writes it so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf, prod

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import DIMS, PoolArgs, adaptive_max, sliding_axis
from co3d_compile.ir.index_equation import Outside
from co3d_compile.ir.layout import Layout
from co3d_compile.ir.node_reading import operand, rank_of, shape_of, whole_list
from co3d_compile.ir.time_facts import fact_of, known, own_of
from co3d_compile.rules.base import Rule, register
from co3d_compile.rules.sliding import KernelRule
from co3d_compile.step_graph.entry_operators import MANY
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
AVERAGES = [aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default]
MAXIMA = [aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default]


@register(*DIMS)
class Pool(KernelRule):
    """Average and max pools with a kernel."""

    def args(self, node: Node) -> PoolArgs:
        return PoolArgs.of(node)

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        value = 0.0 if self.args(node).average else -inf
        return value, value

    def split(self, node: Node) -> tuple[Node, Node] | None:
        """Pools over space first: what is left to remember is small."""
        pool, every = self.args(node), range(self.args(node).dims)
        if pool.axis is None or pool.divisor is not None or not any(map(pool.moves, pool.space)):
            return None
        graph, target = node.graph, (AVERAGES if pool.average else MAXIMA)[pool.dims - 1]
        with graph.inserting_before(node):
            space = graph.call_function(target, pool.along(pool.space).args(pool.x, every))
            return space, graph.call_function(target, pool.along([pool.axis]).args(space, every))

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        pool = self.args(node)
        return self._over(low, pool, low.entry(pool.x, i), range(pool.dims))

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        pool = self.args(node)
        if pool.axis is None:
            return super().lower(node, low)
        positions = self.taps(node, low)
        if self._is_many(node, low, positions):
            return self._together(pool, low, positions)
        results = []
        for o, taps in enumerate(positions):
            x = low.reduce_entries([low.ref(pool.x, i) for i in taps], "mean" if pool.average else "amax")
            x = self._mean_inside(node, low, pool, x, o)
            if any((pool.kernel[a], pool.stride[a]) != (1, 1) for a in pool.space):
                x = self._over(low, pool, x, pool.space)
            elif pool.divisor is not None:
                x = low.call(aten.mul.Tensor, x, prod(pool.kernel) / pool.divisor)
            results.append(x)
        return results

    def _is_many(self, node: Node, low: StepGraph, at: list[list[int]]) -> bool:
        """Says whether the outputs of a step are computed together: many means or maxima of samples and features."""
        pool, slides = self.args(node), own_of(node).slides
        within = slides is not None and slides.within and pool.average
        spread = pool.average and at[0][-1] - at[0][0] >= len(at[0])
        if len(at) < MANY or pool.divisor is not None or within or spread or any(map(pool.moves, pool.space)):
            return False
        return node.meta["val"].is_floating_point() and low.is_vector(low.entry(pool.x, 0))

    def _together(self, pool: PoolArgs, low: StepGraph, at: list[list[int]]) -> list[Node]:
        """Writes one pool for all outputs of a step."""
        rows = low.stacked([low.ref(pool.x, i) for i in range(at[0][0], at[-1][-1] + 1)])
        x = low.call(aten.permute.default, rows, [0, 2, 1])
        kernel, stride = [len(at[0])], [at[1][0] - at[0][0]]
        apart = [] if pool.average else [[0], [at[0][1] - at[0][0] if len(at[0]) > 1 else 1]]
        result = low.call((AVERAGES if pool.average else MAXIMA)[0], x, kernel, stride, *apart)
        return low.entries_of(result, 2, range(len(at)))

    def _mean_inside(self, node: Node, low: StepGraph, pool: PoolArgs, x: Node, o: int) -> Node:
        """Takes the mean, with ends or a start, over the entries that the clip's own operator counts."""
        slides = own_of(node).slides
        if slides is None or not slides.within or not pool.average or pool.divisor is not None:
            return x
        kernel = slides.kernel
        if not kernel.ceil and (pool.count_pad or not (kernel.p or kernel.p_end)):
            return x
        pad = (kernel.p, kernel.p_end) if pool.count_pad else (0, 0)
        return low.start.mean_of_inside(x, fact_of(pool.x), fact_of(node), kernel, pad, o)

    def window(self, node: Node, low: StepGraph) -> Node:
        pool = PoolArgs.of(node)
        if pool.divisor is None:
            return low.same(node)
        return self._over(low, pool, low.plain(pool.x), range(pool.dims))

    def _over(self, low: StepGraph, pool: PoolArgs, x: Node, axes: Sequence[int]) -> Node:
        """Pools over some of the axes, with a divisor of its own over all of them."""
        target = (AVERAGES if pool.average else MAXIMA)[len(axes) - 1]
        if pool.divisor is None:
            return low.call(target, *pool.args(x, axes))
        padded = self._with_zeros(low, pool, x, axes)  # a mean over whole kernels, whatever counts as padding
        whole = replace(pool, divisor=None, ceil=False, padding=[0] * len(pool.kernel))
        mean = low.call(target, *whole.args(padded, axes))
        return low.call(aten.mul.Tensor, mean, prod(pool.kernel) / pool.divisor)

    def _with_zeros(self, low: StepGraph, pool: PoolArgs, x: Node, axes: Sequence[int]) -> Node:
        """Gives a pool's operand zeros around it, as many as its last kernel reaches for."""
        pads = []
        for a, size in zip(axes, low.sizes(x)[-len(axes) :], strict=True):
            over = pool.over(a)
            last = (over.length(size) - 1) * over.s + over.k - size - over.p
            pads.append((over.p, max(over.p, last)))
        flat = [v for pad in reversed(pads) for v in pad]
        return low.call(aten.constant_pad_nd.default, x, flat, 0.0) if any(flat) else x


@register(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    adaptive_max,
)
class AdaptivePool(Rule):
    """Adaptive pools: as many entries over time as there are is nothing, fewer is a window."""

    def _sizes(self, node: Node) -> tuple[Node, list[int]]:
        """Finds the operand, and the size of the output on each of its pooled axes."""
        n = len(whole_list(node.args[1])) if node.target is adaptive_max else int(str(node.target).split("pool")[1][0])
        return operand(node), list(shape_of(node)[-n:])

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x, sizes = self._sizes(node)
        axis = sliding_axis(x, len(sizes))
        first = known(x).rank - len(sizes)
        old = shape_of(x)[first:]
        changed = [s != old[a] or (a == axis and fact_of(x).length != s) for a, s in enumerate(sizes)]
        return [(x, [first + a for a, c in enumerate(changed) if c])]

    def layout(self, node: Node) -> Layout:
        x, sizes = self._sizes(node)
        rank = rank_of(x)
        return known(x).sized(shape_of(node), range(rank - len(sizes), rank))

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, sizes = self._sizes(node)
        first = known(x).rank - len(sizes)
        place = known(x).entry_dims()
        wanted = {e: s for a, s in enumerate(sizes) if (e := place[first + a]) is not None}
        return self._pool(low, low.entry(x, i), wanted, node)

    def window(self, node: Node, low: StepGraph) -> Node:
        x, sizes = self._sizes(node)
        return self._pool(low, low.plain(x), {rank_of(x) - len(sizes) + a: s for a, s in enumerate(sizes)}, node)

    def _pool(self, low: StepGraph, x: Node, wanted: dict[int, int], node: Node) -> Node:
        """Pools bin by bin, as ``aten`` does it: bin b of B is from floor(b*n/B) to ceil((b+1)*n/B)."""
        reduction = aten.amax.default if node.target is adaptive_max else aten.mean.dim
        for dim, bins in wanted.items():
            n = low.sizes(x)[dim]
            if bins == n:
                continue
            edges = [(b * n // bins, -((b + 1) * -n // bins)) for b in range(bins)]
            parts = [low.call(aten.slice.Tensor, x, dim, a, b) for a, b in edges]
            parts = [low.call(reduction, part, [dim], True) for part in parts]
            x = parts[0] if bins == 1 else low.call(aten.cat.default, parts, dim)
        return x

    def reason(self, node: Node) -> str:
        return f"pools time to {'x'.join(map(str, self._sizes(node)[1]))} entries"
