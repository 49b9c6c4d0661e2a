"""Strip temporal padding: the poster's second step. A stream has no outside, so nothing is padded over time."""

from __future__ import annotations

from torch.fx import Node

from co3d_compile.ir.graph_edits import insert_marker, replace
from co3d_compile.ir.index_equation import Sliding
from co3d_compile.ir.markers import shift
from co3d_compile.ir.node_reading import operator_name
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import amend_own, is_stream
from co3d_compile.rules import rule_for
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.failures import blaming


class StripTemporalPadding(Pass):
    """Rewrites, keeping each index equation in the node's fact (padding keeps its role as an offset):

    1. ``conv3d(x, w, padding=[1, 1, 1])`` to ``conv3d(x, w, padding=[0, 1, 1])``, pools likewise;
    2. a pad, a crop or a concatenation of constants over time that does nothing else to ``shift(x, p)``.
    """

    requires = frozenset({"time"})
    ensures = frozenset({"unpadded"})
    breaks = frozenset({"canonical"})  # annotated again, the graph would lose its offsets

    def run(self, program: Program) -> bool:
        found = []
        for node in program.graph.nodes:  # all are looked at before any is changed: some look at what is behind them
            with blaming(program, node):
                rule = rule_for(node.target)
                kernel = rule.kernel(node) if rule is not None and is_stream(node) and is_stream_input(node) else None
                if rule is None or kernel is None or (kernel.trivial and kernel.p_end == 0):
                    continue
                part = rule.parts(node)[0].index(rule.main(node)) if isinstance(rule, Concatenation) else None
                found.append((node, rule, kernel, part, rule.outside(node)))
        for node, rule, kernel, part, outside in found:
            slides = Sliding(kernel, outside, operator_name(node.target))
            if isinstance(rule, Concatenation) and part is not None:
                new = insert_marker(program, node, shift, rule.parts(node)[0][part], kernel.p, like=node)
                amend_own(new, slides=slides)
                replace(node, new)
            else:
                amend_own(node, slides=slides)
                with blaming(program, node):
                    rule.strip(node)
            if kernel.p or kernel.p_end:
                program.record(node, "temporal padding or crop made an offset")
        return bool(found)


def is_stream_input(node: Node) -> bool:
    """Says whether the first operand streams."""
    return any(is_stream(n) for n in node.all_input_nodes)
