"""What remembers for good, such as a recurrent layer, and what it reads: that must begin as the clip does."""

from __future__ import annotations

from torch.fx import Graph, Node

from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.time_facts import is_stream
from co3d_compile.rules import rule_for


def remembers_all(node: Node) -> bool:
    """Says whether a stream depends on all that ever came, by an operator that remembers it."""
    rule = rule_for(node.target) if node.op == "call_function" and is_stream(node) else None
    return rule is not None and rule.remembers_all(node)


def remembered(graph: Graph) -> list[Node]:
    """Finds what depends on all that ever came, and all streams behind which it stands; in the graph's order."""
    streams = [n for n in graph.nodes if n.op == "call_function" and is_stream(n)]
    found = computed_from(*filter(remembers_all, streams))
    return [n for n in streams if n in found]
