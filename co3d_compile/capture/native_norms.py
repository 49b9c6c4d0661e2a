"""Layer and group norms as PyTorch decomposes them: with the mean and the deviation as further results."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, reads_first_alone, replace_first
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def name_norms(program: Program) -> None:
    """Writes ``native_layer_norm`` and ``native_group_norm`` of which only the first result is read as the plain norms.

    The native ones take sizes of the clip, or memory in one order, so that no longer clip can be run through them.
    """
    for node in list(program.graph.nodes):
        if node.target in (aten.native_layer_norm.default, aten.native_group_norm.default):
            _name(program, node)


def _name(program: Program, node: Node) -> None:
    if not reads_first_alone(node):
        return
    if node.target is aten.native_layer_norm.default:
        norm = insert(program, node, aten.layer_norm.default, *node.args)
    else:
        x, weight, bias, _, _, _, groups, eps = node.args
        norm = insert(program, node, aten.group_norm.default, x, groups, weight, bias, eps)
    replace_first(node, norm)
