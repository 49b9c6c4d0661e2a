"""Operators that are alike: of one kind is what computes the same thing on operands of the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

Kind: TypeAlias = tuple[Hashable, ...]


def kind_of(node: Node) -> Kind:
    """What decides what is computed: the operator, its operands but for their values, its other arguments."""
    places = {operand: i for i, operand in enumerate(node.all_input_nodes)}
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (node.target, str(spec), *(_leaf(leaf, places) for leaf in leaves))


def _leaf(leaf: object, places: Mapping[Node, int]) -> Hashable:
    if not isinstance(leaf, Node):
        return type(leaf), _key(leaf)
    value = leaf.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return places[leaf], leaf
    shape = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device)
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
