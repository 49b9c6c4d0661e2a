"""Where time is in a captured graph, as far as loops ask: which tensors come from frames, and along which dim."""

from __future__ import annotations

import operator
from contextlib import suppress
from functools import cached_property

from torch import Tensor
from torch.fx import Node

from co3d_compile.analysis.loop_layouts import annotate_body
from co3d_compile.canonical.canonical_graph import canonicalize
from co3d_compile.ir.aten_operators import BATCH_NORMS, SAME
from co3d_compile.ir.frame_loop import is_loop
from co3d_compile.ir.graph_walks import in_order
from co3d_compile.ir.layout import BATCH, TIME, Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, operands, shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, Fact, Kind, NoExtension, fact_of
from co3d_compile.rules import rule_for
from co3d_compile.rules.blocks import unfolded
from co3d_compile.rules.failures import noting


class TimeDims:
    """The dims of frames, found by the layouts that rules give. What is found lies on the nodes until it is forgotten.

    Operators that have no rule as they were captured (``x.unfold``, writing into slices, indices along other dims) may
    have one in canonical form.

    Args:
        program: As captured.
        is_canonical: Whether it is in canonical form.
    """

    def __init__(self, program: Program, is_canonical: bool = False) -> None:
        self.program, self.is_canonical = program, is_canonical
        dims = {i.name: i.time_dim for i in program.inputs}
        self.timed: set[Node] = set()
        self._known: set[Node] = set()
        for node in program.graph.nodes:
            if node.op == "placeholder":
                dim = dims[node.name]
                self._note(node, Layout.of(shape_of(node), 0, dim))
                if dim is not None:
                    self.timed.add(node)
            elif any(n in self.timed for n in node.all_input_nodes):
                self.timed.add(node)

    def is_time(self, node: Node, dim: int) -> bool:
        """Says whether a dim counts entries, and nothing else: frames, or several of each frame (a copy, a place)."""
        layout = self._layout(node)
        place = (unfolded(layout) or layout).time if layout is not None else None
        return place is not None and place.alone and place.dim == dim

    def has_entries(self, node: Node, dim: int, otherwise: bool) -> bool:
        """Says whether a dim counts frames or clips, alone or folded into it; ``otherwise`` where that is not known."""
        layout = self._layout(node)
        return otherwise if layout is None else layout.has(TIME, dim) or layout.has(BATCH, dim)

    def look_again(self, first: Node) -> None:
        """Takes account of what was written from a node on."""
        self.__dict__.pop("_canonical", None)
        node = first
        while node.op != "root":
            self._known.discard(node)
            node.meta.pop(KEY, None)
            if any(n in self.timed for n in node.all_input_nodes):
                self.timed.add(node)
            node = node.next

    def forget(self) -> None:
        """Takes what was found off the nodes."""
        for node in self.program.graph.nodes:
            node.meta.pop(KEY, None)

    def _layout(self, node: Node) -> Layout | None:
        for at in in_order([node], self._unknown):
            if at not in self._known:
                self._note(at, self._of(at))
        return fact_of(node).layout

    def _unknown(self, node: Node) -> list[Node]:
        """Lists the operands whose layouts are needed first."""
        return [n for n in operands(node) if node not in self._known and n in self.timed and n not in self._known]

    def _note(self, node: Node, layout: Layout | None) -> None:
        self._known.add(node)
        if layout is not None:
            node.meta[KEY] = Fact(Kind.STREAM, layout)

    def _of(self, node: Node) -> Layout | None:
        """Finds the layout of a node whose operands have theirs."""
        if is_loop(node):
            annotate_body(node)
            return None
        if node not in self.timed:
            return None
        return self._by_rule(node) or self._in_canonical_form(node)

    def _by_rule(self, node: Node) -> Layout | None:
        source = operand(node) if node.target is operator.getitem else node
        if any(fact_of(n).layout is None for n in operands(source) if n in self.timed and not is_loop(source)):
            return None
        if node.target in SAME or source.target in BATCH_NORMS:  # of which the first result alone is read
            return fact_of(operands(node)[0]).layout
        rule, layout = rule_for(node.target), None
        with noting(self.program, node), suppress(LayoutLost, NoExtension):
            layout = rule.layout(node) if rule is not None else None
        alike = isinstance(node.meta["val"], Tensor) and layout is not None and layout.shape == shape_of(node)
        return layout if alike else None

    def _in_canonical_form(self, node: Node) -> Layout | None:
        """Finds the layout of what becomes of a node."""
        if self.is_canonical:
            return None
        times, became = self._canonical
        return times._layout(became[node.name]) if node.name in became else None

    @cached_property
    def _canonical(self) -> tuple[TimeDims, dict[str, Node]]:
        """Finds the dims of frames in a copy in canonical form, and what has the value of each captured node."""
        copied = self.program.copied()
        for node in copied.graph.nodes:
            node.meta.pop(KEY, None)
        canonicalize(copied, bodies=False)
        nodes = {n.name: n for n in copied.graph.nodes}
        return TimeDims(copied, is_canonical=True), {old: nodes[new] for old, new in copied.places().items()}
