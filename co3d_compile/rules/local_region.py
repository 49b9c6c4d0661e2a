"""Parts of a network that are local in time, whatever they are written as: a step runs them on a few entries."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor, prod

import torch
from torch.fx import Node

from co3d_compile.ir.found_parts import Region
from co3d_compile.ir.index_equation import NO_COPIES
from co3d_compile.ir.layout import Layout, Place
from co3d_compile.ir.markers import region, settled
from co3d_compile.ir.node_reading import operand_list, shape_of, whole
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import NotResizable
from co3d_compile.ir.time_facts import Fact, NoExtension, Own, combine, fact_of, is_stream, known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.builder import Builder
from co3d_compile.step_graph.region_body import write_body
from co3d_compile.step_graph.step_graph import StepGraph
from co3d_compile.step_graph.stream_ends import StreamEnds

aten = torch.ops.aten


@register(region)
class LocalRegion(Rule):
    """Each block of ``period`` entries is a function of these, of ``before`` in front and of ``after`` behind them."""

    def flow(self, node: Node) -> Fact:
        _, after, period = reach(node)
        inputs = operand_list(node)
        if any(not is_stream(x) or fact_of(x).time is None for x in inputs):
            raise NoExtension("reads what is no stream")
        layout, first = self.layout(node), fact_of(inputs[0])
        fact = combine([fact_of(x) for x in inputs], layout)
        more = layout.shape[whole(node, 5)] - first.clip
        return replace(
            fact,
            delay=-(-(fact.delay + after * fact.spacing) // period) * period,
            end=None if fact.end is None else fact.end - more * fact.rate,
            length=first.length + more,
            copies=NO_COPIES,
            cut=0,
            filled=0,
            own=Own(),
        )

    def layout(self, node: Node) -> Layout:
        batch = known(operand_list(node)[0]).batch
        return Layout.of(shape_of(node), 0 if batch is not None else None, whole(node, 5))

    def block(self, node: Node) -> int:
        return reach(node)[2]

    def past(self, node: Node) -> int:
        before, after, _ = reach(node)
        return before + after

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        part, fact, block = low.program.regions[str(node.args[1])], fact_of(node), low.pulse(node)
        if fact.spacing == 1:
            return self._block(node, low, part, 0, block)
        return [self._block(node, low, part, i, 1)[0] for i in range(block)]

    def _block(self, node: Node, low: StepGraph, part: Region, first: int, block: int) -> list[Node]:
        """Computes so many entries at once, of which the first is new entry ``first``."""
        length, spacing = step_length(part, block), fact_of(node).spacing
        front, clips = length - block - part.after, []
        for x in operand_list(node):
            oldest = _oldest(node, x, first, front)
            entries = low.with_past(x, max(0, -oldest))
            at = len(entries) - low.pulse(x) + oldest
            clips.append(low.as_clip([entries[at + i * spacing] for i in range(length)], known(x)))
        places = [(known(x).batch, known(x).time) for x in operand_list(node)]
        batch, own_batch, time = places[0][0], self.layout(node).batch, self.layout(node).time
        assert batch is not None and own_batch is not None and time is not None
        ends = low.opening(node)
        moved = None if ends is None else _moved_by(node, ends, front, length, block)
        if moved is not None:
            for i, (own, over) in enumerate(places):
                assert own is not None and over is not None
                clips[i] = low.from_rows(clips[i], own, over.dim, moved, range(length))
        result = write_body(low, part.captures, length, clips, _clips_alone(low, clips[0], batch))
        rows = range(front, front + block)
        result = low.call(settled, result, result, 0)  # what it is may hang on how far its clip reaches
        if moved is None:
            return [low.call(aten.select.int, result, time.dim, i) for i in rows]
        back = low.call(aten.neg.default, moved)
        own_rows = low.from_rows(result, own_batch, time.dim, back, rows)
        return [low.call(aten.select.int, own_rows, time.dim, i) for i in range(block)]


def _clips_alone(low: StepGraph, x: Node, batch: Place) -> tuple[Node, int]:
    """Gives the clips a dim of their own, and says which: other factors may be folded into it."""
    if batch.outer * batch.inner == 1:
        return x, batch.dim
    sizes = low.sizes(x)
    before, after = prod(sizes[: batch.dim]), prod(sizes[batch.dim + 1 :])
    return low.call(aten.reshape.default, x, [before * batch.outer, -1, batch.inner * after]), 1


def _moved_by(node: Node, ends: StreamEnds, front: int, length: int, block: int) -> Node:
    """Counts by how many entries the clip that a step runs on begins later, at the ends of a stream: (batch, 1).

    At its front it begins with the stream, and at its end it ends with it, so that its rows there are those of a clip.
    What reads nothing behind its own entries needs no end, and without ``boundary="exact"`` there is none.
    """
    low, fact, x = ends.low, fact_of(node), fact_of(operand_list(node)[0])
    start = low.call(aten.mul.Tensor, ends.steps, block)
    start = low.call(aten.sub.Tensor, start, block + fact.delay + front)
    if not reach(node)[1] or ends.since_last is None:
        return low.call(aten.clamp.default, low.call(aten.neg.default, start), 0)
    assert x.end is not None
    frames = low.call(aten.sub.Tensor, low.call(aten.mul.Tensor, ends.steps, ends.frames), ends.since_last)
    entries = _entries_of(low, frames, Fraction(x.rate), Fraction(x.end))
    sooner = low.call(aten.sub.Tensor, low.call(aten.add.Tensor, start, length), entries)
    over = low.call(aten._to_copy.default, low.call(aten.gt.Scalar, ends.since_last, 0), dtype=torch.int64)
    sooner = low.call(aten.mul.Tensor, low.call(aten.clamp.default, sooner, 0), over)
    later = low.call(aten.clamp.default, low.call(aten.neg.default, start), 0)
    return low.call(aten.sub.Tensor, later, sooner)


def _entries_of(low: Builder, frames: Node, rate: Fraction, end: Fraction) -> Node:
    """Counts how many entries a tensor has, of so many frames.

    Those n for which ``n * rate + end`` is below their number.
    """
    whole_end = end.denominator
    entries = (
        low.call(aten.mul.Tensor, frames, whole_end * rate.denominator) if whole_end * rate.denominator > 1 else frames
    )
    divisor = rate.numerator * whole_end
    entries = low.call(aten.sub.Tensor, entries, int(end * whole_end) * rate.denominator - divisor + 1)
    return low.call(aten.div.Tensor_mode, entries, divisor, rounding_mode="floor") if divisor > 1 else entries


def least_frames(node: Node, program: Program) -> int:
    """Gives how many frames a stream must have for exact ends: as many as fill the clip that a step runs on; 0: any."""
    x = fact_of(operand_list(node)[0])
    if x.end is None or not reach(node)[1]:
        return 0
    return floor((run_entries(node, program) - 1) * x.rate + x.end) + 1


def _oldest(node: Node, x: Node, first: int, front: int) -> int:
    """Finds the oldest entry that is read for new entry ``first``, counted from the first new entry of an input."""
    return first - front * fact_of(node).spacing - fact_of(node).delay + fact_of(x).delay


def run_entries(node: Node, program: Program) -> int:
    """Counts the entries on which a step runs a region at once."""
    block = int(fact_of(node).pulse) if fact_of(node).spacing == 1 else 1
    return step_length(program.regions[str(node.args[1])], block)


def pasts(node: Node, program: Program) -> list[tuple[Node, int]]:
    """Counts the past entries that a region reads of each input."""
    block = int(fact_of(node).pulse) if fact_of(node).spacing == 1 else 1
    front = run_entries(node, program) - block - reach(node)[1]
    return [(x, max(0, -_oldest(node, x, 0, front))) for x in operand_list(node)]


def reach(node: Node) -> tuple[int, int, int]:
    """Counts the entries that a region reads before and after a block, and those of a block."""
    return whole(node, 2), whole(node, 3), whole(node, 4)


def step_length(part: Region, block: int) -> int:
    """Finds the least number of entries, of those confirmed, at which a block has its reach, from a whole period on.

    Raises:
        NotResizable: There is none.
    """
    assert block % part.period == 0, "a step computes whole blocks"
    least = part.shortest - part.period + block
    for length in range(least, least + 256 * part.period, part.period):
        try:
            part.captures.at(length)
        except NotResizable:
            continue
        return length
    raise NotResizable("it takes no clips as short as its reach")
