"""Parts of a dim into which others were merged, as parts of the outermost of these."""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def part_of_merged(program: Program, node: Node) -> None:
    """Rewrites ``reshape(x, [n, t * c])[:, a * c : b * c]``, whole frames, to ``reshape(x[:, a:b], …)``."""
    merged, dim, start, end, step = sliced(node)
    if merged.target is not aten.reshape.default or step != 1:
        return
    x = merged.all_input_nodes[0]
    group = _merged(shape_of(x), shape_of(merged), dim)
    if len(group) < 2:
        return
    outer, inner = group[0], prod(shape_of(x)[d] for d in group[1:])
    if inner == 1 or start % inner or end % inner:
        return
    part = insert(program, node, aten.slice.Tensor, x, outer, start // inner, end // inner)
    replace(node, insert(program, node, aten.reshape.default, part, list(shape_of(node))))


def _merged(old: tuple[int, ...], new: tuple[int, ...], dim: int) -> list[int]:
    """Returns the dims that are merged into one, those of size one aside."""
    before, size = prod(new[:dim]), new[dim]
    first = next((i for i in range(len(old)) if prod(old[:i]) == before and old[i] > 1), len(old))
    found: list[int] = []
    for d in range(first, len(old)):
        if prod(old[i] for i in found) == size:
            break
        found.append(d)
    found = [d for d in found if old[d] > 1]
    return found if prod(old[d] for d in found) == size else []
