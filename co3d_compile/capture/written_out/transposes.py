"""Transposes that cancel each other, as converters from channels last write them around convolutions."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.capture.written_out.regions import Constants
from co3d_compile.ir.aten_operators import SEPARABLE
from co3d_compile.ir.graph_edits import insert, insert_constant, replace
from co3d_compile.ir.node_reading import operand, operands, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.rules import is_pointwise

aten = torch.ops.aten
Order = tuple[int, ...]


def cancel_transposes(program: Program) -> None:
    """Rewrites ``permute(f(permute(x)))`` to ``f(x)``, where the second undoes the first.

    Between them stand operators that compute each number by itself. An operator whose operands are all permuted alike
    computes on what was permuted, if that leaves fewer transposes; so does a mean that ends what was permuted.
    """
    constants = Constants(program)
    orders = _orders(program, constants)
    wanted = _wanted(program, orders)
    for node in list(program.graph.nodes):
        if node in wanted:
            _sink(program, node, orders[node], constants)
        elif node.target is aten.permute.default and operand(node).target is aten.permute.default:
            _compose(program, node)
        elif node.target in SEPARABLE and operand(node).target is aten.permute.default:
            _reduce(program, node)


def _orders(program: Program, constants: Constants) -> dict[Node, Order]:
    """Finds the order of dims of each permuted tensor, and of what is computed of tensors permuted alike."""
    orders: dict[Node, Order] = {}
    for node in program.graph.nodes:
        if node.target is aten.permute.default:
            orders[node] = _order(node)
        elif node.op == "call_function" and is_pointwise(node.target):
            streams = [n for n in operands(node) if constants.value(n) is None]
            found = {orders.get(n) for n in streams}
            same = all(shape_of(n) == shape_of(node) for n in streams)
            order = found.pop() if len(found) == 1 and same else None
            if order is not None:
                orders[node] = order
    return orders


def _wanted(program: Program, orders: dict[Node, Order]) -> set[Node]:
    """Finds the pointwise operators from which a transpose is to be taken.

    It is undone behind them, or they join several.
    """
    wanted: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node not in orders or node.target is aten.permute.default:
            continue
        undone = any(
            u.target is aten.permute.default and _composed(orders[node], _order(u)) is None for u in node.users
        )
        joins = len({n for n in operands(node) if n in orders}) > 1
        if undone or joins or any(u in wanted for u in node.users) or any(u.target in SEPARABLE for u in node.users):
            wanted.add(node)
    return wanted


def _order(node: Node) -> Order:
    return tuple(d % rank_of(node) for d in Arguments(node).integers("dims"))


def _composed(first: Order, second: Order) -> Order | None:
    """Puts two orders one after the other; None where they undo each other."""
    order = tuple(first[d] for d in second)
    return None if order == tuple(range(len(order))) else order


def _sink(program: Program, node: Node, order: Order, constants: Constants) -> None:
    """Computes a pointwise operator on what its operands were permuted from, and permutes its result."""
    if any(constants.value(n) is None and n.target is not aten.permute.default for n in operands(node)):
        return
    back = [order.index(d) for d in range(len(order))]
    turned = {}
    for n in operands(node):
        value = constants.value(n)
        if value is None:
            turned[n] = operand(n)
        elif value.numel() > 1:
            shape = [1] * (len(order) - value.dim()) + list(value.shape)
            if n.op == "get_attr":
                whole = value.reshape(shape).permute(back).contiguous().to(n.meta["val"].dtype)
                turned[n] = insert_constant(program, node, f"{node.name}_turned", whole)
            else:  # what the model computes may be another constant in a longer clip
                shaped = insert(program, node, aten.reshape.default, n, shape)
                turned[n] = insert(program, node, aten.permute.default, shaped, back)
    args, kwargs = torch.fx.map_arg((list(node.args), dict(node.kwargs)), lambda n: turned.get(n, n))
    new = insert(program, node, node.target, *args, **kwargs)
    replace(node, insert(program, node, aten.permute.default, new, list(order)))


def _compose(program: Program, node: Node) -> None:
    first = operand(node)
    order = _composed(_order(first), _order(node))
    source = operand(first)
    replace(node, source if order is None else insert(program, node, aten.permute.default, source, list(order)))


def _reduce(program: Program, node: Node) -> None:
    """Reduces what was permuted, where the dims that are left stand in their old order."""
    order, values = _order(operand(node)), Arguments(node)
    dims = values.dims(operand(node))
    left = [d for i, d in enumerate(order) if i not in dims]
    if values.integer("keepdim") or left != sorted(left) or values.given("dtype") is not None:
        return
    replace(node, insert(program, node, node.target, operand(operand(node)), sorted(order[d] for d in dims), False))
