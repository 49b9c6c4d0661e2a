"""The step graph in the making: what each clip node became, entries without a time dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node, map_arg

from co3d_compile.ir.layout import BATCH, PLAIN, TIME, Axis, Layout
from co3d_compile.ir.markers import undelayed
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import get_constant
from co3d_compile.ir.time_facts import Fact, fact_of, is_stream, known
from co3d_compile.step_graph.builder import Entry
from co3d_compile.step_graph.memory import Memory, leading
from co3d_compile.step_graph.past_entries import AgedEntry, ChosenEntries, origin

aten = torch.ops.aten


class StepGraph(Memory):
    """The step graph, built node by node, and what each node of the clip graph became.

    Attributes:
        windows: The results that are computed on windows.
        window_entries: The entries that each window marker reads.
        window_facts: The facts, as window results, of what is lowered like the entry of a stream.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.windows: dict[Node, Node] = {}
        self.window_entries: dict[Node, Sequence[Entry]] = {}
        self.window_facts: dict[Node, Fact] = {}
        self.tuples: dict[Node, list[list[Node]]] = {}

    # --- reading what clip nodes became

    def window_fact(self, node: Node) -> Fact:
        """The fact that says from which windows a result comes."""
        return self.window_facts.get(node, fact_of(node))

    def pulse(self, node: Node) -> int:
        """Counts the entries of a tensor that there are: its new ones, and past ones where it is a history."""
        return len(self.streams[node]) if node in self.streams else int(fact_of(node).pulse)

    def ref(self, node: Node, i: int) -> Entry:
        """Gives entry ``i``, as a node or a slot of a queue."""
        return self.streams[node][i]

    def with_past(self, x: Node, past: int) -> Sequence[Entry]:
        """Gives the new entries of a tensor behind so many past ones: a tensor and a delayed one share their memory."""
        if not past:
            return self.streams[x]
        source, delay = undelayed(x)
        entries = self.past(self.streams[source], past + delay, source, fact_of(source).layout)
        return ChosenEntries(entries, list(range(past + len(self.streams[x])))) if delay else entries

    def entry(self, node: Node, i: int) -> Node:
        """Gives entry ``i`` of a streaming tensor, as a node."""
        return self.resolve(self.streams[node][i])

    def of_rank(self, x: Node, layout: Layout) -> Node:
        """Gives an entry a dim of one for a single clip's batch, where its own is gone with those that were reduced."""
        entry = layout.entry()
        return x if len(self.sizes(x)) == entry.rank else self.call(aten.reshape.default, x, entry.sizes())

    def whole_entry(self, node: Node, i: int) -> Node:
        """Gives entry ``i`` with a dim of one where time is alone: for an operator that takes that dim for another."""
        place, new = fact_of(node).time, self.entry(node, i)
        return self.call(aten.unsqueeze.default, new, place.dim) if place is not None and place.alone else new

    def without_time(self, node: Node, x: Node) -> Node:
        """Drops the dim of one, where time is alone, of an entry of a node's output."""
        place = fact_of(node).time
        whole = place is not None and place.alone and len(self.sizes(x)) == known(node).rank
        return self.call(aten.squeeze.dim, x, place.dim) if place is not None and whole else x

    def aged(self, node: Node, i: int) -> AgedEntry:
        """Finds entry ``i`` as what was computed in this step or an earlier one."""
        steps, entry = origin(self.streams[node], i)
        return AgedEntry(self.resolve(entry), steps)

    def plain(self, node: Node, slot: tuple[int, int] | None = None) -> Node:
        """Gives a constant, or one slice of it, or the result of a window."""
        if node in self.window_entries and node not in self.windows:
            layout = fact_of(operand(node)).layout
            assert layout is not None
            self.windows[node] = self.as_clip(self.window_entries[node], layout)
        if node in self.windows:
            return self.windows[node]
        if node.op != "get_attr":
            raise AssertionError(f"{node.name} is neither constant nor window")
        name = str(node.target)
        value = get_constant(self.program.module, name)
        if slot is None:
            return self.constant(name, value)
        dim, index = slot
        return self.constant(f"{name}_tap_{index}", value.select(dim, index).contiguous())

    def one_of(self, constant: Node, dim: int) -> Node:
        """Selects from a constant that is the same along a dim, so that it has no such dim."""
        return self.call(aten.select.int, self.plain(constant), dim, 0)

    def first_row(self, constant: Node, dim: int = 0) -> Node:
        """Takes the first row of a constant of which all rows are the same."""
        return self.call(aten.slice.Tensor, self.plain(constant), dim, 0, 1)

    def as_clip(self, refs: Sequence[Entry], layout: Layout) -> Node:
        """Joins the entries to one tensor in which time is an ordinary dim, laid out as in the clip."""
        time = layout.time
        assert time is not None
        length = len(refs)
        target = layout.resize(TIME, length)
        if length == 1 and not time.alone:
            return self.resolve(refs[0])
        if length == 1:
            return self.call(aten.unsqueeze.default, self.resolve(refs[0]), time.dim)
        entry = layout.entry()
        if not leading(layout):
            refs = [self.batch_first(self.resolve(r), layout)[0] for r in refs]
        stacked = self.stacked(refs)
        axes = [a for dim in entry.dims for a in dim]
        source = [Axis(BATCH, 0), Axis(TIME, length), *[a for a in axes if a.label != BATCH]]
        wanted = [a for dim in _split_like(target, entry) for a in dim]
        order, used = [], [False] * len(source)
        for axis in wanted:
            i = next(
                i
                for i, a in enumerate(source)
                if not used[i] and a.label == axis.label and (a.label != PLAIN or a.size == axis.size)
            )
            used[i] = True
            order.append(i)
        view = self.call(aten.reshape.default, stacked, [-1 if a.label == BATCH else a.size for a in source])
        if order != sorted(order):
            view = self.call(aten.permute.default, view, order)
        return self.call(aten.reshape.default, view, target.sizes())

    def with_time_of_one(self, node: Node, i: int) -> Node:
        """Writes the operator on entries ``i`` of its operands, each given a time dim of one."""
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda n: self.whole_entry(n, i) if is_stream(n) else self.plain(n)
        )
        return self.without_time(node, self.call(node.target, *args, **kwargs))

    def along_dims(self, node: Node, i: int) -> Node:
        """Writes an operator along dims on entry ``i`` of its operand, its dims counted without time.

        Along time alone it stands on a time dim of one.
        """
        x, given = operand(node), Arguments(node)
        name, place = "dim" if given.given("dims") is None else "dims", known(x).entry_dims()
        dims = [e for d in given.dims(x, name) if (e := place[d]) is not None]
        if not dims:
            return self.with_time_of_one(node, i)
        args, kwargs = given.changed(**{name: dims[0] if isinstance(given.given(name), int) else dims})
        return self.call(node.target, self.entry(x, i), *map_arg(args[1:], self.plain), **kwargs)

    def same(self, node: Node) -> Node:
        """Writes the operator as it stands in the clip."""
        args, kwargs = map_arg((node.args, node.kwargs), self.plain)
        return self.call(node.target, *args, **kwargs)

    def resized(self, node: Node) -> Node:
        """Writes a view or expansion with the window's own length, and any batch."""
        fact = fact_of(node)
        if fact.layout is None or node.target not in VIEWS:
            return self.same(node)
        layout = fact.layout
        if layout.time is not None and fact.length != fact.clip:
            layout = layout.resize(TIME, fact.length)
        return self.call(node.target, self.plain(operand(node)), layout.sizes())


VIEWS = {aten.reshape.default, aten.expand.default}


def _split_like(target: Layout, entry: Layout) -> list[tuple[Axis, ...]]:
    """Writes the dims of ``target`` with plain axes as they are in ``entry`` (a layout merges neighbours)."""
    pieces = [a for dim in entry.dims for a in dim if not a.label]
    result = []
    for dim in target.dims:
        axes: list[Axis] = []
        for axis in dim:
            if axis.label:
                axes.append(axis)
                continue
            rest = axis.size
            while rest > 1:
                piece = pieces.pop(0)
                axes.append(piece)
                rest //= piece.size
        result.append(tuple(axes))
    return result
