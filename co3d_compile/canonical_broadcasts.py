"""Canonical forms of copying along dims: broadcasting needs none, and every other copy is an expansion."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.graph import insert, replace
from co3d_compile.program import Program
from co3d_compile.rules.base import operand, rank_of, shape_of

aten = torch.ops.aten


def expansion(program: Program, node: Node) -> None:
    """What is expanded for operators that broadcast by themselves is left as it is: ``x * g.expand_as(x)``."""
    if node.users and all(_broadcasts(node, user) for user in node.users):
        replace(node, operand(node))


def _broadcasts(node: Node, user: Node) -> bool:
    """Whether an operator gives the same if it reads what is expanded instead."""
    if torch.Tag.pointwise not in getattr(user.target, "tags", ()) or user.kwargs.get("out") is not None:
        return False
    if any(isinstance(a, (list, tuple)) for a in user.args) or user.target is aten.copy.default:
        return False
    shapes = [shape_of(operand(n) if n is node else n) for n in user.all_input_nodes]
    return len(shapes) > 1 and tuple(torch.broadcast_shapes(*shapes)) == shape_of(user)


def repetition(program: Program, node: Node) -> None:
    """``repeat`` of dims of size one is an expansion."""
    x = operand(node)
    counts: list[int] = list(node.args[1])  # type: ignore[arg-type]
    sizes = [1] * (len(counts) - rank_of(x)) + list(shape_of(x))
    if any(c != 1 and s != 1 for c, s in zip(counts, sizes, strict=True)):
        return
    new = insert(program, node, aten.expand.default, x, list(shape_of(node)))
    replace(node, new)
    expansion(program, new)


def resampling(program: Program, node: Node) -> None:
    """Up-sampling from one place is an expansion (the pooled branch of a pyramid)."""
    x = operand(node)
    if any(a not in (1, b) for a, b in zip(shape_of(x), shape_of(node), strict=True)):
        return
    new = insert(program, node, aten.expand.default, x, list(shape_of(node)))
    replace(node, new)
    expansion(program, new)
