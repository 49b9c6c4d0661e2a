"""Canonical forms of entries taken by constant indices: as slices, repeated ends and reflecting pads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.fx import Node

from co3d_compile.canonical.flat_forms import in_each_row
from co3d_compile.canonical.row_forms import in_own_rows
from co3d_compile.canonical.table_forms import lookup
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import index_of, operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def gather(program: Program, node: Node) -> None:
    """Writes ``x[:, :, index]`` with a constant index on one dim as a slice, or as selected entries."""
    x, indices = node.args[0], index_of(node)
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if (
        len(given) != 1
        or given[0][1].op != "get_attr"
        or rank_of(given[0][1]) != 1
        or given[0][1].meta["val"].dtype == torch.bool
    ):
        _computed(program, node, given)
        return
    dim, index = given[0]
    taken = insert(program, node, aten.index_select.default, x, dim, index)
    replace(node, taken)
    selection(program, taken)


def _computed(program: Program, node: Node, given: Sequence[tuple[int, Node]]) -> None:
    """Writes what is taken at indices that are computed: rows of a constant, or in each row of a tensor by itself."""
    if operand(node).op == "get_attr":
        lookup(program, node, given)
    elif len(given) == 1:
        in_each_row(program, node, *given[0])
    else:
        in_own_rows(program, node, given)


def selection(program: Program, node: Node) -> None:
    """Writes ``index_select`` of evenly spaced entries as a slice, with what stands in front of it and behind it."""
    x, index = operand(node), operand(node, 2)
    if index.op != "get_attr":
        _computed(program, node, [(Arguments(node).dim(x), index)])
        return
    dim, values = Arguments(node).dim(x), program.constant(index).flatten().tolist()
    values = [value + shape_of(x)[dim] if value < 0 else value for value in values]
    front, back = _repeated(values), _repeated(values[::-1])
    even = _evenly(values[front : len(values) - back])
    if even is None:
        _reflection(program, node, dim, values)
        return
    start, end, _ = even
    main = insert(program, node, aten.slice.Tensor, x, dim, *even)
    if front + back:  # the first or the last entry several times, as ``clamp`` gives it
        first, last = (insert(program, node, aten.slice.Tensor, x, dim, i, i + 1) for i in (start, end - 1))
        main = insert(program, node, aten.cat.default, [*[first] * front, main, *[last] * back], dim)
    replace(node, main)


def _repeated(values: Sequence[int]) -> int:
    """Counts how often the first of some numbers stands in front of itself."""
    return next((i for i, value in enumerate(values) if value != values[0]), len(values)) - 1


def _evenly(values: Sequence[int]) -> tuple[int, int, int] | None:
    """Finds the start, end and step of evenly spaced rising indices."""
    if not values:
        return None
    steps = {b - a for a, b in pairwise(values)} or {1}
    step = steps.pop()
    return (values[0], values[-1] + 1, step) if not steps and step > 0 and values[0] >= 0 else None


def _reflection(program: Program, node: Node, dim: int, values: list[int]) -> None:
    """Writes ``x[:, [2, 1, 0, 1, …, 7, 6, 5]]``, frames mirrored at the ends of a clip, as a reflecting pad."""
    low, high = min(values), max(values)
    front, back = values.index(low), values[::-1].index(high)
    mirrored = [*range(low + front, low, -1), *range(low, high + 1), *range(high - 1, high - 1 - back, -1)]
    if values != mirrored or rank_of(node) == 1:
        return
    part = insert(program, node, aten.slice.Tensor, operand(node), dim, low, high + 1)
    others = [d for d in range(rank_of(node)) if d != dim]
    sizes = [shape_of(node)[d] for d in others]
    rows = insert(program, node, aten.permute.default, part, [*others, dim])
    rows = insert(program, node, aten.reshape.default, rows, [sizes[0], math.prod(sizes[1:]), high + 1 - low])
    rows = insert(program, node, aten.reflection_pad1d.default, rows, [front, back])
    rows = insert(program, node, aten.reshape.default, rows, [*sizes, len(values)])
    places = [[*others, dim].index(d) for d in range(rank_of(node))]
    replace(node, insert(program, node, aten.permute.default, rows, places))
