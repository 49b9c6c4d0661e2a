"""Entries that are read by two lists of indices, one of each clip: the last state of a recurrent layer."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.capture.written_out.regions import Constants
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def select_own_entries(program: Program) -> None:
    """Rewrites ``x[arange(n), [5, 5]]``, the same entry of every row, to ``x[:, 5]``."""
    constants = Constants(program, shapes=True)
    for node in list(program.graph.nodes):
        if node.target is aten.index.Tensor and (found := _of_every_row(node, constants)) is not None:
            replace(node, insert(program, node, aten.select.int, operand(node), *found))


def _of_every_row(node: Node, constants: Constants) -> tuple[int, int] | None:
    """The dim and the entry that is taken of every row; None where that is not the same, or not known."""
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    given = [(d, constants.value(i)) for d, i in enumerate(indices) if isinstance(i, Node)]
    if len(given) != 2:
        return None
    side_by_side = given[0][0] + 1 == given[1][0]
    for (rows, every), (dim, index) in (given, given[::-1]):
        if every is None or index is None or torch.bool in (every.dtype, index.dtype):
            return None
        in_order = every.tolist() == list(range(shape_of(operand(node))[rows]))
        entries = index.unique().tolist()
        fits = index.dim() <= 1 and index.numel() in (1, every.numel())
        if in_order and fits and len(entries) == 1 and (side_by_side or rows == 0):
            return dim, entries[0]
    return None
