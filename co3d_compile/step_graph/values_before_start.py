"""What a step graph computes before the first frame: constants, for no frame has come yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from co3d_compile.ir.graph_walks import in_order, run_operator
from co3d_compile.ir.markers import carry, counter, fifo, previous, store
from co3d_compile.ir.node_reading import operand, operands, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.stored_constants import get_constant


class ValuesBeforeStart:
    """Values of nodes ``t`` steps before the first one, computed when asked for.

    A tensor with a negative delay has entries before the first frame: the padding in front of it, and what layers make
    of that. They are what its states must hold when a stream begins.

    Args:
        module: Holds the constants.
        counters: The nodes that count, with their values ``t`` steps before the first one.
    """

    def __init__(self, module: nn.Module, counters: dict[Node, Callable[[int], int]]) -> None:
        self.module = module
        self.counters = counters
        self.same: dict[Node, Node] = {}
        self._known: dict[tuple[Node, int], Any] = {}

    def value(self, node: Node, t: int) -> Tensor:
        """Computes the value of a node."""
        for at in in_order([(node, t)], lambda at: [] if at in self._known else self._operands(*at)):
            if at not in self._known:
                self._known[at] = self._compute(*at)
        result: Tensor = self._known[node, t]
        return result

    def _operands(self, node: Node, t: int) -> list[tuple[Node, int]]:
        if node in self.same:
            return [(self.same[node], t)]
        if node in self.counters or node.op != "call_function" or node.target in (carry, counter):
            return []
        if node.target is previous:
            return [(operand(node), t + 1)]
        if node.target is fifo:
            return [(operand(node), t + back) for back in range(self._steps(node) + 1)]
        return [(n, t) for n in node.all_input_nodes]

    def _steps(self, node: Node) -> int:
        """Counts the steps that a queue reaches back."""
        return -(-whole(node, 1) // shape_of(operand(node))[1])

    def _compute(self, node: Node, t: int) -> Any:
        if node in self.same:
            return self._known[self.same[node], t]
        if node in self.counters:
            return torch.full(tuple(node.meta["val"].shape), self.counters[node](t))
        if node.target is counter:  # of entries: what it stores is itself and those of a step
            added = next(operand(user, 1) for user in node.users if user.target is store)
            return torch.full(tuple(node.meta["val"].shape), -t * whole(added, 1))
        if node.op == "get_attr":
            return get_constant(self.module, str(node.target))
        if node.op == "placeholder" or node.target is carry:
            number = Arguments(node).number("initial") if node.target is carry else 0
            return torch.full(tuple(node.meta["val"].shape), number, dtype=node.meta["val"].dtype)
        if node.target is previous:
            return self._known[operand(node), t + 1]
        if node.target is fifo:
            rows = [self._known[operand(node), t + back] for back in range(self._steps(node), -1, -1)]
            return torch.cat(rows, 1)[:, -int(node.meta["val"].shape[1]) :]
        return run_operator(node, {n: self._known[n, t] for n in operands(node)})
