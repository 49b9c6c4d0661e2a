"""Determinants of matrices, over the last two dims. Where time is among them they are a window."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node

from co3d_compile.ir.layout import Layout
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.time_facts import known
from co3d_compile.rules.base import Rule, register
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


@register(aten._linalg_det.default, aten._linalg_slogdet.default)
class Determinants(Rule):
    """One number of each matrix: its determinant, or the sign of that and the logarithm of the rest."""

    why = "computes with a matrix whose rows or columns are entries"

    def mixes(self, node: Node) -> Iterable[tuple[Node, Iterable[int]]]:
        return [(operand(node), [-2, -1])]

    def layout(self, node: Node) -> Layout:
        return Layout(known(operand(node)).dims[:-2])

    def layouts(self, node: Node) -> list[Layout]:
        return [self.layout(node)] * len(node.meta["val"])

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        x, read = operand(node), {user.args[1] for user in node.users}
        entries = [low.call(node.target, low.entry(x, i)) for i in range(low.pulse(x))]
        return [
            [low.call(operator.getitem, entry, k) for entry in entries] if k in read else []
            for k in range(len(node.meta["val"]))
        ]
