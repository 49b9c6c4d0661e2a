"""Starts of their own: ``cat([f(x[:a]), g(x[a:])])`` over time is the stream of g, and f is its first entries."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch.fx import Node

from co3d_compile.analysis.window_facts import window_layout
from co3d_compile.ir.aten_operators import part_taken
from co3d_compile.ir.graph_walks import in_order, reached
from co3d_compile.ir.node_reading import operands, shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, Kind, constant_of, fact_of, is_start, is_stream
from co3d_compile.rules import Rule
from co3d_compile.rules.combine import Concatenation, repeats_edge

aten = torch.ops.aten


def start_of(node: Node, rule: Concatenation) -> list[Node]:
    """Gives the nodes that compute the start of a concatenation over time from the first entries of streams, in order.

    Empty where it has no such start. As many entries follow as the start has, at least, and the slices that it begins
    with take less than half of the clip: what is longer may be anything, chunks of the clip among it.
    """
    parts, dim = rule.parts(node)
    timed = [p for p in parts if is_stream(p) and over_time(p, dim)]
    if not timed:
        return []
    main = max(timed, key=lambda p: shape_of(p)[dim])
    front = parts[: parts.index(main)]
    known: dict[Node, bool] = {}
    computed = [p for p in front if fact_of(p).kind is not Kind.STATIC]
    fills = all(constant_of(p).filling for p in front if p not in computed)
    longer = sum(shape_of(p)[dim] for p in front) < shape_of(main)[dim]
    if not computed or not fills or not longer or _from_the_first(main, known) or repeats_edge(front, main, dim):
        return []
    if any(not _from_the_first(p, known) for p in computed):
        return []
    return _cone(computed, known)


def over_time(x: Node, dim: int) -> bool:
    """Says whether a dim of a tensor is time alone."""
    place = fact_of(x).time
    return place is not None and place.alone and place.dim == dim


def last_of_front(node: Node) -> int | None:
    """Counts the entries of a stream that a slice or selection takes from its front; None for anything else."""
    part = part_taken(node)
    if part is None:
        return None
    x, dim, _, end = part
    return end if is_stream(x) and over_time(x, dim) and 2 * end < shape_of(x)[dim] else None


def first_entries(x: Node) -> list[Node] | None:
    """Finds the first entries of streams that a single entry is computed from, and from nothing else; else None."""

    def onward(n: Node) -> list[Node]:
        return [] if last_of_front(n) == 1 else moving(n)

    found = reached([x], onward)
    single = all(is_stream(n) and fact_of(n).clip == 1 and not fact_of(n).per_entry for n in found)
    ends = [n for n in found if not onward(n)]
    return ends if single and all(last_of_front(n) == 1 for n in ends) else None


def moving(node: Node) -> list[Node]:
    """Lists the operands that are no constants."""
    return [x for x in operands(node) if fact_of(x).kind is not Kind.STATIC]


def _from_the_first(node: Node, known: dict[Node, bool]) -> bool:
    """Says whether a tensor is computed from the first entries of streams, and from constants."""
    for n in in_order([node], lambda n: [] if n in known else moving(n)):
        inner = moving(n)
        known[n] = (bool(inner) and all(known[x] for x in inner)) or last_of_front(n) is not None
    return known[node]


def _cone(ends: list[Node], known: dict[Node, bool]) -> list[Node]:
    """Finds what some tensors are computed from, down to slices of streams; in the graph's order."""

    def onward(n: Node) -> list[Node]:
        inner = moving(n)
        return inner if all(known[x] for x in inner) else []

    found = reached(ends, onward)
    return [n for n in ends[0].graph.nodes if n in found]


def starts_behind(node: Node) -> frozenset[str]:
    """Names what computes the start that a node reads."""
    found = reached(filter(is_start, operands(node)), lambda n: filter(is_start, operands(n)))
    return frozenset(n.name for n in found)


def separate(program: Program, node: Node, start: list[Node]) -> frozenset[str]:
    """Gives a concatenation a start of its own: what others read too is copied. Returns the names of its nodes."""
    own, names = {*start, node}, set()
    for n in reversed(start):
        if all(user in own for user in n.users):
            names.add(n.name)
            continue
        with program.graph.inserting_after(n):
            copy = program.graph.node_copy(n)
        for user in [u for u in n.users if u in own]:
            user.replace_input_with(n, copy)
        own = (own - {n}) | {copy}
        names.add(copy.name)
    return frozenset(names)


def start_fact(node: Node, rule: Rule | None) -> Fact:
    """The fact of what is computed from the first entries of streams."""
    facts = [fact_of(x) for x in moving(node)]
    due = max(f.due if f.kind is Kind.START else _due(node, f) for f in facts)
    layout = window_layout(node, rule)
    size = layout.time.size if layout is not None and layout.time is not None else 1
    return Fact(Kind.START, layout, length=size, due=due)


def _due(node: Node, fact: Fact) -> Fraction:
    """Counts the frames of the first input until the entries are there that a slice takes from a stream's front."""
    entries = last_of_front(node)
    assert entries is not None, f"{node.name} takes nothing from the front of a stream"
    return (entries + fact.delay) * fact.rate
