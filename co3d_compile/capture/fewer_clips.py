"""The graph for one clip, made of the graph that was captured for two: without another run of the tracer.

Where the batch is a number, in views and in tensors that are made, it is looked for and written anew. What comes of it
may be another network: whoever asks compares it with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from co3d_compile.ir.aten_operators import RESHAPES
from co3d_compile.ir.graph_edits import fake_mode
from co3d_compile.ir.node_reading import called, operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.support.silence_torch import quiet

aten = torch.ops.aten
TWO = 2
MADE = {
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Tensors that are made in sizes that are numbers."""


def for_one_clip(captured: Program) -> Program | None:
    """Makes the graph for one clip of one for two, which stays as it is; None where operators do not fit together so.

    Shapes of inputs are left to those who describe them.
    """
    program = captured.copied()
    operators = [n for n in program.graph.nodes if n.op == "call_function"]
    plain = all(isinstance(n.target, OpOverload) or n.target.__name__ == "getitem" for n in operators)
    if not plain or any(i.shape[:1] != (TWO,) or i.boxes is not None for i in program.inputs):
        return None
    before: dict[Node, object] = {n: n.meta.get("val") for n in program.graph.nodes}
    outer: dict[Node, int] = {}
    try:
        with fake_mode(program), torch.no_grad(), quiet():
            for node in program.graph.nodes:
                if node.op in ("placeholder", "call_function"):
                    node.meta["val"] = _value(node, before, outer)
    except Exception:  # whatever a meta kernel raises for sizes that do not fit
        return None
    program.module.recompile()
    return program


def _value(node: Node, before: Mapping[Node, object], outer: dict[Node, int]) -> object:
    """Computes what a node gives for one clip; a size that is the batch becomes one.

    Args:
        node: Its operands are for one clip already.
        before: What each node gives for two clips.
        outer: Of values with a dim that holds more than the batch: what lies outside of it there.
    """
    old = before[node]
    outer[node] = next((outer[n] for n in node.all_input_nodes if outer.get(n, 1) > 1), 1)
    if node.op == "placeholder":
        assert isinstance(old, Tensor)
        return torch.empty(1, *old.shape[1:], dtype=old.dtype)
    if node.target in RESHAPES or node.target is aten.expand.default:
        x, now = before[operand(node)], shape_of(operand(node))
        assert isinstance(x, Tensor) and isinstance(old, Tensor)
        if node.target in RESHAPES:
            sizes, outer[node] = _viewed(list(x.shape), list(now), list(old.shape), outer[node])
        else:
            sizes = _expanded(list(x.shape), list(now), list(old.shape))
        said = Arguments(node).integers("shape" if node.target in RESHAPES else "size")
        node.update_arg(1, [-1 if a == -1 else size for a, size in zip(said, sizes, strict=True)])
    elif node.target in MADE:
        sizes = Arguments(node).integers("size")
        batch = sizes.index(TWO) if TWO in sizes else None
        made = [1 if d == batch else size for d, size in enumerate(sizes)]
        node.update_arg(next(at for at, given in enumerate(node.args) if given == sizes), made)
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    value: object = called(node.target)(*args, **kwargs)
    ranks = [[v.dim() for v in pytree.tree_leaves(x) if isinstance(v, Tensor)] for x in (value, old)]
    if ranks[0] != ranks[1]:
        raise ValueError("a dim of size one was the batch")
    return value


def _viewed(x: list[int], now: list[int], sizes: list[int], outer: int) -> tuple[list[int], int]:
    """Writes the sizes of a view of fewer numbers: the batch has as many places before it as in the operand.

    Returns:
        The sizes, and what lies outside of the batch in the dim that holds it.
    """
    changed = [d for d, (a, b) in enumerate(zip(x, now, strict=True)) if a != b]
    if not changed:
        return sizes, 1
    places = prod(x[: changed[0]]) * outer
    for d, size in enumerate(sizes):
        own, rest = divmod(places, prod(sizes[:d]))
        if own and not rest and size % (TWO * own) == 0 and prod(sizes) // size * (size // TWO) == prod(now):
            return [*sizes[:d], size // TWO, *sizes[d + 1 :]], own
    raise ValueError("the batch is nowhere in the view")


def _expanded(x: list[int], now: list[int], sizes: list[int]) -> list[int]:
    """Writes the sizes of an expanded tensor: those of the operand, or the batch where it is expanded over it."""
    more = len(sizes) - len(x)
    found = list(sizes)
    for d, (old, new) in enumerate(zip(x, now, strict=True)):
        if old != new:
            found[more + d] = new
    if found == sizes and sizes[:1] == [TWO] and (more or x[0] == 1):
        found[0] = 1
    return found
