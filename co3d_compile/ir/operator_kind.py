"""Operators that are alike: of one kind is what computes the same thing on operands of the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

Kind: TypeAlias = tuple[Hashable, ...]


def kind_of(node: Node) -> Kind:
    """What decides what is computed: the operator, its operands but for their values, its other arguments.

    Where in memory an operand begins counts for what is given such a place (``as_strided``) alone. Else each turn of a
    loop, which takes frames from another place, would have operators of its own kind.
    """
    placed = reads_memory(node.target)
    places = {operand: i for i, operand in enumerate(node.all_input_nodes)}
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (node.target, str(spec), *(_leaf(leaf, places, placed) for leaf in leaves))


def reads_memory(target: object) -> bool:
    """Says whether an operator counts places from where the memory of its operand begins."""
    return isinstance(target, OpOverload) and any(a.name == "storage_offset" for a in target._schema.arguments)


def _leaf(leaf: object, places: Mapping[Node, int], placed: bool) -> Hashable:
    if not isinstance(leaf, Node):
        return type(leaf), _key(leaf)
    value = leaf.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return places[leaf], leaf
    begin = value.storage_offset() if placed else None
    shape = (tuple(value.shape), value.stride(), begin, value.dtype, value.device)
    return places[leaf], shape, isinstance(value, nn.Parameter)


def _key(value: object) -> Hashable:
    """Makes of a value one to compare by.

    Of what cannot be hashed, such as a size that is not known yet, the object itself.
    """
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value if isinstance(value, Hashable) else id(value)
