"""Canonical forms of tables: what a constant holds at indices that are computed, as the vectors of a codebook."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import PLACES
from co3d_compile.ir.graph_edits import insert, insert_constant, replace
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def lookup(program: Program, node: Node, given: Sequence[tuple[int, Node]]) -> None:
    """Writes ``table[i, j]``, of a constant, as an embedding: of one index into its rows.

    Args:
        given: The dims that are indexed, and the indices.
    """
    table, dims = operand(node), [d for d, _ in given]
    computed = any(i.op != "get_attr" for _, i in given) and all(i.meta["val"].dtype != torch.bool for _, i in given)
    if not computed or dims != list(range(dims[0], dims[0] + len(dims))):
        return
    value, sizes = program.constant(table), [shape_of(table)[d] for d in dims]
    place: Node | None = None
    for (_, index), size in zip(given, sizes, strict=True):
        own = index if index.target in PLACES else insert(program, node, aten.remainder.Scalar, index, size)
        if place is not None:
            place = insert(program, node, aten.mul.Tensor, place, size)
            own = insert(program, node, aten.add.Tensor, place, own)
        place = own
    assert place is not None
    if value.dim() != 2 or dims != [0]:
        value = value.movedim(dims, list(range(len(dims))))
        rows = value.reshape(math.prod(sizes), -1).contiguous()
        table = insert_constant(program, node, f"constant.{node.name}", rows)
    result = insert(program, node, aten.embedding.default, table, place)
    first, places = dims[0], rank_of(place)
    whole = [*shape_of(place), *value.shape[len(dims) :]]
    if list(shape_of(result)) != whole:
        result = insert(program, node, aten.reshape.default, result, whole)
    if first:  # dims in front of those that are indexed
        order = [*range(places, places + first), *range(places), *range(places + first, len(whole))]
        result = insert(program, node, aten.permute.default, result, order)
    replace(node, result)
