"""Canonical forms of places that count through all rows of a tensor: each row read and written by itself."""

from __future__ import annotations

import operator
from math import prod

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import PLACES
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, operands, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
SORTS = {aten.sort.default, aten.sort.stable, aten.topk.default, aten.max.dim, aten.min.dim}
POOLS = {aten.max_pool2d_with_indices.default: 2, aten.max_pool3d_with_indices.default: 3}
VIEWS = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int}


def in_each_row(program: Program, node: Node, dim: int, index: Node) -> None:
    """Writes ``x.flatten()[places + row * size]`` as a gather in each row, and what is put there as a scatter."""
    found = _in_rows(program, index, shape_of(operand(node))[0]) if dim == 0 else None
    if found is None:
        return
    places, lead = found
    x, size = operand(node), shape_of(operand(node))[0] // prod(lead)
    rest, k = list(shape_of(x)[1:]), len(lead)
    rows = insert(program, node, aten.reshape.default, x, [*lead, size, *rest])
    taken = [*lead, prod(shape_of(places)) // prod(lead)]
    inside = insert(program, node, aten.reshape.default, places, [*taken, *[1] * len(rest)])
    if rest:
        inside = insert(program, node, aten.expand.default, inside, [*taken, *rest])
    if node.target is aten.index_put.default:
        if shape_of(operand(node, 2)) != (*shape_of(index), *rest):  # one value for several places
            return
        target = aten.scatter_add.default if Arguments(node).given("accumulate") else aten.scatter.src
        new = insert(program, node, aten.reshape.default, operand(node, 2), [*taken, *rest])
        result = insert(program, node, target, rows, k, inside, new)
    else:
        result = insert(program, node, aten.gather.default, rows, k, inside)
    replace(node, insert(program, node, aten.reshape.default, result, list(shape_of(node))))


def _in_rows(program: Program, index: Node, size: int) -> tuple[Node, list[int]] | None:
    """Finds the places inside of their rows, and the sizes of the dims that count the rows."""
    total = _viewed(index)
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    for places, starts in (operands(total), operands(total)[::-1]) if len(operands(total)) == 2 else ():
        below = _below(places)
        if below is None or starts.op != "get_attr" or shape_of(places) != shape_of(total):
            continue
        value = program.constant(starts).expand(shape_of(total))
        for k in range(1, rank_of(total)):
            lead = list(shape_of(total)[:k])
            rows = torch.arange(prod(lead)).reshape([*lead, *[1] * (rank_of(total) - k)]) * (size // prod(lead))
            if size == prod(lead) * below and torch.equal(value, rows.expand(shape_of(total))):
                return places, lead
    return None


def _viewed(node: Node) -> Node:
    """Finds the tensor whose numbers a node has, in the same order."""
    while node.target in VIEWS and prod(shape_of(node)) == prod(shape_of(operand(node))):
        node = operand(node)
    return node


def is_below(node: Node) -> bool:
    """Says whether it is known that no place of a tensor is below zero, from where an index counts from the end."""
    return _below(node) is not None


def _below(node: Node) -> int | None:
    """Finds the number below which all places of a tensor are; none is below zero."""
    node = _viewed(node)
    if node.target in PLACES:
        x = operand(node)
        return prod(shape_of(x)[d] for d in Arguments(node).dims(x))
    if node.target is not operator.getitem or node.args[1] != 1:
        return None
    source = operand(node)
    x = operand(source)
    if source.target in POOLS:
        return prod(shape_of(x)[-POOLS[source.target] :])
    return shape_of(x)[Arguments(source).dim(x)] if source.target in SORTS else None
