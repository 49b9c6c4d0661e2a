"""Where entries are regrouped: a view splits time into blocks, or an operator reads rows of blocks as frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from torch.fx import Node

from co3d_compile.analysis.starts import first_entries, moving
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.index_equation import NO_COPIES
from co3d_compile.ir.layout import TIME, LayoutLost
from co3d_compile.ir.markers import blocks
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, NoExtension, fact_of, facts_as, is_stream, known
from co3d_compile.rules import Rule
from co3d_compile.rules.base import one_entry
from co3d_compile.rules.blocks import blocked_fact, unblocked_fact
from co3d_compile.rules.shape import View

MOST = 32  # entries that one may become
Regrouping = tuple[str, str, tuple[int, ...]]
"""An operator and its operand, by name, and what is done to that in order: k > 0: each k entries are one; 0: the way
back, KEPT: the first entry of the stream for ever."""
KEPT = -1


def regroupings(node: Node, rule: Rule, scope: str) -> frozenset[Regrouping]:
    """Finds how the operands of an operator are regrouped so that it streams; empty where that does not help."""
    for facts in _candidates(node, rule):
        with facts_as({x: fact for x, (fact, _) in facts.items()}):
            if _streams(node, rule, scope):
                return frozenset((node.name, x.name, steps) for x, (_, steps) in facts.items())
    return frozenset()


def firsts_kept(node: Node, rule: Rule) -> frozenset[Regrouping]:
    """Finds what must be the first entry for ever so that an operator streams which meets it; empty where none is.

    In ``f(x) - g(x[:, :, :1])`` it is what g reads.
    """
    facts, found = {}, set[Regrouping]()
    for x in filter(is_stream, node.all_input_nodes):
        firsts = first_entries(x)
        for first in firsts or ():
            root = fact_of(operand(first))
            if root.spacing > 1:
                return frozenset()  # it is that of several clips
            facts[x] = replace(one_entry(root, known(x)), copies=NO_COPIES)
            readers = [n for n in first.users if n is node or n in reached([x], moving)]
            found |= {(n.name, first.name, (KEPT,)) for n in readers}
    with facts_as(facts):
        return frozenset(found) if facts and _streams(node, rule, "recompute") else frozenset()


def folded(node: Node) -> dict[Node, tuple[Fact, tuple[int, ...]]]:
    """Finds the operands whose entries have several places in the dim of time, and what they are as entries."""
    found: dict[Node, tuple[Fact, tuple[int, ...]]] = {}
    for x in node.all_input_nodes:
        place = fact_of(x).time
        if is_stream(x) and place is not None and place.inner <= MOST and (fact := unblocked_fact(fact_of(x))):
            found[x] = fact, (0,)
    return found


def split_views(program: Program) -> dict[str, tuple[int, ...]]:
    """Finds the captured views that split time into blocks, and the shape of each for a clip twice as long."""
    captured = set(program.notes.captured)
    readers = [r for n in program.graph.nodes if n.target is blocks for r in n.users]
    found = {}
    for reader in readers:
        place = fact_of(reader).time
        if place is not None:
            shape = known(reader).resize(TIME, 2 * place.size).shape
            found.update({name: shape for name in program.names_of(reader) if name in captured})
    return found


def _candidates(node: Node, rule: Rule) -> Iterator[dict[Node, tuple[Fact, tuple[int, ...]]]]:
    apart = folded(node)
    if apart:
        yield apart
    if not isinstance(rule, View):
        return
    x = operand(node)
    for fact, steps in [(fact_of(x), ()), *apart.values()]:
        size = fact.time.size if fact.time is not None else 1
        for k in (k for k in range(2, size) if size % k == 0 and prod(shape_of(node)) >= k):
            try:
                yield {x: (blocked_fact(fact, k), (*steps, k))}
            except LayoutLost:
                continue


def _streams(node: Node, rule: Rule, scope: str) -> bool:
    try:
        rule.flow(node)
    except (NoExtension, LayoutLost):
        try:
            return scope != "recompute" and rule.gate(node, scope) is not None
        except (NoExtension, LayoutLost):
            return False
    return True
