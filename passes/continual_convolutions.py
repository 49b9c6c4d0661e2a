"""Continual convolutions and pools: the poster's first step. Each reads its own past instead of a whole clip."""

from __future__ import annotations

from dataclasses import replace as with_fields

from torch.fx import Node

from co3d_compile.ir.graph_edits import delay, insert_marker, replace
from co3d_compile.ir.markers import history, hold, take
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, Own, fact_of, is_stream, kernel_of, own_of
from co3d_compile.rules import rule_for
from co3d_compile.rules.failures import blaming
from co3d_compile.rules.matmul import Attention
from co3d_compile.rules.pool import Pool
from co3d_compile.rules.resample import Upsample
from co3d_compile.rules.spreading import SpreadingRule


class Continual(Pass):
    """Rewrites every operator that slides over time, for pulses P_x in and P_y out:

    1. ``pool(x, [3, 3, 3])`` to ``pool(pool(x, [1, 3, 3]), [3, 1, 1])``, so that pooled entries are remembered;
    2. ``conv(x)`` to ``conv(take(history(x, n)))`` with just the entries that its P_y new outputs read;
    3. attention with a banded mask to attention on the history of its keys and values;
    4. ``hold(x)``, where an operand must wait for its first entries, to a delay.
    """

    requires = frozenset({"time", "unpadded"})
    ensures = frozenset({"continual"})

    def run(self, program: Program) -> bool:
        modified = False
        for node in list(program.graph.nodes):
            if is_stream(node) and node.op == "call_function":
                with blaming(program, node):
                    modified |= self._node(program, node)
        return modified

    def _node(self, program: Program, node: Node) -> bool:
        rule = rule_for(node.target)
        if node.target is hold:
            self._hold(program, node)
        elif isinstance(rule, Attention):
            return self._attention(program, node, rule)
        elif isinstance(rule, (SpreadingRule, Upsample)):
            return self._upsampling(program, node, rule)
        elif own_of(node).slides is not None:
            self._slide(program, self._split_pool(node, rule) if isinstance(rule, Pool) else node)
        else:
            return False
        return True

    def _hold(self, program: Program, node: Node) -> None:
        x = operand(node)
        late = fact_of(node).delay - fact_of(x).delay
        if late:
            program.record(node, "operand held back")
        replace(node, delay(program, node, x, late) if late else x)

    def _upsampling(self, program: Program, node: Node, rule: SpreadingRule | Upsample) -> bool:
        x = operand(node)
        if isinstance(rule, SpreadingRule) and rule.spread(node) is None:
            return False
        past = rule.past(node)
        if past:
            node.replace_input_with(x, insert_marker(program, node, history, x, past, like=x))
        program.record(node, "continual")
        return bool(past)

    def _attention(self, program: Program, node: Node, rule: Attention) -> bool:
        past = rule.past(node)
        if past:
            program.record(node, "continual")
            for x in {n for n in node.args[1:3] if isinstance(n, Node)}:
                remembered = insert_marker(program, node, history, x, past, like=x)
                node.args = (node.args[0], *(remembered if n is x else n for n in node.args[1:3]), *node.args[3:])
        return bool(past)

    def _split_pool(self, node: Node, rule: Pool) -> Node:
        parts = rule.split(node)
        if parts is None:
            return node
        space, over_time = parts
        fact = fact_of(node)
        for part in parts:
            part.meta = dict(node.meta)
        x = fact_of(operand(space))
        assert fact.layout is not None
        space.meta[KEY] = with_fields(x, layout=fact.layout.resize("T", x.clip), own=Own())
        replace(node, over_time)
        return over_time

    def _slide(self, program: Program, node: Node) -> None:
        """Gives a sliding operator the entries that its new outputs read, and no others."""
        x = operand(node)
        kernel = kernel_of(node)
        pulse_x, pulse_y = int(fact_of(x).pulse), int(fact_of(node).pulse)
        length = (pulse_y - 1) * kernel.s + (kernel.k - 1) * kernel.d + 1
        slack = kernel.slack(fact_of(x).delay, fact_of(node).delay)
        past = max(0, length + slack - pulse_x)
        start = past + pulse_x - slack - length
        new = insert_marker(program, node, history, x, past, like=x) if past else x
        if start or slack:
            new = insert_marker(program, node, take, new, start, length, like=x)
        if new is not x:
            node.replace_input_with(x, new)
        if kernel.k > 1 or kernel.s > 1:
            program.record(node, "continual")
