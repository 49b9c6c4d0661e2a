"""What loops collect their results in, one by one: written as one concatenation behind all of them."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.capture.loops.cut_windows import unfold
from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
MANY = 16  # entries that are joined for each turn
Written = tuple[int, int, Node]  # first index, how many, and what is written there


def join_results(program: Program) -> None:
    """Rewrites:

    1. ``cat([cat([a, b]), c])`` to ``cat([a, b, c])``;
    2. ``cat([cat([a, b, c]), d])[1:]`` to ``cat([b, c, d])``: the last entries of a list that grows;
    3. ``stack([x[:, i * s : i * s + w] for i in range(n)], 1)``, or ``cat``, to ``x.unfold(1, w, s)`` where these are
       all windows of x: no other operators for a clip of another length. Outer ones may be filled up,
       ``cat([zeros, x[:i]])``: they are windows of a pad;
    4. ``y[:, 0] = a; y[:, 1] = b`` to ``stack([a, b])`` where all of y is written; ``y[:, 0]`` behind it to ``a``.
    """
    for node in list(program.graph.nodes):
        if node.target is aten.cat.default:
            _flatten(node)
            unfold(program, node)
        elif node.target is aten.slice.Tensor:
            _shorten(program, node)
        elif node.target is aten.select.int:
            _forward(node)
    for node in reversed(list(program.graph.nodes)):
        written = node.target in (aten.select_scatter.default, aten.slice_scatter.default)
        if written and any(user.target is not node.target for user in node.users):
            _stack(program, node)


def _flatten(node: Node) -> None:
    dim = Arguments(node).dim(node)
    parts: list[Node] = []
    for part in Arguments(node).tensors("tensors"):
        inner = part.target is aten.cat.default and Arguments(part).dim(part) == dim and len(part.users) == 1
        parts += Arguments(part).tensors("tensors") if inner else [part]
    node.args = (parts, dim)


def _shorten(program: Program, node: Node) -> None:
    """Joins those of a few single entries that a slice leaves, where they are joined one by one."""
    x, dim, start, end, step = sliced(node)
    if x.target is not aten.cat.default or step != 1 or Arguments(x).dim(x) != dim or shape_of(x)[dim] > MANY:
        return
    parts: list[Node] = []
    for part in Arguments(x).tensors("tensors"):
        inner = part.target is aten.cat.default and Arguments(part).dim(part) == dim
        parts += Arguments(part).tensors("tensors") if inner else [part]
    if any(shape_of(part)[dim] != 1 for part in parts) or end <= start:
        return
    left = parts[start:end]
    replace(node, left[0] if len(left) == 1 else insert(program, node, aten.cat.default, left, dim))


def _forward(node: Node) -> None:
    """Reads what was just written to an index there."""
    x, dim = operand(node), Arguments(node).dim(operand(node))
    index = Arguments(node).integer("index") % shape_of(x)[dim]
    while x.target is aten.select_scatter.default and Arguments(x).dim(x) == dim:
        start, _, value = _write(x, dim)
        if start == index:
            if shape_of(value) == shape_of(node):
                replace(node, value)
            return
        x = Arguments(x).tensor()
    node.args = (x, *node.args[1:])


def _stack(program: Program, node: Node) -> None:
    dim = Arguments(node).dim(node)
    at: dict[int, tuple[int, Node]] = {}
    size, x = shape_of(node)[dim], node
    while x.target is node.target and Arguments(x).dim(x) == dim:
        start, count, value = _write(x, dim)
        if any(start < first + n and first < start + count for first, (n, _) in at.items()) and start not in at:
            return  # some of it is written over in part
        at.setdefault(start, (count, value))
        x = Arguments(x).tensor()
    if sum(count for count, _ in at.values()) != size or len(at) < 2:
        return
    parts = [at[start][1] for start in sorted(at)]
    if node.target is aten.select_scatter.default:
        parts = [insert(program, node, aten.unsqueeze.default, part, dim) for part in parts]
    if len({(*shape_of(p)[:dim], *shape_of(p)[dim + 1 :]) for p in [node, *parts]}) == 1:
        replace(node, insert(program, node, aten.cat.default, parts, dim))


def _write(node: Node, dim: int) -> Written:
    """Finds where a scatter writes, and what."""
    given = Arguments(node)
    value = given.tensor("src")
    size = shape_of(node)[dim]
    if node.target is aten.select_scatter.default:
        return given.integer("index") % size, 1, value
    start = given.given("start") or 0
    assert isinstance(start, int)
    return start % size if start < 0 else start, shape_of(value)[dim], value
