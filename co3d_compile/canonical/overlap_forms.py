"""Canonical forms of overlap-and-add: blocks that are added where they overlap, by constant indices, as a fold."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch.fx import Node
from torch.fx.node import Argument, Target

from co3d_compile.canonical.flat_forms import in_each_row
from co3d_compile.ir.graph_edits import Rewrite, insert, replace
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import constant_of

aten = torch.ops.aten


class Blocks(NamedTuple):
    """Indices that walk through blocks, one behind the other: ``first + k * stride + i``."""

    number: int
    size: int
    stride: int
    first: int

    @property
    def length(self) -> int:
        """From the first index to the last one."""
        return (self.number - 1) * self.stride + self.size


def blocks_of(index: torch.Tensor, size: int) -> Blocks | None:
    """Finds the blocks that indices into a dim walk through; None where they do not."""
    values = index.flatten()
    values = torch.where(values < 0, values + size, values)
    if not len(values):
        return None
    jumps = (values.diff() != 1).nonzero().flatten()
    width = int(jumps[0]) + 1 if len(jumps) else len(values)
    if len(values) % width:
        return None
    rows = values.reshape(-1, width)
    stride = int(rows[1, 0] - rows[0, 0]) if len(rows) > 1 else width
    found = Blocks(len(rows), width, stride, int(rows[0, 0]))
    even = rows[0, 0] + torch.arange(len(rows))[:, None] * stride + torch.arange(width)
    return found if stride > 0 and torch.equal(rows, even) else None


def _index_put(program: Program, node: Node) -> None:
    """Writes ``x.index_put((None, index), values, accumulate=True)``, whose indices lie in even blocks, as blocks that
    overlap. The index has any number of dims."""
    given = Arguments(node)
    x, values, indices = given.tensor(), given.tensor("values"), given.given("indices")
    assert isinstance(indices, (list, tuple))
    there = [(d, i) for d, i in enumerate(indices) if isinstance(i, Node)]
    if len(there) != 1:
        return
    dim, index = there[0]
    if index.op != "get_attr":
        in_each_row(program, node, dim, index)
        return
    if not given.given("accumulate"):
        return
    value, shape = program.constant(index), shape_of(x)
    wanted = [*shape[:dim], *value.shape, *shape[dim + 1 :]]
    if value.dtype is torch.bool or list(shape_of(values)) != wanted:
        return
    flat = [*shape[:dim], value.numel(), *shape[dim + 1 :]]
    _added(program, node, x, dim, value, insert(program, node, aten.reshape.default, values, flat))


def _scatter_add(program: Program, node: Node) -> None:
    """Writes ``x.scatter_add(dim, index, source)`` so, with the same indices everywhere else."""
    given = Arguments(node)
    x, index, source = given.tensor(), given.tensor("index"), given.tensor("src")
    dim = given.dim(x)
    others = [d for d in range(len(shape_of(x))) if d != dim]
    if index.op != "get_attr" or shape_of(index) != shape_of(source):
        return
    value = program.constant(index)
    if all(value.shape[d] == shape_of(x)[d] for d in others) and set(others) <= constant_of(index).alike:
        line = value.movedim(dim, -1).reshape(-1, value.shape[dim])[0]
        _added(program, node, x, dim, line, source)


def _added(program: Program, node: Node, x: Node, dim: int, index: torch.Tensor, source: Node) -> None:
    """Rewrites ``node``: the rows of ``source`` along a dim, added to ``x`` at the indices."""
    size, rank = shape_of(x)[dim], len(shape_of(x))
    blocks = blocks_of(index, size)
    if blocks is None or node.meta["val"].dtype != source.meta["val"].dtype:
        return

    def then(target: Target, *args: Argument) -> None:
        nonlocal source
        source = insert(program, node, target, source, *args)

    order = [*(d for d in range(rank) if d != dim), dim]
    rest = [shape_of(x)[d] for d in order[:-1]]
    then(aten.permute.default, order)
    if blocks.number > 1:
        first, more = (rest[0], prod(rest[1:])) if rest else (1, 1)
        then(aten.reshape.default, [*rest, blocks.number, blocks.size])
        then(aten.transpose.int, -1, -2)
        then(aten.reshape.default, [first, more * blocks.size, blocks.number])
        then(aten.col2im.default, [1, blocks.length], [1, blocks.size], [1, 1], [0, 0], [1, blocks.stride])
        then(aten.reshape.default, [*rest, blocks.length])
    behind = size - blocks.first - blocks.length
    if blocks.first or behind:
        then(aten.constant_pad_nd.default, [blocks.first, behind], 0.0)
    then(aten.permute.default, [order.index(d) for d in range(rank)])
    if constant_of(x).fill != 0:
        source = insert(program, node, aten.add.Tensor, x, source)
    replace(node, source)


OVERLAPS: dict[Target, Rewrite] = {
    aten.index_put.default: _index_put,
    aten.scatter_add.default: _scatter_add,
}
"""Run after constants are computed, since these need them."""
