"""Join starts: what stands in front of a stream, computed from the first entries of streams, comes out at its start."""

from __future__ import annotations

from dataclasses import replace as with_fields
from math import ceil

import torch
from torch.fx import Node

from co3d_compile.analysis.starts import last_of_front
from co3d_compile.ir.aten_operators import selected, sliced
from co3d_compile.ir.constant_facts import Constant
from co3d_compile.ir.graph_edits import delay, insert, insert_constant, insert_marker, replace
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.layout import TIME
from co3d_compile.ir.markers import begin, history, opening, take
from co3d_compile.ir.node_reading import operand, operands, shape_of
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, amend_own, fact_of, is_start, is_stream
from co3d_compile.rules import rule_for
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.remembering import remembered

aten = torch.ops.aten


class JoinStarts(Pass):
    """Rewrites, where ``f`` is computed from the first a entries alone:

    1. ``cat([f(x[:a]), y])`` over time to ``begin(y, f(opening(x, a)))``: the first entries of the stream are those of
       f, which is right in the step in which all of the first a entries are there; ``y`` is delayed for it;
    2. with ``boundary="stream"``, where nothing behind it remembers for good, to ``cat([zeros, y])``: no result
       depends on the start.
    """

    requires = frozenset({"time"})
    ensures = frozenset({"joined"})

    def run(self, program: Program) -> bool:
        found = [n for n in program.graph.nodes if any(map(is_start, n.all_input_nodes)) and is_stream(n)]
        always = remembered(program.graph)
        for node in found:
            if program.options.boundary == "exact" or node in always:
                self._join(program, node)
            else:
                self._leave_out(program, node)
        for node in reversed(program.graph.nodes):
            if is_start(node) and not node.users:
                program.graph.erase_node(node)
        return bool(found)

    def _leave_out(self, program: Program, node: Node) -> None:
        """Writes zeros in place of the start."""
        parts, dim, at = _parts(node)
        shape = [*shape_of(node)]
        shape[dim] = sum(shape_of(p)[dim] for p in parts[:at])
        zeros = torch.zeros(shape, dtype=node.meta["val"].dtype)
        filling = insert_constant(program, node, f"constant.{node.name}", zeros)
        amend_own(filling, constant=Constant.of(zeros, learned=False, computed=True))
        node.args = ([filling, *parts[at:]], dim)

    def _join(self, program: Program, node: Node) -> None:
        parts, dim, at = _parts(node)
        fact, entries = fact_of(node), sum(shape_of(p)[dim] for p in parts[:at])
        starting = next(p for p in parts[:at] if is_start(p))
        first = parts[0] if at == 1 else insert(program, node, aten.cat.default, parts[:at], dim)
        assert fact.layout is not None
        first.meta[KEY] = with_fields(fact_of(starting), layout=fact.layout.resize(TIME, entries), length=entries)
        due = max(fact_of(p).due for p in parts[:at] if is_start(p))
        opened = ceil(due / (fact.pulse * fact.rate)) - 1
        for n in _openings(first):
            self._open(program, n, opened)
        rest = self._rest(program, node, parts[at:], dim)
        late = fact.delay - (fact_of(rest).delay - entries)
        rest = delay(program, node, rest, late) if late else rest
        new = insert_marker(program, node, begin, rest, first, dim, opened, like=node)
        program.record(node, "joined to its start")
        replace(node, new)

    def _rest(self, program: Program, node: Node, parts: list[Node], dim: int) -> Node:
        """Adds to the stream what the clip has behind its last entry."""
        if len(parts) == 1:
            return parts[0]
        rest = insert(program, node, aten.cat.default, parts, dim)
        rule = rule_for(rest.target)
        assert rule is not None
        rest.meta[KEY] = rule.flow(rest)
        return rest

    def _open(self, program: Program, node: Node, opened: int) -> None:
        """Gives a slice from the front of a stream the entries that it takes, as they are there in a step."""
        x, entries = operand(node), last_of_front(node)
        fact = fact_of(x)
        assert entries is not None and fact.time is not None and fact.layout is not None
        pulse = int(fact.pulse)
        newest = (opened + 1) * pulse - 1 - fact.delay
        past = max(0, newest + 1 - pulse)
        read = insert_marker(program, node, history, x, past, like=x) if past else x
        read = insert_marker(program, node, take, read, past + pulse - 1 - newest, entries, like=x)
        new = insert(program, node, opening, read, fact.time.dim, entries)
        new.meta[KEY] = with_fields(fact_of(node), layout=fact.layout.resize(TIME, entries), length=entries)
        if node.target is aten.slice.Tensor:
            _, dim, start, end, step = sliced(node)
            node.args = (x, dim, start, end, step)
        else:
            node.args = selected(node)
        node.kwargs = {}
        node.replace_input_with(x, new)


def _parts(node: Node) -> tuple[list[Node], int, int]:
    """Finds the tensors that are joined, the dim, and which of them is the stream."""
    rule = rule_for(node.target)
    assert isinstance(rule, Concatenation)
    parts, dim = rule.parts(node)
    return parts, dim, parts.index(rule.main(node))


def _openings(first: Node) -> list[Node]:
    """Lists what a start begins with: slices of streams."""

    def opens(n: Node) -> bool:
        return any(map(is_stream, operands(n)))

    found = reached(filter(is_start, [first]), lambda n: [] if opens(n) else filter(is_start, operands(n)))
    return [n for n in found if opens(n)]
