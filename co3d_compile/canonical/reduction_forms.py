"""Reductions in one form: over dims, and in the type in which they are computed."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, rank_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten
OVER_ALL: dict[Target, Target] = {
    aten.mean.default: aten.mean.dim,
    aten.max.default: aten.amax.default,
    aten.min.default: aten.amin.default,
}
SUMS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.prod.dim_int,
    aten.cumsum.default,
    aten.cumprod.default,
)


def over_all(program: Program, node: Node) -> None:
    """Writes a reduction of all numbers as one over all dims."""
    x = operand(node)
    target = OVER_ALL[node.target]
    if target not in SUMS:
        replace(node, insert(program, node, target, x, list(range(rank_of(x))), False))
        return
    new = insert(program, node, target, x, list(range(rank_of(x))), False, dtype=node.meta["val"].dtype)
    cast_first(program, new)
    replace(node, new)


def cast_first(program: Program, node: Node) -> None:
    """Makes the dtype in which PyTorch sums up that of the operand: small numbers are summed up as large ones.

    Whole numbers are summed up in 64 bits where nothing else is said; fewer bits are what is left of that.
    """
    x, dtype = operand(node), node.meta["val"].dtype
    wide = dtype if dtype.is_floating_point or dtype.is_complex else torch.int64
    first = insert(program, node, aten._to_copy.default, x, dtype=wide) if x.meta["val"].dtype != wide else x
    rest = {name: value for name, value in node.kwargs.items() if name != "dtype"}
    if wide == dtype:
        node.args, node.kwargs = (first, *node.args[1:]), rest
        return
    total = insert(program, node, node.target, first, *node.args[1:], **rest)
    replace(node, insert(program, node, aten._to_copy.default, total, dtype=dtype))
