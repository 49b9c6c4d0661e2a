"""A value that a loop hands on from one turn to the next: a state of the step graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.layout import Layout
from co3d_compile.ir.markers import store
from co3d_compile.ir.stored_constants import get_constant
from co3d_compile.ir.time_facts import Fact, is_stream
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


class HandedOn:
    """One value that is handed on.

    Args:
        low: The step graph.
        layout: Where the batch is in the value, in which time is no dim.
        start: What the first turn takes for it: a constant, or what comes from an input without time.
    """

    def __init__(self, low: StepGraph, layout: Layout, start: Node) -> None:
        self.low, self.layout, self.start = low, layout, start
        self.constant = None if is_stream(start) or start.op != "get_attr" else _of(low, start)
        self.value: Node | None = None

    def read(self, turns: Sequence[Sequence[Node]], memory: int | None) -> None:
        """Reads what the step before has left.

        Args:
            turns: For each turn of a step the entries that it reads.
            memory: Turns after which nothing is left of a value; None: it stays.
        """
        low = self.low
        # Of an input behind a delay the last entry alone is from no step before the stream.
        given = self.constant is None
        like = low.entry(self.start, low.pulse(self.start) - 1) if given else low.plain(self.start)
        first, self.restore = low.batch_first(like, self.layout)
        self.row = self._row() if self.constant is not None else first
        number = self.row if isinstance(self.row, float) else 0.0
        self.state = low.carry_value(turns, first, number, memory)
        self.value = self.state

    def before(self, fact: Fact, i: int, opening: Node | None = None) -> Node:
        """The value that turn ``i`` of a step takes: where its entry is the first of the stream, the start.

        Args:
            fact: Of what the loop walks along.
            opening: An entry of this turn that is the start.
        """
        assert self.value is not None
        low = self.low
        row = self.row if opening is None else low.batch_first(opening, self.layout)[0]
        certain = low.ends is None and (i > fact.delay or (fact.delay <= 0 and isinstance(row, float)))
        if certain:
            return self.restore(self.value)
        flag = low.start.inside(fact, i - 1, back=False)
        return self.restore(low.start.choose(flag, self.value, row))

    def now(self, value: Node) -> None:
        """Notes the value that a turn has handed on."""
        self.value = self.low.batch_first(value, self.layout)[0]

    def store(self) -> None:
        """Leaves the value for the next step."""
        assert self.value is not None
        self.low.call(store, self.state, self.value)

    def start_like(self, like: Node, layout: Layout | None) -> Node:
        """The start, for as many clips as a tensor has.

        Args:
            like: A tensor of the step graph.
            layout: Where the batch is in it.
        """
        low = self.low
        if self.constant is None:
            return low.plain(self.start)
        whole, place = low.plain(self.start), self.layout.batch
        batch = layout.batch if layout is not None else None
        if place is None or batch is None or not place.alone or not batch.alone:
            return whole
        return low.with_batch_of(whole, like, place.dim, batch.dim)

    def _row(self) -> Node | float:
        """The start of one stream, the batch in front: a number if it is one all over."""
        low, value, place = self.low, self.constant, self.layout.batch
        assert value is not None and place is not None
        rows = value.unflatten(place.dim, (place.outer, place.size, place.inner)).movedim(place.dim + 1, 0)
        if not bool((rows == rows[:1]).all()):
            raise UnsupportedError(
                "A loop over frames starts from other values for each clip of the batch.",
                module_path=low.path,
                hint="Give the start as an input of the model.",
            )
        number = float(rows.flatten()[0])
        if value.is_floating_point() and bool((rows == number).all()):
            return number
        shape = low.sizes(low.batch_first(low.plain(self.start), self.layout)[0])
        return low.constant(f"starts.{self.start.target}", rows[:1].reshape([1, *shape[1:]]).contiguous())


def _of(low: StepGraph, start: Node) -> Tensor:
    return get_constant(low.program.module, str(start.target))
