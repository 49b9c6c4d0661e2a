"""Slices of time: crops, strided slices, selections and pads are kernels with one tap."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.index_equation import EDGE, Kernel, Outside
from co3d_compile.ir.layout import TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.markers import hold
from co3d_compile.ir.node_reading import argument, operand, rank_of, shape_of
from co3d_compile.ir.time_facts import Fact, NoExtension, combine, fact_of, known
from co3d_compile.rules.base import Rule, register

if TYPE_CHECKING:
    from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten.slice.Tensor)
class Slice(Rule):
    """``x[a:b:s]`` over time: y[o] = x[o*s + a]."""

    def layout(self, node: Node) -> Layout:
        x, dim, _, _, _ = sliced(node)
        lay = known(x)
        size = shape_of(node)[dim]
        if size == lay.shape[dim]:
            return lay
        if any(a.label for a in lay.dims[dim]) and len(lay.dims[dim]) > 1:
            raise LayoutLost
        return lay.resize_dim(dim, size)

    def kernel(self, node: Node) -> Kernel | None:
        x, dim, start, end, step = sliced(node)
        place = known(x).time
        if place is None or place.dim != dim or not place.alone:
            return None
        return Kernel(1, 1, step, -start, end - shape_of(x)[dim])

    def flow(self, node: Node) -> Fact:
        x, dim, start, end, step = sliced(node)
        fact, place = fact_of(x), known(x).time
        if (start, end, step) == (0, shape_of(x)[dim], 1) or place is None or place.dim != dim:
            return combine([fact], self.layout(node))
        kernel = self.kernel(node)
        if kernel is None:
            raise NoExtension("cuts a dim into which time is folded")
        return fact.through(kernel, self.layout(node).resize(TIME, fact.clip))

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, dim, start, end, step = sliced(node)
        place = known(x).entry_dims()[dim]
        new = low.entry(x, i)
        if place is None or (start, end, step) == (0, shape_of(x)[dim], 1):
            return new
        return low.call(aten.slice.Tensor, new, place, start, end, step)

    def window(self, node: Node, low: StepGraph) -> Node:
        x, dim, start, end, step = sliced(node)
        fact = fact_of(x)
        if fact.layout is not None and fact.layout.has(TIME, dim) and fact.length != fact.clip:
            end = fact.length - (shape_of(x)[dim] - end)
            return low.call(aten.slice.Tensor, low.plain(x), dim, start, end, step)
        return low.same(node)


@register(aten.select.int)
class Select(Rule):
    """``x[:, :, a]``: entry a of the clip; every entry of the stream is entry a of some clip."""

    def _args(self, node: Node) -> tuple[Node, int, int]:
        x = operand(node)
        dim = argument(node, 1, "dim") % rank_of(x)
        index = argument(node, 2, "index")
        return x, dim, index % shape_of(x)[dim]

    def layout(self, node: Node) -> Layout:
        x, dim, _ = self._args(node)
        lay = known(x)
        if lay.has(TIME, dim):
            lay = lay.resize(TIME, 1) if lay.dims[dim] == (Axis(TIME, lay.shape[dim]),) else lay
        return lay.replace(dim, [a for a in lay.dims[dim] if a.label]).remove([dim])

    def kernel(self, node: Node) -> Kernel | None:
        x, dim, index = self._args(node)
        fact, place = fact_of(x), known(x).time
        if place is None or place.dim != dim or not place.alone:
            return None
        if fact.length != fact.clip and index == place.size - 1:
            index = fact.length - 1
        return Kernel(1, 1, 1, -index, index + 1 - fact.length)

    def flow(self, node: Node) -> Fact:
        x, dim, _ = self._args(node)
        fact, place = fact_of(x), known(x).time
        if place is None or place.dim != dim:
            return combine([fact], self.layout(node))
        kernel = self.kernel(node)
        if kernel is None:
            raise NoExtension("selects from a dim into which time is folded")
        out = fact.through(kernel, known(x).resize(TIME, fact.clip))
        return replace(out, layout=self.layout(node), length=1, crop=fact.crop - kernel.p)

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, dim, index = self._args(node)
        place = known(x).entry_dims()[dim]
        new = low.entry(x, i)
        return new if place is None else low.call(aten.select.int, new, place, index)

    def window(self, node: Node, low: StepGraph) -> Node:
        x, dim, index = self._args(node)
        fact = fact_of(x)
        if fact.layout is not None and fact.layout.has(TIME, dim) and index == shape_of(x)[dim] - 1:
            index = -1  # the newest, however long the window is
        return low.call(aten.select.int, low.plain(x), dim, index)


@register(
    aten.constant_pad_nd.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
)
class Pad(Rule):
    """Pads: over time they are an offset of the index, for what they would fill in lies outside of every stream."""

    def pads(self, node: Node) -> tuple[Node, list[tuple[int, int]]]:
        """Operand, and the pad in front and at the end of each of its dims."""
        x = operand(node)
        flat = list(argument(node, 1, "padding"))
        pads = [(0, 0)] * (rank_of(x) - len(flat) // 2)
        return x, pads + [(flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2)]

    def layout(self, node: Node) -> Layout:
        x, pads = self.pads(node)
        lay = known(x)
        for d, pad in enumerate(pads):
            if pad != (0, 0):
                if any(a.label for a in lay.dims[d]) and len(lay.dims[d]) > 1:
                    raise LayoutLost
                lay = lay.resize_dim(d, shape_of(node)[d])
        return lay

    def kernel(self, node: Node) -> Kernel | None:
        x, pads = self.pads(node)
        place = known(x).time
        if place is None or pads[place.dim] == (0, 0) or not place.alone:
            return None
        return Kernel(1, 1, 1, *pads[place.dim])

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        names = str(node.target)
        value: Outside = EDGE if "replication" in names else None
        if "constant" in names:
            value = float(argument(node, 2, "value", 0.0))
        return value, value

    def flow(self, node: Node) -> Fact:
        x, pads = self.pads(node)
        place = known(x).time
        if place is not None and pads[place.dim] != (0, 0) and not place.alone:
            raise NoExtension("pads a dim into which time is folded")
        fact = fact_of(x)
        kernel = self.kernel(node)
        layout = self.layout(node)
        if kernel is None:
            return combine([fact], layout)
        edge = self.outside(node)[0] == EDGE
        return fact.through(kernel, layout.resize(TIME, fact.clip), (edge, edge))

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
        space = rest[-max(1, sum(pad != (0, 0) for pad in rest)) :]
        family = "replication" if "replication" in names else "reflection"
        target = getattr(aten, f"{family}_pad{len(space)}d").default
        return low.call(target, new, [v for pad in reversed(space) for v in pad])


@register(aten.index_select.default)
class IndexSelect(Rule):
    """``index_select`` over other dims than time."""

    def mixes(self, node: Node) -> list[tuple[Node, list[int]]]:
        x = operand(node)
        return [(x, [argument(node, 1, "dim")])]

    def layout(self, node: Node) -> Layout:
        x = operand(node)
        d = argument(node, 1, "dim") % rank_of(x)
        return known(x).replace(d, [Axis("", shape_of(node)[d])])

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        x, index = node.args[0], node.args[2]
        assert isinstance(x, Node) and isinstance(index, Node)
        d = known(x).entry_dims()[argument(node, 1, "dim") % rank_of(x)]
        return low.call(node.target, low.entry(x, i), d, low.plain(index))

    def reason(self, node: Node) -> str:
        return "gathers entries of the clip by their index"


@register(hold)
class Hold(Rule):
    """An operand that waits for the entries of which its first are copies, or for the first frame."""

    def flow(self, node: Node) -> Fact:
        return fact_of(operand(node)).held_back(bool(node.args[1]))

    def window(self, node: Node, low: StepGraph) -> Node:
        return low.plain(operand(node))
