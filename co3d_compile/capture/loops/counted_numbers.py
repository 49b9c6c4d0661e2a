"""Numbers that a loop over frames counts in Python, as entries of a tensor that counts frames.

``mean = mean + (x[:, t] - mean) / (t + 1)`` is captured with another number in each turn, so that no turn is like the
one before. With the entries of one tensor in their place, each turn reads the next one, as it reads the next frame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import erase_dead, insert
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten
ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
FEWEST = 3  # numbers that count
MOST = 8  # numbers in each turn that are written alike
SAME = 1e-9


class CountedNumbers:
    """The numbers that count in a graph, each replaced by an entry of a tensor until it is known what loops there are.

    Args:
        program: As captured, without loops.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._first = next((n for n in program.graph.nodes if n.op == "call_function"), None)
        self._frames = [(n, i.time_dim) for n, i in zip(program.placeholders(), program.inputs, strict=True)]
        self._written: dict[Node, tuple[Node, tuple[object, ...], object]] = {}
        alike: dict[tuple[object, ...], list[Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if _has_number(node):
                alike[node.target, shape_of(node), node.meta["val"].dtype].append(node)
        for nodes in alike.values():
            self._replace(nodes)

    def restore(self) -> None:
        """Puts the numbers back where no loop has taken the entries."""
        for entry, (node, args, target) in self._written.items():
            if entry in node.all_input_nodes and entry.users:
                node.target, node.args = target, args  # type: ignore[assignment]
        erase_dead(self.program.graph)

    def _replace(self, nodes: Sequence[Node]) -> None:
        """Replaces the numbers of operators that are alike, if they count from each turn to the next."""
        for period in range(1, MOST + 1):
            series = [nodes[i::period] for i in range(period)]
            steps = [_step([float(n.args[1]) for n in part]) for part in series]  # type: ignore[arg-type]
            if len(series[-1]) < FEWEST:
                return
            if all(step is not None for step in steps) and any(steps):
                for part, step in zip(series, steps, strict=True):
                    if step:
                        self._count(part, step)
                return

    def _count(self, nodes: Sequence[Node], step: float) -> None:
        timed = next(((n, dim) for n, dim in self._frames if dim), None)
        if timed is None or self._first is None or len(nodes) > shape_of(timed[0])[timed[1]]:
            return
        counter = self._counter(*timed, float(nodes[0].args[1]), step, nodes[0])  # type: ignore[arg-type]
        for k, node in enumerate(nodes):
            entry = insert(self.program, node, aten.select.int, counter, 1, k)
            self._written[entry] = node, node.args, node.target
            node.args = (node.args[0], entry)

    def _counter(self, frames: Node, dim: int, first: float, step: float, like: Node) -> Node:
        """Makes a tensor (N, T, 1, …) that counts frames, in front of all operators."""
        assert self._first is not None
        x = frames
        for d in reversed(range(1, rank_of(frames))):
            if d != dim:
                x = insert(self.program, self._first, aten.select.int, x, d, 0)
        dtype, end = like.meta["val"].dtype, first + step * (shape_of(frames)[dim] - 0.5)
        line = insert(self.program, self._first, aten.arange.start_step, first, end, step, dtype=dtype)
        known = insert(self.program, self._first, aten.eq.Tensor, x, x)
        counter = insert(self.program, self._first, aten.where.self, known, line, line)  # beside each frame
        for _ in range(rank_of(like) - 1):
            counter = insert(self.program, self._first, aten.unsqueeze.default, counter, 2)
        return counter


def counts_turns(node: Node) -> bool:
    """Says whether a tensor only counts the turns of a loop: what walks along it alone is no loop over frames."""
    while node.target is aten.unsqueeze.default:
        node = operand(node)
    return node.target is aten.where.self and node.args[1] is node.args[2]


def _has_number(node: Node) -> bool:
    """Says whether it adds, multiplies or divides by a number that may count, for each clip."""
    if node.target not in ARITHMETIC or len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Node):
        return False
    number, value = node.args[1], node.meta["val"]
    plain = isinstance(number, (int, float)) and not isinstance(number, bool)
    return plain and value.is_floating_point() and value.dim() > 0


def _step(numbers: Sequence[float]) -> float | None:
    """Measures by how much each number is larger than the one before; None where that differs."""
    if len(numbers) < FEWEST:
        return 0.0 if len(set(numbers)) == 1 else None
    step = (numbers[-1] - numbers[0]) / (len(numbers) - 1)
    even = all(abs(n - numbers[0] - i * step) <= SAME * max(1.0, abs(numbers[-1])) for i, n in enumerate(numbers))
    return step if even else None
