"""The arguments of an operator in a graph, by their names, with their types and defaults."""

from __future__ import annotations

import inspect
from functools import cache

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Argument, Target

from co3d_compile.ir.node_reading import norm_dims, rank_of, spread

aten = torch.ops.aten


@cache
def _parameters(target: Target) -> dict[str, Argument]:
    """Lists the parameters of an operator by name, in their order, with their defaults; None where there is none."""
    if isinstance(target, OpOverload):
        return {a.name: a.default_value for a in target._schema.arguments}
    assert callable(target), target
    parameters = inspect.signature(target).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


class Arguments:
    """The arguments of a node: those in the graph, and the operator's own defaults for the others.

    For a ``conv3d`` of a step graph, ``Arguments(node).integers("padding")`` is ``[0, 1, 1]``.
    """

    def __init__(self, node: Node) -> None:
        self._node, parameters = node, _parameters(node.target)
        self._values = {**parameters, **dict(zip(parameters, node.args, strict=False)), **node.kwargs}

    def given(self, name: str) -> Argument:
        """Reads an argument as it is; None where the operator has none of this name."""
        return self._values.get(name)

    def all(self) -> dict[str, Argument]:
        """All arguments by name, in the order in which the operator takes them."""
        return dict(self._values)

    def optional(self, name: str) -> Node | None:
        """Reads a tensor, or None."""
        value = self.given(name)
        assert value is None or isinstance(value, Node), f"{name} is no tensor"
        return value

    def tensor(self, name: str = "self") -> Node:
        """Reads a tensor."""
        value = self.optional(name)
        assert value is not None, f"{name} is missing"
        return value

    def tensors(self, name: str) -> list[Node]:
        """Reads a list of tensors."""
        values = self.given(name)
        assert isinstance(values, (list, tuple)), f"{name} is no list"
        return [value for value in values if isinstance(value, Node)]

    def number(self, name: str) -> float:
        """Reads a number: an int is not made a float."""
        value = self.given(name)
        assert isinstance(value, (int, float)), f"{name} is no number"
        return value

    def plain(self, name: str) -> float | str:
        """Reads a number or a word."""
        value = self.given(name)
        return value if isinstance(value, str) else self.number(name)

    def integer(self, name: str) -> int:
        """Reads a whole number, or a flag as 0 or 1."""
        return int(self.number(name))

    def integers(self, name: str, count: int = 1) -> list[int]:
        """Reads whole numbers; one that is given alone stands for ``count`` of them."""
        value = self.given(name)
        assert isinstance(value, (int, list, tuple)), f"{name} is no list of whole numbers"
        return spread(value, count)

    def dims(self, of: Node, name: str = "dim") -> list[int]:
        """Reads the dims of a tensor, counted from the front; all of them where none is given."""
        value = self.given(name)
        return norm_dims(None if value is None else self.integers(name), rank_of(of))

    def dim(self, of: Node, name: str = "dim") -> int:
        """Reads one dim of a tensor, counted from the front."""
        return self.integer(name) % max(rank_of(of), 1)

    def changed(self, **values: Argument) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
        """Replaces some arguments of the node's call; gives all of them by position and by name."""
        names = list(_parameters(self._node.target))[: len(self._node.args)]
        args = tuple(values.pop(name, old) for name, old in zip(names, self._node.args, strict=True))
        return args, {**self._node.kwargs, **values}


def filling_like(node: Node) -> float | None:
    """Finds the number that fills a tensor which takes its shape from another one; None where that is not known."""
    value = Arguments(node).given("fill_value") if node.target is aten.full_like.default else None
    return value if isinstance(value, (int, float)) else None


def filled(node: Node) -> Tensor | None:
    """Makes the tensor of an operator that takes a shape and a number alone; None where it takes more."""
    number, value = filling_like(node), node.meta["val"]
    return None if number is None else torch.full(tuple(value.shape), number, dtype=value.dtype)


def order_of(node: Node) -> list[int] | None:
    """Reads the order in which a node puts the dims of its operand, ``[0, 2, 1]`` where it swaps the last two.

    None: it puts them in no other order.
    """
    if node.target is aten.permute.default:
        return Arguments(node).dims(node, "dims")
    if node.target is aten.transpose.int:
        order = list(range(rank_of(node)))
        a, b = (Arguments(node).dim(node, name) for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
        return order
    return None
