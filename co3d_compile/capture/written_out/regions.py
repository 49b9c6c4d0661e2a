"""Regions of a captured graph that compute something of one tensor, and what they compute of numbers given to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from co3d_compile.ir.aten_operators import SAME
from co3d_compile.ir.graph_edits import replace
from co3d_compile.ir.graph_walks import run_operator
from co3d_compile.ir.node_reading import drawn_by_chance, operand, operands
from co3d_compile.ir.operator_arguments import filled
from co3d_compile.ir.program import Program
from co3d_compile.rules import is_pointwise

MOST = 16  # operators; an activation or a norm written out has fewer


class Constants:
    """The values of the nodes of a graph that depend on no input. Each is computed once, when it is asked for.

    Args:
        program: Has the graph.
        wide: Whether floats are computed in float64.
        shapes: Whether the shape of an input is no part of it: ``ones_like(x)`` is a constant then.
    """

    def __init__(self, program: Program, wide: bool = True, shapes: bool = False) -> None:
        self.program, self.wide, self.shapes = program, wide, shapes
        self._values: dict[Node, Tensor | None] = {}

    def value(self, node: Node) -> Tensor | None:
        """Finds the value of a constant; None for what depends on an input, or is drawn by chance."""
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: Node) -> Tensor | None:
        if node.op == "get_attr":
            value = self.program.constant(node)
            return widened(value) if self.wide else value
        if node.op != "call_function" or drawn_by_chance([node]):
            return None
        if self.shapes and (made := filled(node)) is not None:
            return widened(made) if self.wide else made
        values = {n: self.value(n) for n in operands(node)}
        if any(v is None for v in values.values()):
            return None
        result = run_in_float64(node, values) if self.wide else run_operator(node, values)
        return result if isinstance(result, Tensor) else None


def widened(value: Tensor) -> Tensor:
    """Casts a tensor to float64, if its numbers are floats."""
    return value.double() if value.is_floating_point() else value


def run_in_float64(node: Node, values: dict[Node, Tensor | None]) -> Tensor:
    """Runs one operator on values in float64."""
    assert callable(node.target)
    args = [map_arg(a, values.__getitem__) for a in node.args]
    kwargs = {name: map_arg(a, values.__getitem__) for name, a in node.kwargs.items()}
    dtype = kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        kwargs["dtype"] = torch.float64
    result: Tensor = node.target(*args, **kwargs)
    return widened(result) if isinstance(result, Tensor) else result


def without_effect(node: Node) -> Node:
    """Passes over what does nothing in inference, and is read by nobody else."""
    while node.target in SAME and len(node.users) == 1:
        node = operand(node)
    return node


@dataclass(frozen=True)
class Region:
    """What is computed of one tensor.

    Attributes:
        source: The tensor.
        result: The node whose value the region computes.
        nodes: The operators, in the order of the graph; no other operator reads those before the result.
        constants: The constants that they read.
    """

    source: Node
    result: Node
    nodes: tuple[Node, ...]
    constants: Constants

    @cached_property
    def values(self) -> dict[Node, Tensor]:
        """The value of each constant that the region reads."""
        read = {n for node in self.nodes for n in operands(node) if n not in self.nodes and n is not self.source}
        return {n: v for n in read if (v := self.constants.value(n)) is not None}

    def numbers(self) -> set[float]:
        """Lists all single numbers that stand in the region."""
        written = {float(a) for node in self.nodes for a in node.args if isinstance(a, (int, float))}
        return written | {float(v) for v in self.values.values() if v.numel() == 1}

    def run(self, x: Tensor) -> Tensor:
        """Computes the region of a tensor, in float64."""
        values: dict[Node, Tensor | None] = {**self.values, self.source: x}
        for node in self.nodes:
            values[node] = run_in_float64(node, values)
        result = values[self.result]
        assert result is not None
        return result


def regions(
    result: Node, order: dict[Node, int], constants: Constants, may: Callable[[Node], bool]
) -> Iterator[Region]:
    """Yields the regions that end in a node and start from one tensor, the smallest first.

    Args:
        result: The last node.
        order: The place of each node in the graph.
        constants: The constants of the graph.
        may: Whether an operator may be part of a region.
    """
    inside = {result}
    while len(inside) <= MOST:
        outside = {n for node in inside for n in operands(node) if n not in inside and constants.value(n) is None}
        if not outside:
            return
        if len(outside) == 1:
            yield Region(next(iter(outside)), result, tuple(sorted(inside, key=order.__getitem__)), constants)
        latest = max(outside, key=order.__getitem__)
        if not may(latest) or any(user not in inside for user in latest.users):
            return
        inside.add(latest)


def computes_floats(node: Node) -> bool:
    """Says whether an operator computes each number of a tensor of floats by itself."""
    return node.op == "call_function" and is_pointwise(node.target) and node.meta["val"].is_floating_point()


def join_regions(
    program: Program, ends: Callable[[Node], bool], may: Callable[[Node], bool], joined: Callable[[Region], Node | None]
) -> None:
    """Replaces what regions compute: each by what is made of it, the smallest of those that end in a node first.

    Args:
        program: Has the graph.
        ends: Whether a region may end in a node.
        may: Whether an operator may be part of a region.
        joined: Writes what takes the place of a region's result; None where the region stays as it is.
    """
    constants = Constants(program)
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for node in list(program.graph.nodes):
        for region in regions(node, order, constants, may) if ends(node) else ():
            new = joined(region)
            if new is not None:
                replace(node, new)
                order.update({n: i for i, n in enumerate(program.graph.nodes)})
                break
