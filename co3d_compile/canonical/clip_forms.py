"""Canonical forms of operators on a single clip that has lost its batch: ``conv(x[0])``."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, rank_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def one_clip(program: Program, node: Node) -> None:
    """Writes a convolution of a single clip as that of a batch of one, as ONNX has it."""
    x, weight = operand(node), operand(node, 1)
    if rank_of(x) == rank_of(weight):
        return
    batch = insert(program, node, aten.unsqueeze.default, x, 0)
    result = insert(program, node, node.target, batch, *node.args[1:], **node.kwargs)
    replace(node, insert(program, node, aten.squeeze.dim, result, 0))
