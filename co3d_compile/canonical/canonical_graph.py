"""The graph in canonical form: what the pass ``canonicalize`` does, and what asks about a graph may do on a copy."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace as with_fields
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.canonical.operator_forms import GATHERS, REWRITES
from co3d_compile.ir.aten_operators import CHECKS, SAME, VIEWS
from co3d_compile.ir.constant_facts import Constant
from co3d_compile.ir.frame_loop import loop_bodies
from co3d_compile.ir.graph_edits import erase_dead, insert_constant, replace
from co3d_compile.ir.graph_walks import run_operator
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments, filled
from co3d_compile.ir.operator_kind import kind_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import delete_unused_constants
from co3d_compile.ir.time_facts import amend_own

aten = torch.ops.aten


def canonicalize(program: Program, bodies: bool = True) -> bool:
    """Rewrites a graph, and the bodies of its loops; says whether that changed it."""
    before = len(program.graph.nodes)
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in SAME or _same_dtype(node):
            replace(node, node.args[0])
        elif node.target in CHECKS:
            program.graph.erase_node(node)
        elif node.target in VIEWS:  # the copies that made views possible are gone
            node.target = aten.reshape.default
        elif node.target in REWRITES:
            REWRITES[node.target](program, node)
    erase_dead(program.graph)
    _fold(program)
    for node in list(program.graph.nodes):
        if node.target in GATHERS:
            GATHERS[node.target](program, node)
    if any(n.all_input_nodes and all(x.op == "get_attr" for x in n.all_input_nodes) for n in program.graph.nodes):
        _fold(program)
    erase_dead(program.graph)
    for body in loop_bodies(program) if bodies else ():
        canonicalize(body)
    delete_unused_constants(program.module)
    return len(program.graph.nodes) != before


def _fold(program: Program) -> None:
    """Computes every node that does not depend on an input."""
    values: dict[Node, Any] = {}
    learned: set[Node] = set()
    lasting = program.refuted | program.notes.goes_on.keys()  # other ones in a longer clip
    first: dict[Node, Node] = {}  # of what computes the same thing of parameters
    known: dict[Hashable, Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            values[node] = program.constant(node)
            if node.target in program.learned:
                learned.add(node)
        elif node.op == "call_function" and (value := filled(node)) is not None:
            values[node] = value
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            values[node] = run_operator(node, values)
            if not learned.isdisjoint(node.all_input_nodes):
                learned.add(node)
            if node in learned and lasting.isdisjoint(program.names_of(node)):
                operands = tuple(first.get(n, n) for n in node.all_input_nodes)
                first[node] = known.setdefault((kind_of(node), operands), node)
    constants: dict[Node, Node] = {}
    for node in list(program.graph.nodes):
        if node not in values or not isinstance(values[node], torch.Tensor):
            continue
        value = values[node]
        if node.op == "call_function" and any(user not in values for user in node.users):
            like = first.get(node, node)
            if like not in constants:
                constants[like] = _constant(program, node, value, node in learned)
            node.replace_all_uses_with(constants[like])
        elif node.op == "get_attr":
            amend_own(node, constant=Constant.of(value, node in learned, computed=False))
    erase_dead(program.graph)


def _constant(program: Program, node: Node, value: torch.Tensor, learned: bool) -> Node:
    """Puts the value of a node in front of it as a constant."""
    constant = insert_constant(program, node, f"constant.{node.name}", value.contiguous().clone())
    known = Constant.of(value, learned, computed=True)
    if not program.refuted.isdisjoint(program.names_of(node)):
        known = with_fields(known, progression=None, band=None)
    amend_own(constant, constant=known)
    return constant


def _same_dtype(node: Node) -> bool:
    if node.target not in (aten._to_copy.default, aten.expand.default, aten.slice.Tensor):
        return False
    old, new = operand(node).meta["val"], node.meta["val"]
    return old.dtype == new.dtype and old.shape == new.shape and Arguments(node).given("step") in (None, 1)
