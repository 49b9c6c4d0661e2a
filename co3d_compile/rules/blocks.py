"""Blocks of time: several entries become one, or one becomes several; the tensors of the clip stay as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from co3d_compile.ir.index_equation import NO_COPIES, Kernel
from co3d_compile.ir.layout import BATCH, PLAIN, TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.markers import blocks, unblocked
from co3d_compile.ir.node_reading import operand, whole
from co3d_compile.ir.time_facts import Fact, combine, fact_of, known
from co3d_compile.rules.base import Rule, no_dense_form, register
from co3d_compile.rules.sliding import SlidingRule
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(blocks)
class Blocks(SlidingRule):
    """Each block of ``k`` entries as one entry: a step takes whole blocks, as it does of a stride."""

    def kernel(self, node: Node) -> Kernel:
        return Kernel(whole(node, 1), 1, whole(node, 1))

    def layout(self, node: Node) -> Layout:
        return blocked(known(operand(node)), whole(node, 1))

    def flow(self, node: Node) -> Fact:
        return blocked_fact(fact_of(operand(node)), whole(node, 1))

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        layout = known(operand(node)).resize(TIME, whole(node, 1))
        result = known(node).entry().sizes()
        clips = [low.as_clip([low.ref(operand(node), tap) for tap in taps], layout) for taps in self.taps(node, low)]
        return [low.call(aten.reshape.default, clip, result) for clip in clips]

    def window(self, node: Node, low: StepGraph) -> Node:
        return low.plain(operand(node))


@register(unblocked)
class Unblocked(Rule):
    """Each place that an entry has in the dim of time as an entry of its own."""

    def layout(self, node: Node) -> Layout:
        layout = unfolded(known(operand(node)))
        assert layout is not None
        return layout

    def flow(self, node: Node) -> Fact:
        x = operand(node)
        fact, place = unblocked_fact(fact_of(x)), known(x).time
        assert fact is not None and place is not None
        if fact.dense:
            raise no_dense_form(f"Giving {place.inner} entries for one", x)
        return fact

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        x, place = operand(node), known(operand(node)).time
        assert place is not None
        entries = [low.entry(x, i) for i in range(low.pulse(x))]
        return [low.call(aten.select.int, e, place.dim, j) for e in entries for j in range(place.inner)]

    def window(self, node: Node, low: StepGraph) -> Node:
        return low.plain(operand(node))


def blocked(layout: Layout, k: int) -> Layout:
    """The layout where each ``k`` entries are one.

    Raises:
        LayoutLost: They are no whole blocks.
    """
    place = layout.time
    if place is None or place.size % k:
        raise LayoutLost
    pair = (Axis(TIME, place.size // k), Axis(PLAIN, k))
    axes = [a for axis in layout.dims[place.dim] for a in (pair if axis.label == TIME else (axis,))]
    return layout.replace(place.dim, axes)


def unfolded(layout: Layout) -> Layout | None:
    """The layout where each place in the dim of time is an entry.

    None where there is one, or time is not in front.
    """
    place = layout.time
    if place is None or place.outer != 1 or place.inner == 1 or layout.has(BATCH, place.dim):
        return None
    return layout.replace(place.dim, [Axis(TIME, place.size * place.inner)])


def blocked_fact(fact: Fact, k: int) -> Fact:
    """What is known of a tensor of which ``k`` entries are one."""
    assert fact.layout is not None
    return fact.through(Kernel(k, 1, k), blocked(fact.layout, k))


def unblocked_fact(fact: Fact) -> Fact | None:
    """What is known of a tensor of which each place in the dim of time is an entry.

    None where that says nothing.
    """
    layout = unfolded(fact.layout) if fact.layout is not None else None
    place = fact.time
    if layout is None or place is None:
        return None
    return replace(combine([fact.upsampled(place.inner, 0)], layout), per_entry=False, copies=NO_COPIES)
