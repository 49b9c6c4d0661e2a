"""Pools: sliding over time like a convolution, or over space alone.

A pool over a whole axis is a mean or a maximum by the time it comes here: the pass canonicalize writes it so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf, prod
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import DIMS, PoolArgs, adaptive_max, sliding_axis
from co3d_compile.ir.index_equation import Kernel, Outside
from co3d_compile.ir.layout import Layout
from co3d_compile.ir.node_reading import argument, operand, rank_of, shape_of
from co3d_compile.ir.time_facts import Fact, fact_of, kernel_of, known, own_of
from co3d_compile.rules.base import Rule, register

if TYPE_CHECKING:
    from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(*DIMS)
class Pool(Rule):
    """Average and max pools with a kernel."""

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        pool = PoolArgs.of(node)
        n = len(pool.kernel)
        first = known(pool.x).rank - n
        axis = sliding_axis(pool.x, n)
        geometry = list(zip(pool.kernel, pool.stride, pool.padding, strict=True))
        return [(pool.x, [first + a for a in range(n) if geometry[a] != (1, 1, 0) and a != axis])]

    def layout(self, node: Node) -> Layout:
        pool = PoolArgs.of(node)
        out = known(pool.x)
        for d in range(out.rank - len(pool.kernel), out.rank):
            size = shape_of(node)[d]
            if out.shape[d] != size:
                out = out.resize_dim(d, size)
        return out

    def kernel(self, node: Node) -> Kernel | None:
        pool = PoolArgs.of(node)
        axis = sliding_axis(pool.x, len(pool.kernel))
        if axis is None:
            return None
        k, s, p, d = pool.kernel[axis], pool.stride[axis], pool.padding[axis], pool.dilation[axis]
        return Kernel(k, d, s, p, p, pool.ceil)

    def flow(self, node: Node) -> Fact:
        fact = super().flow(node)
        kernel = self.kernel(node)
        if kernel is None or kernel.trivial:
            return fact
        pool = PoolArgs.of(node)
        return fact_of(pool.x).through(kernel, self.layout(node).resize("T", fact_of(pool.x).clip))

    def strip(self, node: Node) -> None:
        """Removes the temporal padding; the index equation in the node's meta keeps it as an offset."""
        pool = PoolArgs.of(node)
        axis = sliding_axis(pool.x, len(pool.kernel))
        assert axis is not None
        pool.padding[axis] = 0
        pool.write(node)

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        value = 0.0 if PoolArgs.of(node).average else -inf
        return value, value

    def split(self, node: Node) -> tuple[Node, Node] | None:
        """Pools over space first: what is left to remember is small."""
        pool = PoolArgs.of(node)
        axis = sliding_axis(pool.x, len(pool.kernel))
        if axis is None or pool.divisor is not None:
            return None
        neutral = (1, 1, 0, 1)
        rest = [v for a, v in enumerate(zip(pool.kernel, pool.stride, pool.padding, strict=True)) if a != axis]
        if all(v == (1, 1, 0) for v in rest):
            return None
        parts = []
        x: Node = pool.x
        for over_time in (False, True):
            part = replace(
                pool,
                kernel=list(pool.kernel),
                stride=list(pool.stride),
                padding=list(pool.padding),
                dilation=list(pool.dilation),
            )
            for a in range(len(pool.kernel)):
                if (a == axis) != over_time:
                    part.kernel[a], part.stride[a], part.padding[a], part.dilation[a] = neutral
            with node.graph.inserting_before(node):
                new = node.graph.call_function(node.target, part.args(x, list(range(len(pool.kernel)))))  # type: ignore[arg-type]
            parts.append(new)
            x = new
        return parts[0], parts[1]

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        pool = PoolArgs.of(node)
        n = len(pool.kernel)
        axis = sliding_axis(pool.x, n)
        if axis is None:
            return [self._over_space(low, pool, low.entry(pool.x, i), list(range(n))) for i in range(low.pulse(node))]
        kernel = kernel_of(node)
        space = [a for a in range(n) if a != axis]
        results = []
        for o in range(low.pulse(node)):
            taps = [low.ref(pool.x, o * kernel.s + i * kernel.d) for i in range(kernel.k)]
            x = low.reduce_entries(taps, "mean" if pool.average else "amax")
            x = self._mean_inside(node, low, pool, x, o)
            if any(pool.kernel[a] != 1 or pool.stride[a] != 1 for a in space):
                x = self._over_space(low, pool, x, space)
            elif pool.divisor is not None:
                x = low.call(aten.mul.Tensor, x, prod(pool.kernel) / pool.divisor)
            results.append(x)
        return results

    def _mean_inside(self, node: Node, low: StepGraph, pool: PoolArgs, x: Node, o: int) -> Node:
        """With ends, or a start: the mean over the entries that the clip's own operator counts."""
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
        return self._over_space(low, pool, low.plain(pool.x), list(range(len(pool.kernel))))

    def _over_space(self, low: StepGraph, pool: PoolArgs, x: Node, space: list[int]) -> Node:
        """The pool over some of its axes, with a divisor of its own over all of them."""
        names = {
            True: [aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default],
            False: [aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default],
        }
        target = names[pool.average][len(space) - 1]
        if pool.divisor is None:
            return low.call(target, *pool.args(x, space))
        padded = self._with_zeros(low, pool, x, space)  # a mean over whole kernels, whatever counts as padding
        whole = replace(pool, divisor=None, ceil=False, padding=[0] * len(pool.kernel))
        mean = low.call(target, *whole.args(padded, space))
        return low.call(aten.mul.Tensor, mean, prod(pool.kernel) / pool.divisor)

    def _with_zeros(self, low: StepGraph, pool: PoolArgs, x: Node, space: list[int]) -> Node:
        """What a pool reads: its operand with zeros around it, as many as its last kernel reaches for."""
        pads = []
        for a, size in zip(space, low.sizes(x)[-len(space) :], strict=True):
            k, s, p = pool.kernel[a], pool.stride[a], pool.padding[a]
            last = (Kernel(k, 1, s, p, p, pool.ceil).length(size) - 1) * s + k - size - p
            pads += [(p, max(p, last))]
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
        """Operand, and the size of the output on each of its pooled axes."""
        x = operand(node)
        wanted = argument(node, 1, "output_size")
        n = len(wanted) if node.target is adaptive_max else int(str(node.target).split("pool")[1][0])
        return x, list(shape_of(node)[-n:])

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x, sizes = self._sizes(node)
        axis = sliding_axis(x, len(sizes))
        first = known(x).rank - len(sizes)
        old = shape_of(x)[first:]
        changed = [s != old[a] or (a == axis and fact_of(x).length != s) for a, s in enumerate(sizes)]
        return [(x, [first + a for a, c in enumerate(changed) if c])]

    def layout(self, node: Node) -> Layout:
        x, sizes = self._sizes(node)
        out = known(x)
        for a, size in enumerate(sizes):
            d = out.rank - len(sizes) + a
            if out.shape[d] != size:
                out = out.resize_dim(d, size)
        return out

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
        """Bin by bin, as ``aten`` does it: bin b of B is from floor(b*n/B) to ceil((b+1)*n/B)."""
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
