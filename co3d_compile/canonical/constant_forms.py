"""Tensors that are zero, whatever they are computed from."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def no_difference(program: Program, node: Node) -> None:
    """Writes ``x - x`` as zeros, as networks have them that must not make constants."""
    if node.args[0] is node.args[1] and not node.kwargs:
        _zeros(program, node)


def product_with_zero(program: Program, node: Node) -> None:
    """Writes ``x * 0`` as zeros."""
    if isinstance(node.args[1], (int, float)) and node.args[1] == 0:
        _zeros(program, node)


def _zeros(program: Program, node: Node) -> None:
    dtype = node.meta["val"].dtype
    replace(node, insert(program, node, aten.full_like.default, operand(node), 0, dtype=dtype))
