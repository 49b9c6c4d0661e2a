"""Reads a node of an FX graph: operands, arguments, shape, module path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node


def operator_name(target: Any) -> str:
    """Names an operator as people know it: ``aten.conv3d``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return str(getattr(target, "__name__", target))


def module_path(node: Node) -> str:
    """Reads the dotted path of the module that a node came from (empty for the model itself)."""
    if "path" in node.meta:
        return str(node.meta["path"])
    return list(module_calls(node).values() or [""])[-1]


def place_of(node: Node) -> str:
    """Names an operator and its module for people: ``aten.conv3d in blocks.1``."""
    return f"{operator_name(node.target)} in {module_path(node) or 'the model'}"


def where(node: Node) -> dict[str, str]:
    """Names the operator and its module as errors take them: ``raise UsageError(what, **where(node))``."""
    return {"operator": operator_name(node.target), "module_path": module_path(node)}


def returned(graph: Graph) -> list[Node]:
    """Lists the nodes that a graph gives, in their order."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def module_calls(node: Node) -> dict[str, str]:
    """Lists the dotted path of each module that a node came from, by a name for the call, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(call): str(entry[0]).removeprefix("L['self']").removeprefix(".") for call, entry in stack.items()}


def overloads(operator: Any) -> list[Any]:
    """Lists all overloads of an operator packet; an overload or function is itself."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return [getattr(operator, name) for name in operator.overloads()]
    return [operator]


def operands(node: Node) -> list[Node]:
    """Lists the tensor operands, in order, lists flattened."""
    return list(node.all_input_nodes)


def operand(node: Node, index: int = 0) -> Node:
    """Reads a tensor operand by its position."""
    arg = node.args[index]
    assert isinstance(arg, Node), f"operand {index} of {node.name} is no tensor"
    return arg


def operand_list(node: Node, index: int = 0) -> list[Node]:
    """Reads the tensors of a list, such as those of ``cat``."""
    arg = node.args[index]
    assert isinstance(arg, (list, tuple)), f"operand {index} of {node.name} is no list"
    return [n for n in arg if isinstance(n, Node)]


def whole(node: Node, index: int) -> int:
    """Reads an argument that is a whole number, by its position."""
    arg = node.args[index]
    assert isinstance(arg, int), f"argument {index} of {node.name} is no whole number"
    return arg


def shape_of(node: Node) -> tuple[int, ...]:
    """Reads the shape in the captured clip."""
    return tuple(int(s) for s in node.meta["val"].shape)


def rank_of(node: Node) -> int:
    return len(node.meta["val"].shape)


def norm_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Counts dims from the front; None or empty means all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] if rank else []


def spread(value: Any, n: int) -> list[int]:
    """Repeats a size that is given once for all dims, as a list of ``n``."""
    if isinstance(value, int):
        return [value] * n
    values = list(value)
    return values * n if len(values) == 1 else values


def drawn_by_chance(nodes: Iterable[Node]) -> str:
    """Says which operator is the first to draw by chance, as ``: the operator in its module draws by chance``.

    Else empty.
    """
    for n in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            return f": {place_of(n)} draws by chance"
    return ""
