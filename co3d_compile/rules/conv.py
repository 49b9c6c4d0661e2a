"""Convolutions: the kernel slides over time, or over space alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import ConvArgs
from co3d_compile.ir.layout import TIME, Axis, Layout
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.time_facts import Fact, fact_of, known
from co3d_compile.rules.base import Rule, refuse_dense, register
from co3d_compile.rules.sliding import KernelRule
from co3d_compile.step_graph.convolution_forms import TapConvolution, choose, pairs
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.conv1d, aten.conv2d, aten.conv3d)
class Convolution(KernelRule):
    """y[o] = sum_i w[i] x[o*s + i*d - p], the clip's own equation."""

    def args(self, node: Node) -> ConvArgs:
        return ConvArgs.of(node)

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        conv = self.args(node)
        ((x, space),) = super().mixes(node)
        return [(x, [conv.first - 1, *space])]

    def layout(self, node: Node) -> Layout:
        channels = self.args(node).first - 1
        out = super().layout(node)
        single = [a for a in out.dims[channels] if a == Axis(TIME, 1)]
        return out.replace(channels, [*single, Axis("", shape_of(node)[channels])])

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        conv = self.args(node)
        if conv.axis is None:
            return super().lower(node, low)
        taps = [low.plain(conv.weight, slot=(conv.axis + 2, i)) for i in range(conv.kernel[conv.axis])]
        bias = low.plain(conv.bias) if conv.bias is not None else None
        stride, padding, dilation = ([v[a] for a in conv.space] for v in (conv.stride, conv.padding, conv.dilation))
        cut = TapConvolution(taps, bias, stride, padding, dilation, conv.groups)
        positions = self.taps(node, low)
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
        conv = self.args(node)
        bias = low.plain(conv.bias) if conv.bias is not None else None
        sizes = (conv.stride, conv.padding, conv.dilation, conv.groups)
        result = low.call(node.target, low.whole_entry(conv.x, i), low.plain(conv.weight), bias, *sizes)
        return low.without_time(node, result)

    def reason(self, node: Node) -> str:
        return "time is among the channels or folded into a spatial dim that the kernel slides over"


@register(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
class TransposedConvolution(Rule):
    """y[o] = sum over i, j with o = i*s + j*d - p of w[j] x[i]: each new entry adds to ``s`` new outputs."""

    def axis(self, node: Node) -> int | None:
        """The spatial axis that is time alone, or None."""
        return ConvArgs.of(node).axis

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        conv = ConvArgs.of(node)
        return [(conv.x, [conv.first - 1, *(conv.first + a for a in conv.space)])]

    def layout(self, node: Node) -> Layout:
        conv = ConvArgs.of(node)
        return known(conv.x).sized(shape_of(node), range(conv.first - 1, conv.first + conv.dims))

    def flow(self, node: Node) -> Fact:
        fact, conv = super().flow(node), ConvArgs.of(node)
        a = conv.axis
        if a is None:
            return fact
        s, p, d = conv.stride[a], conv.padding[a], conv.dilation[a]
        if s > 1:
            refuse_dense(node)
        length = (fact.length - 1) * s - 2 * p + d * (conv.kernel[a] - 1) + conv.output_padding[a] + 1
        return fact.upsampled(s, p, s * fact.length - length)

    def past(self, node: Node) -> int:
        """Entries of the past that the newest outputs still need."""
        conv = ConvArgs.of(node)
        a = conv.axis
        return 0 if a is None else (conv.kernel[a] - 1) * conv.dilation[a] // conv.stride[a]

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        conv = ConvArgs.of(node)
        axis, space, total, past = conv.axis, conv.space, low.pulse(conv.x), self.past(node)
        if axis is None:
            return super().lower(node, low)
        s, d, k = conv.stride[axis], conv.dilation[axis], conv.kernel[axis]
        geometry = [[v[a] for a in space] for v in (conv.stride, conv.padding, conv.output_padding, conv.dilation)]
        results: list[Node | None] = []
        for o in range((total - past) * s):
            # the output o of this step is (newest input entry, tap) with o + past * s = i * s + j * d
            pairs = [(i, j) for j in range(k) for i in range(total) if i * s + j * d == o + past * s]
            parts = [
                low.transposed(low.entry(conv.x, i), low.plain(conv.weight, slot=(axis + 2, j)), geometry, conv.groups)
                for i, j in pairs
            ]
            results.append(low.sum(parts) if parts else None)
        zero = low.zeros_like(next(r for r in results if r is not None))
        bias = low.plain(conv.bias) if conv.bias is not None else None
        return [low.add_bias(zero if r is None else r, bias, len(space)) for r in results]
