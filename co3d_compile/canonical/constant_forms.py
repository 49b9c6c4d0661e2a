"""Tensors that are zero, whatever they are computed from, and sums with constants."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def differences(program: Program, node: Node) -> None:
    """Writes ``x - x`` as zeros, as networks have them that must not make constants."""
    if node.args[0] is node.args[1] and not node.kwargs:
        _zeros(program, node)
    else:
        sum_of_constants(program, node)


def product_with_zero(program: Program, node: Node) -> None:
    """Writes ``x * 0`` as zeros."""
    if isinstance(node.args[1], (int, float)) and node.args[1] == 0:
        _zeros(program, node)


def sum_of_constants(program: Program, node: Node) -> None:
    """Writes ``(x + a) - b`` of whole numbers, a and b constants, as ``x + (a - b)``."""
    first, added = node.args
    if not (_is_whole_sum(node) and isinstance(first, Node) and _is_whole_sum(first)):
        return
    x, before = first.args
    if not (isinstance(before, Node) and isinstance(added, Node)):
        return
    if any(n.op == "placeholder" for n in computed_from(before, added)):
        return
    minus = first.target is aten.sub.Tensor
    target = node.target if not minus else aten.add.Tensor if node.target is aten.sub.Tensor else aten.sub.Tensor
    total = insert(program, node, target, before, added)
    replace(node, insert(program, node, first.target, x, total))


def _is_whole_sum(node: Node) -> bool:
    """Says whether a node is a sum or a difference of whole numbers, which is exact in any order."""
    sums = (aten.add.Tensor, aten.sub.Tensor)
    return node.target in sums and not node.kwargs and not node.meta["val"].dtype.is_floating_point


def no_sum(program: Program, node: Node) -> None:
    """Writes ``x + 0`` and ``x - 0``, a constant of zeros, as ``x``."""
    x, zeros = node.args
    if not isinstance(x, Node) or not isinstance(zeros, Node) or zeros.op != "get_attr" or node.kwargs:
        return
    value, result = program.constant(zeros), x.meta["val"]
    same = result.shape == node.meta["val"].shape and result.dtype == node.meta["val"].dtype
    if same and zeros.target not in program.learned and not value.any():
        replace(node, x)


def _zeros(program: Program, node: Node) -> None:
    dtype = node.meta["val"].dtype
    replace(node, insert(program, node, aten.full_like.default, operand(node), 0, dtype=dtype))
