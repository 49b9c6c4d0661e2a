"""Convolutions: the kernel slides over time, or over space alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import ConvArgs, FoldArgs
from co3d_compile.ir.layout import TIME, Axis, Layout
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.time_facts import fact_of, known
from co3d_compile.rules.base import register
from co3d_compile.rules.sliding import KernelRule
from co3d_compile.rules.spreading import Spread, SpreadingRule
from co3d_compile.step_graph.convolution_forms import TapConvolution, choose, pairs
from co3d_compile.step_graph.entry_operators import MANY
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.conv1d, aten.conv2d, aten.conv3d)
class Convolution(KernelRule):
    """y[o] = sum_i w[i] x[o*s + i*d - p], the clip's own equation."""

    why = "time is among the channels or folded into a spatial dim that the kernel slides over"

    def args(self, node: Node) -> ConvArgs:
        return ConvArgs.of(node)

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        conv = self.args(node)
        ((x, space),) = super().mixes(node)
        return [(x, [conv.first - 1, *space])]

    def weights(self, node: Node) -> Iterable[object]:
        return node.args[1:3]

    def layout(self, node: Node) -> Layout:
        channels = self.args(node).first - 1
        out = super().layout(node)
        single = [a for a in out.dims[channels] if a == Axis(TIME, 1)]
        return out.replace(channels, [*single, Axis("", shape_of(node)[channels])])

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        conv = self.args(node)
        if conv.axis is None:
            return super().lower(node, low)
        bias = low.plain(conv.bias) if conv.bias is not None else None
        positions = self.taps(node, low)
        if len(positions) >= MANY and low.is_vector(low.entry(conv.x, positions[0][0])):
            return self._together(conv, low, positions, bias)
        taps = [low.plain(conv.weight, slot=(conv.axis + 2, i)) for i in range(conv.kernel[conv.axis])]
        stride, padding, dilation = ([v[a] for a in conv.space] for v in (conv.stride, conv.padding, conv.dilation))
        cut = TapConvolution(taps, bias, stride, padding, dilation, conv.groups)
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
                results[o] = getattr(cut, form)(low, [low.ref(conv.x, i) for i in at])
        return [results[o] for o in range(len(positions))]

    def _together(self, conv: ConvArgs, low: StepGraph, at: list[list[int]], bias: Node | None) -> list[Node]:
        """Writes one convolution for all outputs of a step: of samples and features, which have no space."""
        rows = low.stacked([low.ref(conv.x, i) for i in range(at[0][0], at[-1][-1] + 1)])
        apart = at[0][1] - at[0][0] if len(at[0]) > 1 else 1  # of the taps in the stream: farther with dense strides
        sizes = ([at[1][0] - at[0][0]], [0], [apart], conv.groups)
        x = low.call(aten.permute.default, rows, [0, 2, 1])
        result = low.call(aten.conv1d.default, x, low.plain(conv.weight), bias, *sizes)
        return low.entries_of(result, 2, range(len(at)))

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        conv = self.args(node)
        bias = low.plain(conv.bias) if conv.bias is not None else None
        sizes = (conv.stride, conv.padding, conv.dilation, conv.groups)
        result = low.call(node.target, low.whole_entry(conv.x, i), low.plain(conv.weight), bias, *sizes)
        return low.without_time(node, result)


