"""Edges of a stream with ends: what cannot be read before an entry has come, or before the first frame, is held back.

A replicate pad gives copies of the first entry in front of it. They are worth nothing before that entry is there, so
what reads them waits: an operator that slides by itself (``Fact.through``); one that gives each entry from the one of
the same index hands the copies on; for any other the operand is held back.
"""

from __future__ import annotations

from torch.fx import Node

from co3d_compile.ir.graph_edits import insert_marker
from co3d_compile.ir.markers import history, hold, take, window
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, Fact, Kind, fact_of, is_stream
from co3d_compile.rules import rule_for


def hold_back(program: Program, node: Node, fact: Fact) -> bool:
    """Puts a marker in front of an operator for each operand that it cannot read as early; whether there is one."""
    held = [x for x in node.all_input_nodes if is_stream(x) and _early(node, fact, x)]
    for x in held:
        begun = node.op != "output" and rule_for(node.target).begins(node)  # type: ignore[union-attr]
        marker = insert_marker(program, node, hold, x, begun, like=x)
        marker.meta[KEY] = rule_for(hold).flow(marker)  # type: ignore[union-attr]
        node.replace_input_with(x, marker)
    return bool(held)


def _early(node: Node, fact: Fact, x: Node) -> bool:
    own = fact_of(x)
    if own.end is None:
        return False
    if node.op == "output":
        return own.lead > 0
    rule = rule_for(node.target)
    if rule is None or fact.kind is not Kind.STREAM:
        return False
    if rule.begins(node):
        return own.delay < 0 or (own.lead, own.tail) != (0, 0)
    if (own.lead, own.tail) == (0, 0) or rule.kernel(node) is not None:
        return False
    alike = (fact.pulse, fact.delay, fact.lead, fact.tail) == (own.pulse, own.delay, own.lead, own.tail)
    return not alike or rule.past(node) > 0


def reads_copies(node: Node) -> bool:
    """Whether an operator takes the copies at the edges of its operand for entries, and hands on none."""
    if not is_stream(node) or node.target in (history, take, window):
        return True
    own = fact_of(node)
    pads = own.slides is not None and max(own.slides.kernel.p, own.slides.kernel.p_end) > 0
    return pads or (own.lead, own.tail) == (0, 0)
