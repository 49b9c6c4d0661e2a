"""Canonical forms of tensors that are written in place, piece by piece: each piece is read where it was written."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import selected, sliced
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, operand_list, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten


def writing(program: Program, node: Node) -> None:
    """Writes a slice that is written into a tensor as what is before it, it, and what is behind it.

    ``x[:, 1:, :8] = y`` writes a box: a slice into a slice. It is laid out so that the dim of which most is written (a
    shift over time) is the innermost.
    """
    if any(_into(node, user) for user in node.users):
        return
    if _turn(node) is not None:
        _by_turns(program, node)
        return
    box, source, inner = [], node, node
    while True:
        place = _place(inner)
        if place is None:
            return
        box.append(place)
        source = operand(inner, 1)
        if inner.target is aten.select_scatter.default:
            source = insert(program, node, aten.unsqueeze.default, source, place[0])
        if source.op != "call_function" or not _into(source, inner):
            break
        inner = source
    base = operand(node)
    if any(start >= end for _, start, end in box):  # nothing is written
        replace(node, base)
        return
    box.sort(key=lambda at: (at[2] - at[1]) / shape_of(base)[at[0]])
    replace(node, _boxed(program, node, base, source, box))


def _into(node: Node, user: Node) -> bool:
    """Says whether a write goes into the very slice that another one writes back."""
    scatters = (aten.slice_scatter.default, aten.select_scatter.default)
    if node.target not in scatters or user.target is not aten.slice_scatter.default or user.args[1] is not node:
        return False
    part, at = operand(node), _place(user)
    if part.target is not aten.slice.Tensor or part.args[0] is not user.args[0] or at is None or len(node.users) != 1:
        return False
    _, dim, start, end, step = sliced(part)
    return (dim, start, end, step) == (*at, 1) and _place(node) is not None


def _turn(node: Node) -> tuple[int, int, int] | None:
    """Finds the dim, step and first place of a write into every so many-th entry, all along: ``x[1::2] = y``."""
    if node.target is not aten.slice_scatter.default:
        return None
    (_, dim, start, end, step), size = sliced(node), shape_of(node)
    all_along = step > 1 and size[dim] % step == 0 and start < step and end > size[dim] - step + start
    return (dim, step, start) if all_along else None


def _by_turns(program: Program, node: Node) -> None:
    """Writes ``x[::2] = a; x[1::2] = b`` as entries of a and b by turns: stacked, and in one row again."""
    turn = _turn(node)
    assert turn is not None
    dim, step, _ = turn
    if (
        any((_turn(user) or ())[:2] == turn[:2] and user.args[0] is node for user in node.users)
        and len(node.users) == 1
    ):
        return  # the last write of several is looked at
    parts: dict[int, Node] = {}
    base = node
    while (place := _turn(base)) is not None and place[:2] == (dim, step):
        parts.setdefault(place[2], operand(base, 1))
        base = operand(base)
    every = [parts.get(i) or insert(program, node, aten.slice.Tensor, base, dim, i, None, step) for i in range(step)]
    rows = [insert(program, node, aten.unsqueeze.default, part, dim + 1) for part in every]
    stacked = insert(program, node, aten.cat.default, rows, dim + 1)
    replace(node, insert(program, node, aten.reshape.default, stacked, list(shape_of(node))))


def _place(node: Node) -> tuple[int, int, int] | None:
    """Finds the dim, start and end of what a scatter writes; None for every other entry."""
    if node.target is aten.select_scatter.default:
        _, dim, start = selected(node)
        return dim, start, start + 1
    _, dim, start, end, step = sliced(node)
    return (dim, start, end) if step == 1 else None


def _boxed(program: Program, node: Node, base: Node, source: Node, box: list[tuple[int, int, int]]) -> Node:
    """Puts the source in the box of a tensor."""
    if not box:
        return source
    (dim, start, end), *rest = box
    size = shape_of(base)[dim]
    parts = [_boxed(program, node, _cut(program, node, base, dim, start, end), source, rest) if rest else source]
    if start > 0:
        parts.insert(0, _cut(program, node, base, dim, 0, start))
    if end < size:
        parts.append(_cut(program, node, base, dim, end, size))
    return _joined(program, node, parts, dim)


def reading(program: Program, node: Node) -> None:
    """Writes a slice of what was written piece by piece as slices of the pieces: ``zeros`` that stay are seen.

    So too a slice of what was rolled: behind ``roll`` and zeros written to the end, it is seen as a shift.
    """
    x, dim, start, end, step = sliced(node)
    if node.users and all(_into(user, n) for user in node.users for n in user.users):
        return  # it is written back as a whole
    if step == 1 and end > start and (x in program.written or _unrolled(x, dim, start, end)[0] is not x):
        replace(node, _cut(program, node, x, dim, start, end))


def _cut(program: Program, before: Node, x: Node, dim: int, start: int, end: int) -> Node:
    """Takes the entries ``start`` to ``end`` of a dim."""
    if (start, end) == (0, shape_of(x)[dim]):
        return x
    if x.target is aten.permute.default:  # of what was rolled, in another order of the dims
        rolled, order = operand(x), Arguments(x).dims(x, "dims")
        if _unrolled(rolled, order[dim], start, end)[0] is not rolled:
            part = _cut(program, before, rolled, order[dim], start, end)
            return insert(program, before, aten.permute.default, part, order)
    x, start, end = _unrolled(x, dim, start, end)
    if x not in program.written:
        return insert(program, before, aten.slice.Tensor, x, dim, start, end)
    parts = operand_list(x)
    along = Arguments(x).dim(x)
    if along != dim:
        return _joined(program, before, [_cut(program, before, p, dim, start, end) for p in parts], along)
    pieces, at = [], 0
    for part in parts:
        size = shape_of(part)[dim]
        first, last = max(start - at, 0), min(end - at, size)
        if first < last:
            pieces.append(_cut(program, before, part, dim, first, last))
        at += size
    return _joined(program, before, pieces, dim)


def _unrolled(x: Node, dim: int, start: int, end: int) -> tuple[Node, int, int]:
    """Finds what a slice takes of the operand of a ``roll`` along the dim; as it is, if it goes around the end."""
    if x.target is not aten.roll.default or Arguments(x).dims(x, "dims") != [dim]:
        return x, start, end
    size = shape_of(x)[dim]
    (shift,) = Arguments(x).integers("shifts")
    first = (start - shift) % size
    return (operand(x), first, first + end - start) if first + end - start <= size else (x, start, end)


def _joined(program: Program, before: Node, parts: list[Node], dim: int) -> Node:
    if len(parts) == 1:
        return parts[0]
    node = insert(program, before, aten.cat.default, parts, dim)
    program.written.add(node)
    return node
