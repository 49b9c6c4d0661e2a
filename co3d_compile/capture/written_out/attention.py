"""Attention that is written out as two products and a softmax, as one operator again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from co3d_compile.capture.written_out.regions import Constants, without_effect
from co3d_compile.ir.graph_edits import insert, insert_constant, replace
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments, order_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten
PRODUCTS = {aten.matmul.default, aten.bmm.default}
LEAST = torch.finfo(torch.float32).min  # exporters add it in place of minus infinity
SOFTMAX = {aten.softmax.int, aten._softmax.default}


@dataclass
class _Scores:
    """``scale * (q @ k.permute(order)) + mask`` as it was found, from the softmax backwards."""

    q: Node
    k: Node
    order: list[int]
    scale: float
    mask: Tensor | None
    sources: list[tuple[str, Node]]
    """What the network adds, hides or shows, which the mask is of."""


def join_attention(program: Program) -> None:
    """Rewrites ``softmax(q @ k.T * scale + mask) @ v`` to ``scaled_dot_product_attention``."""
    constants = Constants(program)
    for node in list(program.graph.nodes):
        if node.target not in PRODUCTS or not isinstance(node.args[0], Node):
            continue
        softmax, v = _unguarded(without_effect(operand(node)), constants), operand(node, 1)
        if softmax.target not in SOFTMAX or Arguments(softmax).dim(softmax) != rank_of(softmax) - 1:
            continue
        found = _scores(operand(softmax), constants)
        if found is not None and _fits(found, v, node):
            _join(program, node, found, v)


def _unguarded(node: Node, constants: Constants) -> Node:
    """Finds the softmax in ``where(isnan(softmax), 0, softmax)``, which is 0 where a mask hides everything."""
    if node.target is not aten.where.self or not isinstance(node.args[2], Node):
        return node
    asked, softmax, zero = operand(node), node.args[2], constants.value(operand(node, 1))
    is_guard = asked.target is aten.isnan.default and asked.args[0] is softmax
    is_zero = zero is not None and not bool(zero.any())
    return softmax if is_guard and is_zero and set(softmax.users) == {asked, node} else node


def _scores(node: Node, constants: Constants) -> _Scores | None:
    """Takes apart what goes into a softmax: masks and scales down to the product of matrices."""
    scale, mask, sources = 1.0, None, []
    while node.target not in PRODUCTS:
        node = without_effect(node)
        if len(node.users) != 1 or not isinstance(node.target, torch._ops.OpOverload):
            return None
        number = _factor(node, constants)
        if number is not None:
            scale, node = scale * number[0], number[1]
            continue
        added = _added(node, constants) if scale == 1.0 else None
        if added is None:
            return None
        value, node, source = added
        mask = value if mask is None else mask + value
        sources.append(source)
    if len(node.users) != 1:
        return None
    of_q, q = _factor(operand(node), constants) or (1.0, operand(node))
    of_product, transposed = _factor(operand(node, 1), constants) or (1.0, operand(node, 1))
    order, turned = _turned(transposed)
    of_k, k = _factor(turned, constants) or (1.0, turned)
    return _Scores(q, k, order, scale * of_q * of_product * of_k, mask, sources)


def _factor(node: Node, constants: Constants) -> tuple[float, Node] | None:
    """Reads a multiplication with, or a division by, a single number: the factor, and what is multiplied."""
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    if not divides and node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        return None
    for x, other in _both_ways(node)[: 1 if divides else 2]:
        value = constants.value(other) if isinstance(other, Node) else other
        if isinstance(value, Tensor):
            value = float(value) if value.numel() == 1 else None
        if isinstance(value, (int, float)) and value and _is_scores(x, node, constants):
            return (1 / value if divides else value), x
    return None


def _both_ways(node: Node) -> list[tuple[Node, Argument]]:
    """Pairs either operand of an operator with the other one."""
    a, b = node.args[:2]
    return [(x, other) for x, other in ((a, b), (b, a)) if isinstance(x, Node)]


def _is_scores(x: Node, node: Node, constants: Constants) -> bool:
    return shape_of(x) == shape_of(node) and constants.value(x) is None


def _added(node: Node, constants: Constants) -> tuple[Tensor, Node, tuple[str, Node]] | None:
    """Reads a constant that is added to scores, or fills some of them in.

    As numbers to add, the scores, and what it is.
    """
    if node.target is aten.add.Tensor and Arguments(node).number("alpha") == 1:
        for x, other in _both_ways(node):
            value = constants.value(other) if isinstance(other, Node) else None
            if value is not None and isinstance(other, Node) and _is_scores(x, node, constants):
                return value.masked_fill(value <= LEAST, -torch.inf), x, ("adds", other)
    if node.target not in (aten.masked_fill.Scalar, aten.where.self):
        return None
    filled = node.target is aten.masked_fill.Scalar
    scores, fill = node.args[0 if filled else 1], node.args[2]
    given = operand(node, 1 if filled else 0)
    hidden = constants.value(given)
    number = constants.value(fill) if isinstance(fill, Node) else fill
    if hidden is None or not isinstance(scores, Node) or not isinstance(number, (Tensor, int, float)):
        return None
    hidden = hidden if filled else ~hidden
    if float(torch.as_tensor(number).max()) != -torch.inf or not _is_scores(scores, node, constants):
        return None
    return (
        torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf),
        scores,
        (
            "hides" if filled else "shows",
            given,
        ),
    )


def _fits(found: _Scores, v: Node, node: Node) -> bool:
    """Says whether the operands have the shapes that attention takes, and no row of the mask hides everything."""
    q, k = shape_of(found.q), [shape_of(found.k)[d] for d in found.order]
    same = q[:-2] == tuple(k[:-2]) == shape_of(v)[:-2] and len(q) == len(shape_of(node)) and len(q) >= 3
    hidden = found.mask is not None and bool((found.mask == -torch.inf).all(-1).any())
    return same and not hidden


def _join(program: Program, node: Node, found: _Scores, v: Node) -> None:
    order = [*found.order[:-2], found.order[-1], found.order[-2]]
    keys = found.k if order == sorted(order) else insert(program, node, aten.permute.default, found.k, order)
    mask = None
    if found.mask is not None:
        value = found.mask.to(node.meta["val"].dtype)
        hides = bool(((value == 0) | (value == -torch.inf)).all())
        mask = _mask(program, node, found.sources, hides)
        if mask is None:
            mask = insert_constant(program, node, f"{node.name}_mask", value == 0 if hides else value)
    target = aten.scaled_dot_product_attention.default
    replace(node, insert(program, node, target, found.q, keys, v, mask, scale=found.scale))


def _mask(program: Program, node: Node, sources: list[tuple[str, Node]], hides: bool) -> Node | None:
    """Builds the mask as the network computes it, so that it can be computed for clips of another length."""
    added = [mask for how, mask in sources if how == "adds"]
    if added == [mask for _, mask in sources] and hides and len(added) == 1:
        return insert(program, node, aten.eq.Scalar, added[0], 0)
    if any(mask.meta["val"].dtype is not node.meta["val"].dtype for mask in added):
        return None
    covers = [(how == "shows", mask) for how, mask in sources if how != "adds"]
    if not added:
        shown = [mask if shows else insert(program, node, aten.logical_not.default, mask) for shows, mask in covers]
        return reduce(lambda a, b: insert(program, node, aten.logical_and.default, a, b), shown)
    total = reduce(lambda a, b: insert(program, node, aten.add.Tensor, a, b), added)
    for shows, mask in covers:
        hidden = insert(program, node, aten.logical_not.default, mask) if shows else mask
        total = insert(program, node, aten.masked_fill.Scalar, total, hidden, -torch.inf)
    return total


def _turned(node: Node) -> tuple[list[int], Node]:
    """Finds the order of dims that a node puts a tensor in, and the tensor.

    Where it is no such step, the node itself.
    """
    order = order_of(node)
    return (list(range(rank_of(node))), node) if order is None else (order, operand(node))
