"""Parts of a dim into which others were merged, and reductions over it, as those of the dims that were merged."""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
REDUCTIONS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
)


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


def reduction_of_merged(program: Program, node: Node) -> None:
    """Takes the mean over t * v of ``reshape(x, [n, c, t * v])`` over v, then over t: a head on flattened features.

    Elsewhere it may be a gate, which is over the entries as the network has them.
    """
    merged = operand(node)
    if merged.target is not aten.reshape.default or node in program.originals or not _is_head(node):
        return
    dims = Arguments(node).dims(merged)
    groups = {d: _merged(shape_of(operand(merged)), shape_of(merged), d) for d in dims}
    shape: list[int] = []
    inner: list[int] = []
    for d, size in enumerate(shape_of(merged)):
        sizes = [shape_of(operand(merged))[i] for i in groups.get(d, [])] or [size]
        inner += range(len(shape) + 1, len(shape) + len(sizes))
        shape += sizes
    if inner:
        apart = insert(program, node, aten.reshape.default, merged, shape)
        node.update_arg(0, insert(program, node, node.target, apart, inner))


def _is_head(node: Node) -> bool:
    """Says whether all that follows is computed from this alone."""
    behind = reached([node], lambda n: n.users)
    readers = [n for n in behind if n is not node and n.op != "output"]
    return all(x in behind or x.op == "get_attr" for n in readers for x in n.all_input_nodes)


def _merged(old: tuple[int, ...], new: tuple[int, ...], dim: int) -> list[int]:
    """Finds the dims that are merged into one, those of size one aside."""
    before, size = prod(new[:dim]), new[dim]
    first = next((i for i in range(len(old)) if prod(old[:i]) == before and old[i] > 1), len(old))
    found: list[int] = []
    for d in range(first, len(old)):
        if prod(old[i] for i in found) == size:
            break
        found.append(d)
    found = [d for d in found if old[d] > 1]
    return found if prod(old[d] for d in found) == size else []
