"""Canonical forms of indices that number the rows of a tensor: ``x[torch.arange(n)[:, None], places]`` is a gather."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.canonical.flat_forms import is_below
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten
NUMBERS = {torch.int32, torch.int64}  # others are masks


def in_own_rows(program: Program, node: Node, given: Sequence[tuple[int, Node]]) -> None:
    """Writes what is read at the numbers of all rows, and at places in them, as a gather along the dim of the places.

    Args:
        given: The dims that are indexed, and the indices.
    """
    if any(index.meta["val"].dtype not in NUMBERS for _, index in given):
        return
    shape = list(torch.broadcast_shapes(*(shape_of(index) for _, index in given)))
    for dim, places in reversed(given):
        rows = [(d, index) for d, index in given if d != dim]
        if _in_rows(program, operand(node), rows, shape) and _alike(program, places, shape, len(rows)):
            _gathered(program, node, [d for d, _ in rows], dim, places, shape)
            return


def _gathered(program: Program, node: Node, rows: list[int], dim: int, places: Node, shape: list[int]) -> None:
    """Writes the gather: rows in front, then the dim of the places, then all others."""
    x, lead = operand(node), shape[: len(rows)]
    others = [d for d in range(rank_of(x)) if d not in (*rows, dim)]
    rest, taken = [shape_of(x)[d] for d in others], [*lead, prod(shape[len(rows) :])]
    own = places if is_below(places) else insert(program, node, aten.remainder.Scalar, places, shape_of(x)[dim])
    if own.meta["val"].dtype != torch.int64:
        own = insert(program, node, aten._to_copy.default, own, dtype=torch.int64)
    own = _shaped(program, node, aten.expand.default, own, shape)
    own = _shaped(program, node, aten.reshape.default, own, [*taken, *[1] * len(rest)])
    own = _shaped(program, node, aten.expand.default, own, [*taken, *rest])
    order = [*rows, dim, *others]
    moved = insert(program, node, aten.permute.default, x, order) if order != sorted(order) else x
    result = insert(program, node, aten.gather.default, moved, len(rows), own)
    result = _shaped(program, node, aten.reshape.default, result, [*shape, *rest])
    first, last, rank = min(*rows, dim), max(*rows, dim), len(shape)
    if first and last - first == len(rows):  # side by side, behind others; apart they come first in any case
        order = [*range(rank, rank + first), *range(rank), *range(rank + first, rank + len(rest))]
        result = insert(program, node, aten.permute.default, result, order)
    replace(node, result)


def _in_rows(program: Program, x: Node, rows: Sequence[tuple[int, Node]], shape: Sequence[int]) -> bool:
    """Says whether indices number the entries of dims of a tensor, in the order of the first dims of the result."""
    sizes = [shape_of(x)[d] for d, _ in rows]
    numbered = all(_numbers(program, index, shape, k) for k, (_, index) in enumerate(rows) if k < len(shape))
    return sizes == list(shape[: len(rows)]) and numbered


def _numbers(program: Program, index: Node, shape: Sequence[int], k: int) -> bool:
    """Says whether an index numbers the entries of dim ``k`` of the result."""
    if index.op != "get_attr":
        return False
    line = torch.arange(shape[k]).reshape([-1, *[1] * (len(shape) - k - 1)])
    return torch.equal(program.constant(index).long().expand(shape), line.expand(shape))


def _alike(program: Program, places: Node, shape: Sequence[int], rows: int) -> bool:
    """Says whether places are computed, or the same in all rows: others are those of one clip."""
    if places.op != "get_attr":
        return True
    value = program.constant(places).expand(shape).reshape(prod(shape[:rows]), -1)
    return torch.equal(value, value[:1].expand_as(value))


def _shaped(program: Program, node: Node, target: Target, x: Node, shape: list[int]) -> Node:
    """Gives a tensor another shape, if it has not got it."""
    return insert(program, node, target, x, shape) if list(shape_of(x)) != shape else x
