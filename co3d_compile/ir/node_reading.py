"""Reads a node of an FX graph: operands, arguments, shape, module path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, Target

Operator: TypeAlias = Callable[..., Any]  # of ATen, of a library, or a marker
Args: TypeAlias = tuple[Argument, ...]
Kwargs: TypeAlias = Mapping[str, Argument]


def operator_name(target: Target) -> str:
    """Names an operator as people know it: ``aten.conv3d``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return str(getattr(target, "__name__", target))


def called(target: Target) -> Operator:
    """Reads the operator that a node calls as what can be called."""
    assert callable(target), f"{target} is the name of a weight"
    return target


def schema_of(node: Node) -> torch.FunctionSchema:
    """Reads the names, types and defaults of the arguments of a node's operator."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.name} is no operator of a library"
    return node.target._schema


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
    return operand_list(graph.output_node())


def module_calls(node: Node) -> dict[str, str]:
    """Lists the dotted path of each module that a node came from, by a name for the call, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(call): str(entry[0]).removeprefix("L['self']").removeprefix(".") for call, entry in stack.items()}


def overloads(operator: Target) -> list[Target]:
    """Lists all overloads of an operator packet; an overload or function is itself."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return [getattr(operator, name) for name in operator.overloads()]
    return [operator]


def operands(node: Node) -> list[Node]:
    """Lists the tensor operands, in order, lists flattened."""
    return list(node.all_input_nodes)


def sources(node: Node) -> list[Node]:
    """Lists the operands of which numbers are read: ``full_like`` reads no more than a shape."""
    return [] if node.target is torch.ops.aten.full_like.default else operands(node)


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


def index_of(node: Node) -> list[Node | None]:
    """Reads the index of ``x[...]`` for each dim of ``x``; None where a dim is taken whole."""
    arg = node.args[1]
    assert isinstance(arg, (list, tuple)), f"the index of {node.name} is no list"
    return [i if isinstance(i, Node) else None for i in arg]


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


def whole_list(arg: Argument) -> list[int]:
    """Reads an argument of whole numbers: a list of them, or a single one."""
    numbers = [arg] if isinstance(arg, int) else arg
    assert isinstance(numbers, Sequence), f"{arg} is no list"
    found = [n for n in numbers if isinstance(n, int)]
    assert len(found) == len(numbers), f"{arg} is no list of whole numbers"
    return found


def norm_dims(dims: Argument, rank: int) -> list[int]:
    """Counts dims from the front; None or empty means all."""
    listed = [] if dims is None else whole_list(dims)
    return [d % rank for d in listed or range(rank)] if rank else []


def spread(sizes: Argument, n: int) -> list[int]:
    """Repeats a size that is given once for all dims, as a list of ``n``."""
    listed = whole_list(sizes)
    return listed * n if len(listed) == 1 else listed


def drawn_by_chance(nodes: Iterable[Node]) -> str:
    """Says which operator is the first to draw by chance, as ``: the operator in its module draws by chance``.

    Else empty.
    """
    for n in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            return f": {place_of(n)} draws by chance"
    return ""
