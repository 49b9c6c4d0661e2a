"""Operators that slide over time: one index equation each, ``y[o] = f(x[o*s + i*d - p], i = 0 … k-1)``.

A family gives the equation (``kernel``) and what it reads outside of its operand. How the output flows, which
arguments lose their padding, and which entries a step reads is the same for all of them, and written here.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from co3d_compile.ir.aten_operators import SlidingArgs
from co3d_compile.ir.index_equation import EDGE, Kernel
from co3d_compile.ir.layout import TIME, Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.time_facts import Fact, NoExtension, fact_of, kernel_of, known
from co3d_compile.rules.base import Rule
from co3d_compile.step_graph.step_graph import StepGraph


class SlidingRule(Rule):
    """Operators that slide over their first operand."""

    def flow(self, node: Node) -> Fact:
        fact, kernel = super().flow(node), self.kernel(node)
        if kernel is None or kernel.identity:
            return fact
        x = fact_of(operand(node))
        front, back = self.outside(node)
        return x.through(kernel, self.layout(node).resize(TIME, x.clip), (front == EDGE, back == EDGE))

    def taps(self, node: Node, low: StepGraph) -> list[list[int]]:
        """Lists for each new entry ``o`` the entries ``o*s + i*d`` of the operand (and history) that it reads."""
        kernel = kernel_of(node)
        return [[o * kernel.s + i * kernel.d for i in range(kernel.k)] for o in range(low.pulse(node))]

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        return [self.entry(node, low, tap) for tap, *_ in self.taps(node, low)]


class KernelRule(SlidingRule):
    """Operators whose kernel slides over the last dims of a tensor, time or space: convolutions and pools."""

    def args(self, node: Node) -> SlidingArgs:
        """Reads the operator's arguments."""
        raise NotImplementedError

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        args = self.args(node)
        return [(args.x, [args.first + a for a in args.space if args.moves(a)])]

    def layout(self, node: Node) -> Layout:
        args = self.args(node)
        return known(args.x).sized(shape_of(node), range(args.first, args.first + args.dims))

    def kernel(self, node: Node) -> Kernel | None:
        args = self.args(node)
        return args.over(args.axis) if args.axis is not None else None

    def strip(self, node: Node) -> None:
        args = self.args(node)
        assert args.axis is not None
        args.padding[args.axis] = 0
        args.write(node)


class Renumbering(SlidingRule):
    """Crops, selections and pads: over time they give entries other numbers, and compute nothing."""

    def changed(self, node: Node) -> list[int]:
        """Finds the dims that lose or gain entries."""
        raise NotImplementedError

    def renumbered(self, node: Node, dim: int) -> Kernel:
        """Gives the index equation if time is this dim."""
        raise NotImplementedError

    def layout(self, node: Node) -> Layout:
        x, changed = known(operand(node)), self.changed(node)
        if any(len(x.dims[d]) > 1 and any(a.label for a in x.dims[d]) for d in changed):
            raise LayoutLost
        return x.sized(shape_of(node), changed)

    def kernel(self, node: Node) -> Kernel | None:
        place = known(operand(node)).time
        over_time = place is not None and place.alone and place.dim in self.changed(node)
        return self.renumbered(node, place.dim) if place is not None and over_time else None

    def flow(self, node: Node) -> Fact:
        place = known(operand(node)).time
        if place is not None and not place.alone and place.dim in self.changed(node):
            raise NoExtension(self.reason(node))
        return super().flow(node)