@register(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
class TransposedConvolution(SpreadingRule):
    """y[o] = sum over i, j with o = i*s + j*d - p of w[j] x[i]."""

    def spread(self, node: Node) -> Spread | None:
        conv = ConvArgs.of(node)
        a = conv.axis
        if a is None:
            return None
        return Spread(conv.kernel[a], conv.stride[a], conv.padding[a], conv.dilation[a], conv.output_padding[a])

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        conv = ConvArgs.of(node)
        return [(conv.x, [conv.first - 1, *(conv.first + a for a in conv.space)])]

    def weights(self, node: Node) -> Iterable[object]:
        return node.args[1:3]

    def layout(self, node: Node) -> Layout:
        conv = ConvArgs.of(node)
        return known(conv.x).sized(shape_of(node), range(conv.first - 1, conv.first + conv.dims))

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        over, x, past = self.spread(node), operand(node), self.past(node)
        many = over is not None and (low.pulse(x) - past) * over.s >= MANY
        if over is None or not many or not low.is_vector(low.entry(x, 0)):
            return super().lower(node, low)
        return self._together(ConvArgs.of(node), over, low, past)

    def _together(self, conv: ConvArgs, over: Spread, low: StepGraph, past: int) -> list[Node]:
        """Writes one transposed convolution for all outputs of a step: of samples and features, which have no space."""
        count = low.pulse(conv.x)
        rows = low.call(aten.permute.default, low.stacked([low.ref(conv.x, i) for i in range(count)]), [0, 2, 1])
        bias = low.plain(conv.bias) if conv.bias is not None else None
        missing = max(0, over.s - over.d * (over.k - 1) - 1)
        sizes = ([over.s], [0], [missing], conv.groups, [over.d])
        result = low.call(aten.conv_transpose1d.default, rows, low.plain(conv.weight), bias, *sizes)
        return low.entries_of(result, 2, range(past * over.s, count * over.s))

    def tap(self, node: Node, low: StepGraph, i: int, j: int) -> Node:
        conv = ConvArgs.of(node)
        assert conv.axis is not None
        geometry = [[v[a] for a in conv.space] for v in (conv.stride, conv.padding, conv.output_padding, conv.dilation)]
        weight = low.plain(conv.weight, slot=(conv.axis + 2, j))
        return low.transposed(low.entry(conv.x, i), weight, geometry, conv.groups)

    def finished(self, node: Node, low: StepGraph, total: Node) -> Node:
        conv = ConvArgs.of(node)
        bias = low.plain(conv.bias) if conv.bias is not None else None
        return low.add_bias(total, bias, len(conv.space))


@register(aten.col2im.default)
class Fold(SpreadingRule):
    """``fold``: columns that are added where they overlap. Over time a column is an entry: overlap-and-add."""

    why = "time is folded into the columns or their features"

    def axis(self, node: Node) -> int | None:
        """Finds which of the two dims that the columns walk through is time, or None."""
        fold, place = FoldArgs.of(node), known(operand(node)).time
        if place is None or place.dim != 2 or rank_of(operand(node)) != 3:
            return None
        if place.outer == 1 and place.inner == fold.blocks[1] and (fold.blocks[0] > 1 or fold.blocks[1] > 1):
            return 0
        return 1 if place.outer == fold.blocks[0] and place.inner == 1 else None

    def spread(self, node: Node) -> Spread | None:
        fold, a = FoldArgs.of(node), self.axis(node)
        return None if a is None else Spread(*fold.along(a), fold.more(a))

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        x = operand(node)
        return [(x, [rank_of(x) - 2, *([rank_of(x) - 1] if self.axis(node) is None else [])])]

    def layout(self, node: Node) -> Layout:
        x, shape, a = known(operand(node)), shape_of(node), self.axis(node)
        ends = [() if size == 1 else (Axis("", size),) for size in shape[-3:]]
        if a is not None:
            ends[1 + a] = (Axis(TIME, shape[-2 + a]),)
        return Layout((*x.dims[:-2], *ends))

    def tap(self, node: Node, low: StepGraph, i: int, j: int) -> Node:
        fold, a = FoldArgs.of(node), self.axis(node)
        assert a is not None
        x, other, channels = low.whole_entry(operand(node), i), 1 - a, shape_of(node)[-3]
        blocks, size, taps = fold.blocks[other], fold.size[other], fold.kernel[other]
        x = low.call(aten.reshape.default, x, [-1, channels, *fold.kernel, blocks])
        x = low.call(aten.select.int, x, 2 + a, j)
        if (taps, blocks) != (1, size) or fold.padding[other]:
            x = low.call(aten.reshape.default, x, [-1, channels * taps, blocks])
            geometry = [[1, taps], [1, fold.dilation[other]], [0, fold.padding[other]], [1, fold.stride[other]]]
            x = low.call(aten.col2im.default, x, [1, size], *geometry)
        return low.call(aten.reshape.default, x, [-1, channels, size])
