"""Slices of time: crops, strided slices, selections and pads are kernels with one tap."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import selected, sliced
from co3d_compile.ir.index_equation import EDGE, Kernel, Outside
from co3d_compile.ir.layout import PLAIN, TIME, Axis, Layout
from co3d_compile.ir.markers import hold
from co3d_compile.ir.node_reading import operand, rank_of, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import Fact, fact_of, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.rules.sliding import Renumbering
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.slice.Tensor)
class Slice(Renumbering):
    """``x[a:b:s]`` over time: y[o] = x[o*s + a]."""

    why = "cuts a dim into which time is folded"

    def changed(self, node: Node) -> list[int]:
        x, dim, *cut = sliced(node)
        return [] if cut == [0, shape_of(x)[dim], 1] else [dim]

    def renumbered(self, node: Node, dim: int) -> Kernel:
        x, _, start, end, step = sliced(node)
        return Kernel(1, 1, step, -start, end - shape_of(x)[dim])

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, dim, *cut = sliced(node)
        place = known(x).entry_dims()[dim]
        new = low.entry(x, i)
        return low.call(aten.slice.Tensor, new, place, *cut) if self.changed(node) and place is not None else new

    def window(self, node: Node, low: StepGraph) -> Node:
        x, dim, start, end, step = sliced(node)
        fact = fact_of(x)
        if fact.layout is not None and fact.layout.has(TIME, dim) and fact.length != fact.clip:
            end = fact.length - (shape_of(x)[dim] - end)
            return low.call(aten.slice.Tensor, low.plain(x), dim, start, end, step)
        return low.same(node)


@register(aten.split_with_sizes.default)
class Split(Rule):
    """Parts of a tensor, as they are captured. The pass canonicalize writes them as slices."""

    def layouts(self, node: Node) -> list[Layout]:
        x = operand(node)
        return [known(x).sized(tuple(part.shape), [Arguments(node).dim(x)]) for part in node.meta["val"]]


@register(aten.select.int)
class Select(Renumbering):
    """``x[:, :, a]``: entry a of the clip; every entry of the stream is entry a of some clip."""

    why = "selects from a dim into which time is folded"

    def changed(self, node: Node) -> list[int]:
        return [selected(node)[1]]

    def layout(self, node: Node) -> Layout:
        x, dim, _ = selected(node)
        lay = known(x)
        if lay.dims[dim] == (Axis(TIME, lay.shape[dim]),):
            lay = lay.resize(TIME, 1)
        return lay.replace(dim, [a for a in lay.dims[dim] if a.label]).remove([dim])

    def renumbered(self, node: Node, dim: int) -> Kernel:
        x, _, index = selected(node)
        length = fact_of(x).length
        if length != fact_of(x).clip and index == fact_of(x).clip - 1:
            index = length - 1
        return Kernel(1, 1, 1, -index, index + 1 - length)

    def flow(self, node: Node) -> Fact:
        fact, kernel = super().flow(node), self.kernel(node)
        return fact if kernel is None else replace(fact, layout=self.layout(node))

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, dim, index = selected(node)
        place = known(x).entry_dims()[dim]
        new = low.entry(x, i)
        return new if place is None else low.call(aten.select.int, new, place, index)

    def window(self, node: Node, low: StepGraph) -> Node:
        x, dim, index = selected(node)
        fact = fact_of(x)
        if fact.layout is not None and fact.layout.has(TIME, dim) and index == shape_of(x)[dim] - 1:
            index = -1  # the newest, however long the window is
        return low.call(aten.select.int, low.plain(x), dim, index)


@register(aten.unfold.default)
class Unfold(Renumbering):
    """``x.unfold(dim, k, s)`` over time: y[o] is x[o*s + i], i = 0 … k-1, side by side in a dim of its own."""

    why = "takes windows of a dim into which time is folded"

    def changed(self, node: Node) -> list[int]:
        return [whole(node, 1) % rank_of(operand(node))]

    def layout(self, node: Node) -> Layout:
        return super().layout(node).insert(rank_of(operand(node)), (Axis(PLAIN, whole(node, 2)),))

    def renumbered(self, node: Node, dim: int) -> Kernel:
        return Kernel(whole(node, 2), 1, whole(node, 3))

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        if self.kernel(node) is None:
            return super().lower(node, low)
        x, dim = operand(node), self.changed(node)[0]
        clips = [low.as_clip([low.ref(x, i) for i in taps], known(x)) for taps in self.taps(node, low)]
        last = [*[d for d in range(rank_of(x)) if d != dim], dim]
        return [low.call(aten.permute.default, clip, last) for clip in clips]

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, dim = operand(node), self.changed(node)[0]
        return low.call(aten.unfold.default, low.entry(x, i), known(x).entry_dims()[dim], *node.args[2:4])


@register(
    aten.constant_pad_nd.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
)
class Pad(Renumbering):
    """Pads: over time they are an offset of the index, for what they would fill in lies outside of every stream."""

    why = "pads a dim into which time is folded"

    def pads(self, node: Node) -> tuple[Node, list[tuple[int, int]]]:
        """Reads the operand, and the pad in front and at the end of each of its dims."""
        x = operand(node)
        flat = Arguments(node).integers("pad" if node.target is aten.constant_pad_nd.default else "padding")
        pads = [(0, 0)] * (rank_of(x) - len(flat) // 2)
        return x, pads + [(flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2)]

    def changed(self, node: Node) -> list[int]:
        return [d for d, pad in enumerate(self.pads(node)[1]) if pad != (0, 0)]

    def renumbered(self, node: Node, dim: int) -> Kernel:
        return Kernel(1, 1, 1, *self.pads(node)[1][dim])

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        names = str(node.target)
        value: Outside = EDGE if "replication" in names else None
        if "constant" in names:
            value = float(Arguments(node).number("value"))
        return value, value

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, pads = self.pads(node)
        place = known(x).entry_dims()
        rest = [pad for d, pad in enumerate(pads) if place[d] is not None]
        new = low.entry(x, i)
        if all(pad == (0, 0) for pad in rest):
            return new
        names = str(node.target)
        if "constant" in names:
            flat = [v for pad in reversed(rest) for v in pad]
            return low.call(node.target, new, flat, *node.args[2:])
        first = next(d for d, pad in enumerate(rest) if pad != (0, 0))
        space = rest[min(first, 2) :]  # such a pad is for tensors with one or two dims in front of those that it names
        family = "replication" if "replication" in names else "reflection"
        target = getattr(aten, f"{family}_pad{len(space)}d").default
        return low.call(target, new, [v for pad in reversed(space) for v in pad])


@register(aten.index_select.default)
class IndexSelect(Rule):
    """``index_select`` over other dims than time."""

    why = "gathers entries of the clip by their index"

    def mixes(self, node: Node) -> list[tuple[Node, list[int]]]:
        return [(operand(node), [Arguments(node).dim(operand(node))])]

    def weights(self, node: Node) -> list[object]:
        return [Arguments(node).tensor("index")]

    def layout(self, node: Node) -> Layout:
        x = operand(node)
        d = Arguments(node).dim(x)
        return known(x).replace(d, [Axis("", shape_of(node)[d])])

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        return low.along_dims(node, i)


@register(hold)
class Hold(Rule):
    """An operand that waits for the entries of which its first are copies, or for the first frame."""

    def flow(self, node: Node) -> Fact:
        return fact_of(operand(node)).held_back(bool(node.args[1]))

    def window(self, node: Node, low: StepGraph) -> Node:
        return low.plain(operand(node))
