"""Equal parts of one tensor that are joined along another of its dims: heads of attention in front of the batch."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import Take, taken
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def move_joined_parts(program: Program) -> None:
    """Rewrites ``cat(x.split(4, 2), 0)`` to ``x.unflatten(2, (-1, 4)).movedim(2, 0).flatten(0, 1)``: to views.

    Parts of time are crops, which stream as they are.
    """
    for node in [n for n in program.graph.nodes if n.target is aten.cat.default]:
        parts = [taken(part) for part in Arguments(node).tensors("tensors")]
        if (first := parts[0]) is None or not _is_all_of_it(first, parts):
            continue
        times = TimeDims(program)
        if not times.is_time(first.root, first.dim):
            replace(node, _moved(program, node, first, len(parts)))
        times.forget()


def _is_all_of_it(first: Take, parts: list[Take | None]) -> bool:
    """Says whether parts are a whole tensor, cut into several equal parts, in order."""
    x, dim, length = first.root, first.dim, first.length
    if length is None or len(parts) < 2 or shape_of(x)[dim] != len(parts) * length:
        return False
    return parts == [Take(x, dim, i * length, length) for i in range(len(parts))]


def _moved(program: Program, node: Node, first: Take, count: int) -> Node:
    x, dim, to = first.root, first.dim, Arguments(node).dim(node)
    if dim == to:
        return x
    sizes = list(shape_of(x))
    apart = insert(program, node, aten.reshape.default, x, [*sizes[:dim], count, first.length, *sizes[dim + 1 :]])
    places = [d + (d >= dim) for d in range(rank_of(x))]
    moved = insert(program, node, aten.permute.default, apart, [*places[:to], dim, *places[to:]])
    return insert(program, node, aten.reshape.default, moved, list(shape_of(node)))
