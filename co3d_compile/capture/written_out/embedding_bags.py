"""Sums, means and maxima of rows of a table: bags of one size, as a lookup and a reduction."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.fx import Node

from co3d_compile.capture.written_out.regions import Constants
from co3d_compile.ir.graph_edits import insert, reads_first_alone, replace_first
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
BAGS = (aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
SUM, MEAN = 0, 1


def open_bags(program: Program) -> None:
    """Rewrites ``embedding_bag`` with as many indices in each bag to ``embedding``, and a reduction of its rows.

    Bags of other sizes, and indices that are left out (``padding_idx``), stay as they are.
    """
    constants = Constants(program)
    for node in list(program.graph.nodes):
        if node.target in BAGS:
            _open(program, node, constants)


def _open(program: Program, node: Node, constants: Constants) -> None:
    table, indices = operand(node), operand(node, 1)
    size, given = _size(node, constants), Arguments(node)
    if size is None or not reads_first_alone(node) or given.integer("padding_idx") != -1:
        return
    bags = [shape_of(indices)[0] // size, size]
    rows = insert(
        program, node, aten.embedding.default, table, insert(program, node, aten.reshape.default, indices, bags)
    )
    shares = given.optional("per_sample_weights")
    if shares is not None:
        shares = insert(program, node, aten.reshape.default, shares, [*bags, 1])
        rows = insert(program, node, aten.mul.Tensor, rows, shares)
    reduction = {SUM: aten.sum.dim_IntList, MEAN: aten.mean.dim}.get(given.integer("mode"), aten.amax.default)
    result = insert(program, node, reduction, rows, [1])
    replace_first(node, result)


def _size(node: Node, constants: Constants) -> int | None:
    """Counts how many indices each bag has; None where that is not known, or not the same."""
    offsets, last = constants.value(operand(node, 2)), Arguments(node).given("include_last_offset")
    count = shape_of(operand(node, 1))[0]
    if offsets is None or not isinstance(count, int):
        return None
    starts = [int(n) for n in offsets] + ([] if last else [count])
    sizes = {after - before for before, after in pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 and starts[0] == 0 and starts[-1] == count and 0 not in sizes else None
