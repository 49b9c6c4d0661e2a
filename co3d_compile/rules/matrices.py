"""Operators on matrices: over the last two dims. Where time is among them they are a window."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from co3d_compile.ir.node_reading import operand
from co3d_compile.rules.base import Rule, register

aten = torch.ops.aten


@register(
    aten.tril.default,
)
class Matrices(Rule):
    """Operators that make a matrix of each matrix."""

    why = "cuts a matrix whose rows or columns are entries"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        return [(operand(node), [-2, -1])]
