"""Keys and values that are repeated for several heads of queries, as attention that shares them.

What is kept of a frame is then what was repeated, not what came of it.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.capture.written_out.regions import run_in_float64
from co3d_compile.ir.aten_operators import SIZED
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, operands, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
HEADS = -3
MOVES = {
    *SIZED, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
    aten.repeat.default, aten.repeat_interleave.self_int,
}  # fmt: skip
"""Operators that move entries of one tensor, or repeat them."""


def share_heads(program: Program) -> None:
    """Rewrites attention on keys and values of which each head is there several times, one behind the other."""
    for node in list(program.graph.nodes):
        if node.target is not ATTENTION or Arguments(node).given("enable_gqa"):
            continue
        keys, values = operand(node, 1), operand(node, 2)
        few = _before_repeats(keys)
        if few is None or rank_of(node) < 4:
            continue
        others = _before_repeats(values, shape_of(few)[HEADS])
        if others is None:
            continue
        given = [operand(node), few, others, *node.args[3:]]
        replace(node, insert(program, node, ATTENTION, *given, **{**node.kwargs, "enable_gqa": True}))


def _before_repeats(node: Node, heads: int | None = None) -> Node | None:
    """Finds the tensor whose heads a tensor repeats, if they are fewer: so many, or any number."""
    path, source, shape = [], node, list(shape_of(node))
    while source.target in MOVES and len(operands(source)) == 1:
        path.append(source)
        source = operand(source)
        found = list(shape_of(source))
        fewer = len(found) == len(shape) and 0 < found[HEADS] < shape[HEADS] and shape[HEADS] % found[HEADS] == 0
        same = fewer and [*found[:HEADS], *found[HEADS + 1 :]] == [*shape[:HEADS], *shape[HEADS + 1 :]]
        if same and heads in (None, found[HEADS]):
            return source if _repeats(source, path[::-1], shape[HEADS] // found[HEADS]) else None
    return None


def _repeats(source: Node, path: list[Node], times: int) -> bool:
    """Says whether operators give each head so many times, one behind the other: tried on the numbers of entries."""
    entries = torch.arange(source.meta["val"].numel(), dtype=torch.float64).reshape(shape_of(source))
    values: dict[Node, torch.Tensor | None] = {source: entries}
    for node in path:
        values[node] = run_in_float64(node, values)
    return torch.equal(values[path[-1]], entries.repeat_interleave(times, HEADS))  # type: ignore[arg-type]
