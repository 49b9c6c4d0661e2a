"""A roll that was written as the parts of a tensor, joined from another one on, as exporters write it."""

from __future__ import annotations

import operator
from itertools import accumulate, pairwise

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, operand_list, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
Part = tuple[Node, int, int, int]
"""A tensor, and of which entries of which dim a part of it is."""


def join_rolls(program: Program) -> None:
    """Rewrites ``cat([x[k:], x[:k]])``, all parts of a tensor in their order around its end, to ``roll(x, -k)``."""
    for node in list(program.graph.nodes):
        if node.target is not aten.cat.default or len(operand_list(node)) < 2:
            continue
        parts = [_part(p) for p in operand_list(node)]
        found = [p for p in parts if p is not None]
        if len(found) == len(parts) and _is_whole(found, Arguments(node).dim(node)):
            x, dim, start, end = found[0]
            shift = min(-start, end - start, key=abs)  # in longer clips, too, the way that is shorter
            replace(node, insert(program, node, aten.roll.default, x, [shift], [dim]) if start else x)


def _part(node: Node) -> Part | None:
    """Finds what a slice, or one of the results of a split, takes."""
    if node.target is aten.slice.Tensor:
        x, dim, start, end, step = sliced(node)
        return (x, dim, start, end) if step == 1 else None
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, Node) or split.target is not aten.split_with_sizes.default:
        return None
    dim, which = Arguments(split).dim(operand(split)), whole(node, 1)
    ends = [0, *accumulate(int(part.shape[dim]) for part in split.meta["val"])]
    return operand(split), dim, ends[which], ends[which + 1]


def _is_whole(parts: list[Part], dim: int) -> bool:
    """Says whether parts are all entries of one tensor along a dim, each where the one before it ends."""
    x = parts[0][0]
    size = shape_of(x)[dim]
    if not size or any((of, d) != (x, dim) for of, d, _, _ in parts):
        return False
    follow = all(one[3] % size == other[2] for one, other in pairwise([*parts, parts[0]]))
    return follow and sum(end - start for _, _, start, end in parts) == size
