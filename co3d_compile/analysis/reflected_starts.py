"""Reflecting pads over time whose first entries are ever read: a start of its own, computed from the first entries."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import fact_of, is_stream
from co3d_compile.rules import rule_for
from co3d_compile.rules.remembering import remembered
from co3d_compile.rules.slices import Pad

aten = torch.ops.aten


def write_reflections(program: Program) -> bool:
    """Writes ``pad(x, (p, q))`` that reflects as ``cat([x[1 : p + 1].flip(), pad(x, (0, q))])``, where p is read.

    That is where something remembers for good, and with ends. An end that reflects, too, has no stream with ends.
    """
    exact = program.options.boundary == "exact"
    found = [n for n in (program.graph.nodes if exact else remembered(program.graph)) if _reflects(n, exact)]
    for node in found:
        _write(program, node)
    return bool(found)


def _reflects(node: Node, exact: bool) -> bool:
    """Says whether a node is a pad that reflects the first entries of a stream."""
    rule = rule_for(node.target) if node.op == "call_function" and is_stream(node) else None
    if not isinstance(rule, Pad):
        return False
    kernel = rule.kernel(node)
    return kernel is not None and kernel.p > 0 and rule.outside(node)[0] is None and not (exact and kernel.p_end > 0)


def _write(program: Program, node: Node) -> None:
    rule, time = rule_for(node.target), fact_of(operand(node)).time
    assert isinstance(rule, Pad) and time is not None
    x, pads = rule.pads(node)
    front, back = pads[time.dim]
    pads[time.dim] = (0, back)
    if any(pad != (0, 0) for pad in pads):
        dims = len(Arguments(node).integers("padding")) // 2
        flat = [v for pad in reversed(pads[-dims:]) for v in pad]
        x = insert(program, node, node.target, x, flat)
    first = insert(program, node, aten.slice.Tensor, x, time.dim, 1, front + 1)
    start = insert(program, node, aten.flip.default, first, [time.dim])
    replace(node, insert(program, node, aten.cat.default, [start, x], time.dim))
