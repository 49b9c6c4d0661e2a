"""Walks along a graph, backwards or in any other direction, and runs its operators."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.fx import Node, map_arg

from co3d_compile.ir.node_reading import operands

T = TypeVar("T", bound=Hashable)


def reached(starts: Iterable[T], onward: Callable[[T], Iterable[T]]) -> dict[T, None]:
    """Walks a graph depth first; returns what it comes to, the starts included, each once and in that order.

    Args:
        starts: Where it begins.
        onward: What it finds behind a node.
    """
    found: dict[T, None] = {}
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack += onward(node)
    return found


def computed_from(*nodes: Node) -> dict[Node, None]:
    """Finds all nodes that some depend on, these included."""
    return reached(nodes, operands)


def in_order(ends: Iterable[T], needs: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """Yields nodes and what they need, each once and behind all that it needs.

    Args:
        ends: The nodes.
        needs: What must come before a node. It is asked when the node is to come, so it may leave out what is known.
    """
    done: set[T] = set()
    stack = list(ends)[::-1]
    while stack:
        missing = [n for n in needs(stack[-1]) if n not in done] if stack[-1] not in done else []
        if missing:
            stack += missing
            continue
        node = stack.pop()
        if node not in done:
            done.add(node)
            yield node


def run_operator(node: Node, values: Mapping[Node, Any]) -> Any:
    """Runs one operator on values of its operands."""
    assert callable(node.target)
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)
