"""Small helpers to rewrite a graph whose nodes carry shapes and module paths."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace as replace_fields
from typing import TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node, map_arg
from torch.fx.node import Argument, Target

from co3d_compile.ir.fake_values import Result, computed, fake_like
from co3d_compile.ir.index_equation import NO_COPIES
from co3d_compile.ir.markers import history, take
from co3d_compile.ir.node_reading import Args, Kwargs, called, module_path
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import is_taken, set_constant
from co3d_compile.ir.time_facts import KEY, Own, amend, fact_of

Rewrite: TypeAlias = Callable[[Program, Node], Node | None]


def fake_mode(program: Program) -> FakeTensorMode:
    """Finds the mode that all shapes of this program live in."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if hasattr(value, "fake_mode"):
            return value.fake_mode
    raise AssertionError("a captured graph has shapes")


def shape_of_call(mode: FakeTensorMode, target: Target, args: Args, kwargs: Kwargs) -> Result:
    """Computes what an operator returns, as fake tensors."""
    return computed(mode, target, *map_arg((args, kwargs), lambda n: n.meta["val"]))


def insert(program: Program, before: Node, target: Target, *args: Argument, **kwargs: Argument) -> Node:
    """Puts an operator in front of a node, with the shape it computes and that node's module path."""
    with program.graph.inserting_before(before):
        node = program.graph.call_function(called(target), args, kwargs)
    node.meta["path"] = module_path(before)
    node.meta["val"] = shape_of_call(fake_mode(program), target, args, kwargs)
    return node


def insert_marker(program: Program, before: Node, target: Target, *args: Argument, like: Node) -> Node:
    """Puts a marker (``ir/markers.py``) in front of a node; its shape is that of ``like`` in the clip."""
    with program.graph.inserting_before(before):
        node = program.graph.call_function(called(target), args)
    node.meta = {"val": like.meta["val"], KEY: replace_fields(fact_of(like), own=Own()), "path": module_path(before)}
    return node


def insert_constant(program: Program, before: Node, name: str, value: torch.Tensor) -> Node:
    """Puts a constant in front of a node, under a name that is still free."""
    unique, i = name, 0
    while is_taken(program.module, unique):
        i += 1
        unique = f"{name}_{i}"
    set_constant(program.module, unique, value)
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(unique)
    node.meta["path"] = module_path(before)
    node.meta["val"] = fake_like(fake_mode(program), value)
    return node


def replace(old: Node, new: Node) -> None:
    """Lets every reader of ``old`` read ``new``; ``old`` goes."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def reads_first_alone(node: Node) -> bool:
    """Says whether nothing reads another output of an operator than its first."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def replace_first(old: Node, new: Node) -> None:
    """Lets every reader of the first output of ``old`` read ``new``."""
    for user in list(old.users):
        replace(user, new)


def erase_unused(node: Node) -> None:
    """Erases what nothing reads any more: an operator, and what it alone has read.

    PyTorch's own elimination keeps operators that may draw random numbers, such as attention with its dropout.
    """
    stack = [node]
    while stack:
        last = stack.pop()
        if last.op in ("call_function", "get_attr") and not last.users and not last._erased:
            operands = last.all_input_nodes
            last.graph.erase_node(last)
            stack += operands


def erase_dead(graph: Graph) -> None:
    """Erases all nodes that nothing reads, but for those that have an effect. Chance in training is none.

    PyTorch's own elimination checks the whole graph each time, which takes longer than what it is called for. It also
    keeps attention with its dropout, and recurrent layers.
    """
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure(impure_random=False):
            graph.erase_node(node)


def delay(program: Program, before: Node, x: Node, entries: int) -> Node:
    """Delays ``x`` by ``entries`` entries."""
    past = insert_marker(program, before, history, x, entries, like=x)
    new = insert_marker(program, before, take, past, 0, int(fact_of(x).pulse), like=x)
    amend(new, delay=fact_of(x).delay + entries, copies=NO_COPIES)
    return new
