"""Edges of a stream with ends: what cannot be read before an entry has come, or before the first frame, is delayed.

A replicate pad gives copies of the first entry in front of it. They are worth nothing before that entry is there, so
what reads them waits: an operator that slides by itself (``Fact.through``); one that gives each entry from the one of
the same index hands the copies on; for any other the operand is delayed.
"""

from __future__ import annotations

from torch.fx import Node

from co3d_compile.ir.markers import history, take, window
from co3d_compile.ir.time_facts import Fact, Kind, fact_of, is_stream, own_of
from co3d_compile.rules import rule_for


def waiting_operands(node: Node, fact: Fact) -> dict[Node, Fact]:
    """Finds the operands that an operator cannot read as early as they come, with their facts once they wait."""
    return {
        x: fact_of(x).held_back(begins(node)) for x in node.all_input_nodes if is_stream(x) and _early(node, fact, x)
    }


def begins(node: Node) -> bool:
    """Says whether an operator begins no sooner than the first frame comes."""
    rule = rule_for(node.target)
    return node.op != "output" and rule is not None and rule.begins(node)


def _early(node: Node, fact: Fact, x: Node) -> bool:
    own = fact_of(x)
    if node.op == "output":
        return own.end is not None and own.copies.lead > 0
    rule = rule_for(node.target)
    if rule is None or fact.kind is not Kind.STREAM:
        return False
    if own.end is None:  # what remembers for good must have seen the first entry: of padding, or a copy of a later one
        return (own.delay < 0 or own.copies.lead > 0) and rule.remembers_all(node)
    if rule.begins(node):
        return own.delay < 0 or bool(own.copies)
    if not own.copies or rule.kernel(node) is not None:
        return False
    alike = (fact.pulse, fact.delay, fact.copies) == (own.pulse, own.delay, own.copies)
    return not alike or rule.past(node) > 0


def reads_copies(node: Node) -> bool:
    """Says whether an operator takes the copies at the edges of its operand for entries, and hands on none."""
    if not is_stream(node) or node.target in (history, take, window):
        return True
    fact, slides = fact_of(node), own_of(node).slides
    pads = slides is not None and max(slides.kernel.p, slides.kernel.p_end) > 0
    return pads or not fact.copies
