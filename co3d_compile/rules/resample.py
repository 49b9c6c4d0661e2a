"""Up-sampling: by a whole factor over time, by anything over space."""

from __future__ import annotations

from math import floor

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import LINEAR, NEAREST, sliding_axis
from co3d_compile.ir.index_equation import EDGE, Outside, Reads
from co3d_compile.ir.layout import Axis, Layout
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.time_facts import Fact, NoExtension, combine, constant_of, fact_of, is_stream, known
from co3d_compile.rules.base import Rule, refuse_dense, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
PICTURES = [aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa]


@register(*NEAREST, *LINEAR, *PICTURES)
class Upsample(Rule):
    """Nearest: y[o] = x[floor(o/r)]. Linear without align_corners: between the entries around (o + 1/2)/r - 1/2."""

    why = "resamples time"

    def _geometry(self, node: Node) -> tuple[Node, int, int | None, bool]:
        x = operand(node)
        n = known(x).rank - 2
        return x, n, sliding_axis(x, n), "nearest" in str(node.target)

    def _corners(self, node: Node) -> bool:
        return "nearest" not in str(node.target) and bool(node.args[2])

    def layout(self, node: Node) -> Layout:
        x, n, _, _ = self._geometry(node)
        return known(x).sized(shape_of(node), range(2, 2 + n))

    def factor(self, node: Node) -> int:
        """Computes the factor by which time is up-sampled."""
        x, _, axis, _ = self._geometry(node)
        if axis is None:
            return 1
        old, new = shape_of(x)[2 + axis], shape_of(node)[2 + axis]
        scale = (self._scales(node) or {}).get(axis, new / old)  # 2.1 makes 8 of 4, as 2 does, but other ones
        if new % old or scale != new / old or (self._corners(node) and new != old):
            raise NoExtension("resamples time by a factor that is not whole, or aligns corners")
        return new // old

    def _scales(self, node: Node) -> dict[int, float] | None:
        """Reads the factor of each axis, if factors are given, and not sizes."""
        scales = Arguments(node).given("scale_factors")
        return dict(enumerate(scales)) if isinstance(scales, (list, tuple)) else None

    def flow(self, node: Node) -> Fact:
        x, _, axis, nearest = self._geometry(node)
        place = known(x).time
        if place is not None and place.dim >= 2 and axis is None and shape_of(node) != shape_of(x):
            raise NoExtension("resamples a dim into which time is folded")
        if axis is not None and _of_pictures(node):
            raise NoExtension("resamples time and space at once")
        r = self.factor(node)
        fact = combine([fact_of(x)], self.layout(node))
        if r == 1:
            return fact
        refuse_dense(node)
        return fact.upsampled(r, 0 if nearest else r // 2)

    def reads(self, node: Node) -> Reads:
        r = self.factor(node)
        return Reads(2 * r, 2, 1 - r, 1 + r) if self.past(node) else Reads(r)

    def outside(self, node: Node) -> tuple[Outside, Outside]:
        return EDGE, EDGE

    def past(self, node: Node) -> int:
        """Counts the entries of the past that the oldest new output needs."""
        return 1 if self.factor(node) > 1 and "nearest" not in str(node.target) else 0

    def begins(self, node: Node) -> bool:
        return self.past(node) > 0

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        x, n, axis, nearest = self._geometry(node)
        if axis is None:
            return [self._space(node, low, low.entry(x, i), list(range(n))) for i in range(low.pulse(node))]
        r = self.factor(node)
        space = [a for a in range(n) if a != axis]
        total = low.pulse(x)
        entries = [self._space(node, low, low.entry(x, i), space) for i in range(total)]
        if r == 1:
            return entries
        if nearest:
            return [entries[o // r] for o in range(total * r)]
        newest = r * (total - 1) + r - 1 - r // 2
        return [
            self._between(low, entries, (o + 0.5) / r - 0.5) for o in range(newest - r * (total - 1) + 1, newest + 1)
        ]

    def _between(self, low: StepGraph, entries: list[Node], at: float) -> Node:
        first = floor(at)
        weight = at - first
        if weight == 0:
            return entries[first]
        a = low.call(aten.mul.Tensor, entries[first], 1 - weight)
        return low.call(aten.add.Tensor, a, low.call(aten.mul.Tensor, entries[first + 1], weight))

    def _space(self, node: Node, low: StepGraph, x: Node, space: list[int]) -> Node:
        """Does the same up-sampling of one entry, over space alone."""
        sizes: list[int] | None = [shape_of(node)[2 + a] for a in space]
        old = [int(s) for s in x.meta["val"].shape][2:]
        if sizes == old:
            return x
        nearest = "nearest" in str(node.target)
        given, scales = self._scales(node), None
        if given is not None:  # a factor that is not whole says more than the size does
            sizes, scales = None, [given[a] for a in space]
        if _of_pictures(node):
            return low.call(node.target.overloadpacket.vec, x, sizes, node.args[2], scales)  # type: ignore[union-attr]
        if nearest:
            return low.call(NEAREST[len(space) - 1].vec, x, sizes, scales)
        return low.call(LINEAR[len(space) - 1].vec, x, sizes, node.args[2], scales)


def _of_pictures(node: Node) -> bool:
    """Says whether it computes both dims of a picture together."""
    return getattr(node.target, "overloadpacket", None) in PICTURES


@register(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
class PixelShuffle(Rule):
    """Channels that are moved into space."""

    def mixes(self, node: Node) -> list[tuple[Node, list[int]]]:
        return [(operand(node), [-1, -2, -3])]

    def layout(self, node: Node) -> Layout:
        out = known(operand(node))
        for d in range(out.rank - 3, out.rank):
            out = out.replace(d, [Axis("", shape_of(node)[d])])
        return out


@register(aten.grid_sampler_2d.default)
class GridSample(Rule):
    """Sampling of images at given places: each image of the batch by itself."""

    def mixes(self, node: Node) -> list[tuple[Node, list[int]]]:
        return [(operand(node), [1, 2, 3]), (operand(node, 1), [1, 2, 3])]

    def layout(self, node: Node) -> Layout:
        x, shape = known(operand(node)), shape_of(node)
        return x.replace(2, [Axis("", shape[2])]).replace(3, [Axis("", shape[3])])

    def flow(self, node: Node) -> Fact:
        for n in (operand(node), operand(node, 1)):
            if not is_stream(n) and 0 not in constant_of(n).alike:
                raise NoExtension("meets a constant with a time axis")
        return super().flow(node)

    def entry(self, node: Node, low: StepGraph, i: int) -> Node:
        """Computes a constant once for all images."""
        like = next(low.entry(n, i) for n in node.all_input_nodes if is_stream(n))
        images = [
            low.entry(n, i) if is_stream(n) else low.with_batch_of(low.first_row(n), like)
            for n in (operand(node), operand(node, 1))
        ]
        return low.call(node.target, *images, *node.args[2:])
