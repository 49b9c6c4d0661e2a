"""Convolutions: the kernel slides over time, or over space alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import ConvArgs, sliding_axis
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.layout import TIME, Axis, Layout
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.time_facts import Fact, fact_of, kernel_of, known
from co3d_compile.rules.base import Rule, refuse_dense, register
from co3d_compile.step_graph.convolution_forms import TapConvolution, choose, pairs

if TYPE_CHECKING:
    from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.conv1d, aten.conv2d, aten.conv3d)
class Convolution(Rule):
    """y[o] = sum_i w[i] x[o*s + i*d - p], the clip's own equation."""

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        conv = ConvArgs.of(node)
        n = len(conv.kernel_size)
        axis = sliding_axis(conv.x, n)
        first = known(conv.x).rank - n
        space = [first + a for a in range(n) if a != axis and _slides(conv, a)]
        return [(conv.x, [first - 1, *space])]

    def layout(self, node: Node) -> Layout:
        conv = ConvArgs.of(node)
        x = known(conv.x)
        n = len(conv.kernel_size)
        single = [a for a in x.dims[x.rank - n - 1] if a == Axis(TIME, 1)]
        out = x.replace(x.rank - n - 1, [*single, Axis("", shape_of(conv.weight)[0])])
        for a in range(n):
            d = x.rank - n + a
            if _slides(conv, a):
                size = shape_of(node)[d]
                out = out.resize_dim(d, size)
        return out

    def kernel(self, node: Node) -> Kernel | None:
        conv = ConvArgs.of(node)
        axis = sliding_axis(conv.x, len(conv.kernel_size))
        if axis is None:
            return None
        pad = conv.padding[axis]
        return Kernel(conv.kernel_size[axis], conv.dilation[axis], conv.stride[axis], pad, pad)

    def flow(self, node: Node) -> Fact:
        kernel = self.kernel(node)
        if kernel is None or kernel.trivial:
            return super().flow(node)
        super().flow(node)
        conv = ConvArgs.of(node)
        return fact_of(conv.x).through(kernel, self.layout(node).resize("T", fact_of(conv.x).clip))

    def strip(self, node: Node) -> None:
        """Removes the temporal padding; the index equation in the node's meta keeps it as an offset."""
        conv = ConvArgs.of(node)
        axis = sliding_axis(conv.x, len(conv.kernel_size))
        assert axis is not None
        conv.padding[axis] = 0
        conv.write(node)

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        conv = ConvArgs.of(node)
        n = len(conv.kernel_size)
        axis = sliding_axis(conv.x, n)
        if axis is None:
            return [self.entry(node, low, i) for i in range(low.pulse(node))]
        kernel = kernel_of(node)
        taps = [low.plain(conv.weight, slot=(axis + 2, i)) for i in range(kernel.k)]
        bias = low.plain(conv.bias) if conv.bias is not None else None
        space = [a for a in range(n) if a != axis]
        stride, padding, dilation = ([v[a] for a in space] for v in (conv.stride, conv.padding, conv.dilation))
        cut = TapConvolution(taps, bias, stride, padding, dilation, conv.groups)
        positions = [[o * kernel.s + i * kernel.d for i in range(kernel.k)] for o in range(low.pulse(node))]
        results: dict[int, Node] = {}
        for a, b in pairs(low, cut, positions, low.aged(conv.x, positions[0][0])):
            at = [*positions[a], positions[b][-1]]
            results[a], results[b] = cut.pair(low, [low.entry(conv.x, i) for i in at])
        shared, queued = low.remembered(conv.x)
        kept = queued or bool(results)
        for o, at in enumerate(positions):
            if o in results:
                continue
            aged = [low.aged(conv.x, i) for i in at]
            form = choose(low, cut, aged, kept, shared)
            if form == "accumulate":
                results[o] = cut.accumulate(low, aged, fact_of(node).layout)
            else:
                results[o] = getattr(cut, form)(low, [low.entry(conv.x, i) for i in at])
        return [results[o] for o in range(len(positions))]

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        conv = ConvArgs.of(node)
        args: list[Any] = [low.whole_entry(conv.x, i), low.plain(conv.weight)]
        args.append(low.plain(conv.bias) if conv.bias is not None else None)
        result = low.call(node.target, *args, conv.stride, conv.padding, conv.dilation, conv.groups)
        return low.without_time(node, result)

    def reason(self, node: Node) -> str:
        return "time is among the channels or folded into a spatial dim that the kernel slides over"


def _slides(conv: ConvArgs, axis: int) -> bool:
    return (conv.kernel_size[axis], conv.stride[axis], conv.padding[axis]) != (1, 1, 0)


@register(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
class TransposedConvolution(Rule):
    """y[o] = sum over i, j with o = i*s + j*d - p of w[j] x[i]: each new entry adds to ``s`` new outputs."""

    def axis(self, node: Node) -> int | None:
        """The spatial axis that is time alone, or None."""
        return sliding_axis(operand(node), rank_of(operand(node, 1)) - 2)

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x, n = operand(node), rank_of(operand(node, 1)) - 2
        first = known(x).rank - n
        return [(x, [first - 1, *(first + a for a in range(n) if a != self.axis(node))])]

    def layout(self, node: Node) -> Layout:
        out = known(operand(node))
        for d in range(out.rank - rank_of(operand(node, 1)) + 1, out.rank):
            out = out.resize_dim(d, shape_of(node)[d])
        return out

    def flow(self, node: Node) -> Fact:
        fact = super().flow(node)
        axis, conv = self.axis(node), ConvArgs.of(node)
        if axis is None:
            return fact
        s, p, k, d = conv.stride[axis], conv.padding[axis], conv.kernel_size[axis], conv.dilation[axis]
        if s > 1:
            refuse_dense(node)
        x_fact = fact_of(conv.x)
        length = (x_fact.length - 1) * s - 2 * p + d * (k - 1) + conv.output_padding[axis] + 1
        return replace(
            fact,
            pulse=x_fact.pulse * s,
            delay=s * x_fact.delay + p,
            length=length,
            rate=x_fact.rate / s,
            end=x_fact.end_above(s, s * x_fact.length - length),
        )

    def past(self, node: Node) -> int:
        """Entries of the past that the newest outputs still need."""
        axis, conv = self.axis(node), ConvArgs.of(node)
        return 0 if axis is None else (conv.kernel_size[axis] - 1) * conv.dilation[axis] // conv.stride[axis]

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        axis, conv = self.axis(node), ConvArgs.of(node)
        if axis is None:
            return [self.entry(node, low, i) for i in range(low.pulse(node))]
        s, d, k = conv.stride[axis], conv.dilation[axis], conv.kernel_size[axis]
        past, x = self.past(node), conv.x
        space = [a for a in range(len(conv.stride)) if a != axis]
        sizes = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
        geometry = [[v[a] for a in space] for v in sizes]
        total = low.pulse(x)
        results: list[Node | None] = []
        for o in range((total - past) * s):
            # the output o of this step is (newest input entry, tap) with o + past * s = i * s + j * d
            pairs = [(i, j) for j in range(k) for i in range(total) if i * s + j * d == o + past * s]
            parts = [
                low.transposed(low.entry(x, i), low.plain(conv.weight, slot=(axis + 2, j)), geometry, conv.groups)
                for i, j in pairs
            ]
            results.append(low.sum(parts) if parts else None)
        zero = low.zeros_like(next(r for r in results if r is not None))
        bias = low.plain(conv.bias) if conv.bias is not None else None
        return [low.add_bias(zero if r is None else r, bias, len(space)) for r in results]
