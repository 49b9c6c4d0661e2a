"""Canonical forms of copying along dims: broadcasting needs none, and every other copy is an expansion."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, operand_list, rank_of, shape_of, spread
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Original, Program

aten = torch.ops.aten
UNROLLED = 64  # copies up to which each is a part of a cat


def expansion(program: Program, node: Node) -> None:
    """Leaves as it is what is expanded for operators that broadcast by themselves: ``x * g.expand_as(x)``.

    What is expanded for a ``cat`` is as many parts of it.
    """
    if node.users and all(_broadcasts(node, user) for user in node.users):
        replace(node, operand(node))
        return
    x = operand(node)
    old, new = [1] * (rank_of(node) - rank_of(x)) + list(shape_of(x)), shape_of(node)
    grown = [d for d in range(len(new)) if new[d] != old[d]]
    if rank_of(x) == rank_of(node) and len(grown) == 1 and new[grown[0]] <= UNROLLED:
        _as_parts(node, x, grown[0])


def _as_parts(node: Node, x: Node, dim: int) -> None:
    """Makes copies that only stand beside other tensors in a ``cat`` parts of it: an entry repeated at an end."""
    if not all(u.target is aten.cat.default and Arguments(u).dim(u) == dim for u in node.users):
        return
    for user in list(node.users):
        copies = [[x] * shape_of(node)[dim] if part is node else [part] for part in operand_list(user)]
        user.update_arg(0, [part for group in copies for part in group])
    node.graph.erase_node(node)


def _broadcasts(node: Node, user: Node) -> bool:
    """Says whether an operator gives the same if it reads what is expanded instead."""
    if torch.Tag.pointwise not in getattr(user.target, "tags", ()) or user.kwargs.get("out") is not None:
        return False
    if any(isinstance(a, (list, tuple)) for a in user.args):
        return False
    shapes = [shape_of(operand(n) if n is node else n) for n in user.all_input_nodes]
    return len(shapes) > 1 and tuple(torch.broadcast_shapes(*shapes)) == shape_of(user)


def repetition(program: Program, node: Node) -> None:
    """Writes ``repeat`` of dims of size one as an expansion."""
    x = operand(node)
    counts: list[int] = Arguments(node).integers("repeats")
    sizes = [1] * (len(counts) - rank_of(x)) + list(shape_of(x))
    if any(c != 1 and s != 1 for c, s in zip(counts, sizes, strict=True)):
        return
    new = insert(program, node, aten.expand.default, x, list(shape_of(node)))
    replace(node, new)
    expansion(program, new)


def resampling(program: Program, node: Node) -> None:
    """Writes up-sampling from one place as an expansion (the pooled branch of a pyramid)."""
    x = operand(node)
    if any(a not in (1, b) for a, b in zip(shape_of(x), shape_of(node), strict=True)):
        return
    new = insert(program, node, aten.expand.default, x, list(shape_of(node)))
    program.originals[new] = Original(node.target, node.args[1:])  # type: ignore[arg-type]
    replace(node, new)


def columns(program: Program, node: Node) -> None:
    """Writes ``nn.Unfold`` as ``x.unfold`` along one dim and then the other."""
    x = operand(node)
    kernel, dilation, padding, stride = (spread(v, 2) for v in node.args[1:5])
    if rank_of(x) != 4:
        return
    flat = [padding[1], padding[1], padding[0], padding[0]]
    new = insert(program, node, aten.constant_pad_nd.default, x, flat, 0.0) if any(flat) else x
    for a in range(2):
        span = dilation[a] * (kernel[a] - 1) + 1
        new = insert(program, node, aten.unfold.default, new, 2 + a, span, stride[a])
        if dilation[a] > 1:
            new = insert(program, node, aten.slice.Tensor, new, 4 + a, 0, span, dilation[a])
    new = insert(program, node, aten.permute.default, new, [0, 1, 4, 5, 2, 3])
    replace(node, insert(program, node, aten.reshape.default, new, list(shape_of(node))))
