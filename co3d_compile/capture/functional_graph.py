"""Writes that nobody else sees become operators with a result of their own: ``relu_(x)`` becomes ``relu(x)``."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten
# Made of other operators, which might return an operand itself; these never do.
_FRESH = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
}


def written_apart(graph: Graph) -> bool:
    """Replaces operators that write into an operand of their own. Returns whether no other write is left.

    The operand is written into where it lies: what reads it behind the write reads the result.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        functional = _functional(node.target)
        operand = node.args[0] if node.args else None
        if functional is None or not isinstance(operand, Node) or not _is_own(operand, node):
            return False
        node.target = functional
        for user in list(operand.users):
            if order[user] > order[node]:
                user.replace_input_with(operand, node)
    return True


def _functional(target: OpOverload) -> OpOverload | None:
    """Finds the operator that gives what another one writes into its first operand, and into nothing else."""
    first, *others = target._schema.arguments
    name = target._schema.name.removeprefix("aten::")
    writes = first.alias_info is not None and first.alias_info.is_write
    if not writes or any(other.alias_info is not None for other in others) or not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    found = getattr(packet, target._overloadname, None)
    return found if isinstance(found, OpOverload) and not _may_alias(found) else None


def _is_own(operand: Node, node: Node) -> bool:
    """Says whether an operand shares its memory with nothing, and the result is a tensor like it."""
    value, result = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if (value.shape, value.dtype, value.stride()) != (result.shape, result.dtype, result.stride()):
        return False
    others = [user for user in operand.users if user is not node]
    return all(isinstance(each.target, OpOverload) and not _may_alias(each.target) for each in (operand, *others))


def _may_alias(target: OpOverload) -> bool:
    """Says whether a result may be an operand, or a part of one."""
    if target in _FRESH:
        return False
    return target._can_decompose() or any(each.alias_info is not None for each in target._schema.returns)
