"""Between which numbers integers are whatever the inputs of a graph are: what is written at them reaches no farther."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.analysis.operator_families import MOVES, name_of
from co3d_compile.analysis.structural_values import Structure
from co3d_compile.ir.graph_walks import run_operator

Bounds = tuple[Tensor, Tensor]
MONOTONE = frozenset(
    [
        "add",
        "sub",
        "rsub",
        "mul",
        "bitwise_left_shift",
        "bitwise_right_shift",
        "__lshift__",
        "__rshift__",
        "clamp",
        "clamp_min",
        "clamp_max",
        "minimum",
        "maximum",
        "neg",
        "div",
        "_to_copy",
        "to",
    ]
)
"""Largest and smallest where each operand is largest or smallest."""
KNOWN = (torch.uint8, torch.int8, torch.int16, torch.bool)
"""Kinds of integers whose range alone says something."""


class IntegerBounds:
    """The bounds of the integers in a graph.

    Args:
        structure: What else is known of its numbers.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._known: dict[Node, Bounds | None] = {}

    def of(self, node: Node) -> Bounds | None:
        """Bounds each number of a tensor; None where nothing is known, or they are no integers."""
        if node not in self._known:
            self._known[node] = self._found(node)
        return self._known[node]

    def _found(self, node: Node) -> Bounds | None:
        if node in self.structure.static:
            value = self.structure.static[node]
            return None if value.is_floating_point() else (value.long(), value.long())
        dtype = self.structure.dtypes.get(node)
        if dtype is None or dtype.is_floating_point:
            return None
        found = self._by_operands(node) if node.op == "call_function" else None
        if found is None and dtype in KNOWN:
            info = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            shape = self.structure.shape(node)
            found = tuple(torch.full(shape, value, dtype=torch.int64) for value in info)  # type: ignore[assignment]
        return found

    def _by_operands(self, node: Node) -> Bounds | None:
        name = name_of(node)
        operands = node.all_input_nodes
        bounds = {n: self.of(n) for n in operands}
        if not operands or any(b is None for b in bounds.values()):
            return None
        if name in MOVES:
            low, high = (_call(node, {n: b[end] for n, b in bounds.items() if b is not None}) for end in (0, 1))
            return (low, high) if isinstance(low, Tensor) else None
        if name in MONOTONE and _whole_numbers(node):
            ends = [b for b in bounds.values() if b is not None]
            corners = [_call(node, dict(zip(bounds, chosen, strict=True))) for chosen in product(*ends)]
            low, high = corners[0], corners[0]
            for corner in corners[1:]:
                low, high = torch.minimum(low, corner), torch.maximum(high, corner)
            info = torch.iinfo(self.structure.dtypes[node])
            wraps = bool((low < info.min).any()) or bool((high > info.max).any())
            return None if wraps else (low, high)
        return None


def _whole_numbers(node: Node) -> bool:
    """Says whether its numbers are whole, and a divisor is one number above zero."""
    if name_of(node) == "div":
        by = node.args[1]
        return isinstance(by, int) and by > 0
    return all(isinstance(a, int) for a in node.args if isinstance(a, (int, float)))


def _call(node: Node, values: dict[Node, Tensor]) -> Any:
    if name_of(node) in ("_to_copy", "to"):
        return next(iter(values.values()))
    return run_operator(node, values)
