"""Writes a part of the clip graph, resized to the entries of a step, into the step graph: for any batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.fx.node import Argument

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.aten_operators import CHECKS, SAME, SIZED
from co3d_compile.ir.graph_walks import run_operator
from co3d_compile.ir.node_reading import operands, where
from co3d_compile.ir.resized_graph import Captures
from co3d_compile.ir.stored_constants import get_constant
from co3d_compile.step_graph.builder import Builder

aten = torch.ops.aten


def write_body(low: Builder, captures: Captures, entries: int, inputs: Sequence[Node], like: tuple[Node, int]) -> Node:
    """Writes a part of the clip graph into the step graph, and gives its result.

    Numbers that grow with the batch are found by writing the part for two batches: in views they are left open, and
    constants go on from clip to clip.

    Args:
        low: The step graph.
        captures: The part.
        entries: How many entries it is run on.
        inputs: These entries, as clips.
        like: A tensor with the batch in a dim of its own, and that dim.
    """
    batch = captures.sizes[0].batch
    one = captures.at(entries, batch)
    two = captures.at(entries, batch + 1) if captures.wide is not None else one
    made: dict[Node, Node] = {}
    static: dict[Node, tuple[Tensor, Tensor]] = {}
    given = iter(inputs)
    for a, b in zip(one.graph.nodes, two.graph.nodes, strict=True):
        if a.op == "placeholder":
            made[a] = next(given)
        elif a.op == "get_attr":
            static[a] = (get_constant(one, str(a.target)), get_constant(two, str(b.target)))
        elif a.op == "output":
            return _read(low, a.args[0], made, static, like)
        elif all(n in static for n in a.all_input_nodes):
            one_values = {n: static[n][0] for n in operands(a)}
            two_values = {n: static[m][1] for n, m in zip(operands(b), operands(a), strict=True)}
            static[a] = (run_operator(a, one_values), run_operator(b, two_values))
        elif a.target in SAME:
            made[a] = made[a.all_input_nodes[0]]
        elif a.target not in CHECKS:
            opened = tuple(_open(a, b, x, y) for x, y in zip(a.args, b.args, strict=True))
            args = map_arg(opened, lambda n: _read(low, n, made, static, like))
            kwargs = map_arg(a.kwargs, lambda n: _read(low, n, made, static, like))
            made[a] = low.call(a.target, *args, **kwargs)
    raise AssertionError("a graph has an output")


def _open(a: Node, b: Node, one: Argument, two: Argument) -> Argument:
    """Leaves the batch out of the arguments: a size that grows with it is left open."""
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return type(one)(_open(a, b, x, y) for x, y in zip(one, two, strict=True))
    if isinstance(one, int) and one != two:
        if a.target not in SIZED:
            raise UnsupportedError(
                "A number among its arguments grows with the batch.",
                **where(a),
                hint="Compile it for one clip: take the batch out of it.",
            )
        return -1
    return one


def _read(
    low: Builder,
    node: object,
    made: dict[Node, Node],
    static: Mapping[Node, tuple[Tensor, Tensor]],
    like: tuple[Node, int],
) -> Node:
    """Finds the node of the step graph that has the value of one of the part."""
    assert isinstance(node, Node)
    if node not in made:
        made[node] = _constant(low, *static[node], *like)
    return made[node]


def _constant(low: Builder, one: Tensor, two: Tensor, like: Node, like_dim: int) -> Node:
    """Makes a constant, which may go on evenly from clip to clip."""
    if one.shape == two.shape:
        return low.new_constant(one)
    dims = [d for d, (m, n) in enumerate(zip(one.shape, two.shape, strict=True)) if m != n]
    batch = low.batch
    d = dims[0]
    rows = one.unflatten(d, (batch, -1))
    first, step = rows.narrow(d, 0, 1), torch.zeros_like(rows.narrow(d, 0, 1))
    if batch > 1:
        counts = not first.dtype.is_floating_point and first.dtype is not torch.bool
        step = rows.narrow(d, 1, 1) - first if counts else step
    index = torch.arange(batch + 1).view(-1, *[1] * (rows.dim() - d - 1))
    expected = first + (step * index).to(step.dtype)
    if len(dims) > 1 or not torch.equal(expected.flatten(d, d + 1), two):
        raise UnsupportedError("A constant depends on the batch.", module_path=low.path)
    base = low.with_batch_of(low.new_constant(first), like, d, like_dim)
    if bool(step.any()):
        ones = low.with_batch_of(low.new_constant(torch.ones(1, dtype=torch.int64)), like, 0, like_dim)
        count = low.call(aten.sub.Tensor, low.call(aten.cumsum.default, ones, 0), 1)
        count = low.call(aten.reshape.default, count, [-1, *[1] * (rows.dim() - d - 1)])
        moved = low.call(aten.mul.Tensor, count, low.new_constant(step))
        base = low.call(aten.add.Tensor, base, low.call(aten._to_copy.default, moved, dtype=one.dtype))
    shape = [-1 if i == d else s for i, s in enumerate(one.shape)]
    return low.call(aten.reshape.default, base, shape)
