"""Delay residuals: the poster's third step, and the only place where delays enter.

Operands are combined at equal index, so each is delayed until the latest of them arrives: residuals, branches,
gates, lateral connections, and windows that end in one result.
"""

from __future__ import annotations

import math
from fractions import Fraction

from torch.fx import Node

from co3d_compile.analysis.window_groups import meeting_windows, set_newest
from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.graph_edits import delay
from co3d_compile.ir.node_reading import operand, where
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import fact_of, is_stream


class DelayResiduals(Pass):
    """Rewrites:

    1. ``add(x, f(x))`` to ``add(delay(x, D), f(x))`` with ``delay(x, D) = take(history(x, D), 0, P)``;
    2. windows whose results meet, so that all of them start at the same frame of the stream.
    """

    requires = frozenset({"time", "continual", "windowed"})
    ensures = frozenset({"aligned"})

    def run(self, program: Program) -> bool:
        modified = False
        for node in list(program.graph.nodes):
            if node.op == "call_function" and is_stream(node):
                modified |= align(program, node)
        for group in meeting_windows(program):
            modified |= self._align_windows(program, group)
        return modified

    def _align_windows(self, program: Program, group: list[Node]) -> bool:
        """Delays the operands of windows that meet: the latest start decides."""
        facts = [fact_of(operand(n)) for n in group]
        lag = max(f.lag for f in facts)
        step = Fraction(1)
        for f in facts:  # the least common grid of all operands
            step = Fraction(
                math.lcm(step.numerator * f.rate.denominator, f.rate.numerator * step.denominator),
                step.denominator * f.rate.denominator,
            )
        grid = max(f.rate for f in facts)
        while any(((lag - f.lag) / f.rate).denominator != 1 for f in facts):
            lag = (lag // grid + 1) * grid
            if lag > 64 * step + max(f.lag for f in facts):
                raise UnsupportedError(
                    "Windows at rates without a common grid meet.",
                    **where(group[0]),
                )
        modified = False
        for node, fact in zip(group, facts, strict=True):
            held = int((lag - fact.lag) / fact.rate)
            if held:
                x = operand(node)
                node.replace_input_with(x, delay(program, node, x, held))
                modified = True
            set_newest(node, fact.delay + held - fact.crop)
        return modified


def align(program: Program, node: Node) -> bool:
    """Delays the early operands of a streaming operator."""
    operands = [n for n in node.all_input_nodes if is_stream(n)]
    if len(operands) < 2:
        return False
    latest = max(fact_of(n).delay for n in operands)
    early = [n for n in operands if fact_of(n).delay < latest]
    for x in early:
        node.replace_input_with(x, delay(program, node, x, latest - fact_of(x).delay))
        program.record(node, "operand delayed")
    return bool(early)
