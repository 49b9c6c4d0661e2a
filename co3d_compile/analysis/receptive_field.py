"""What an entry of the step graph depends on: how many steps back, and which frames of the first input.

Read off the graph that ``lower`` wrote, so the numbers are as tight as what is executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from co3d_compile.ir.markers import carry, counter, expand_batch, fifo, previous, settled
from co3d_compile.ir.node_reading import argument, operand, operand_list, whole

aten = torch.ops.aten


@dataclass(frozen=True)
class Dependence:
    """The steps back and the frames of the first input that an entry depends on.

    Frames are counted from the first one of the current step: from -2 to 0 are the newest three. If ``high < low``, it
    depends on none.

    Args:
        steps: From which step on the states' start is forgotten.
        low: The oldest frame; None: all that ever came.
        high: The newest frame.
    """

    steps: int = 0
    low: int | None = 0
    high: int = -(2**40)

    def earlier(self, steps: int, frames: int) -> Dependence:
        """Returns the dependence of the value that was there so many steps ago."""
        low = None if self.low is None else self.low - steps * frames
        return Dependence(self.steps + steps, low, self.high - steps * frames)

    @property
    def empty(self) -> bool:
        return self.low is not None and self.high < self.low

    @property
    def field(self) -> int | None:
        """The receptive field in frames."""
        if self.low is None:
            return None
        return 0 if self.empty else self.high - self.low + 1


def union(parts: Iterable[Dependence]) -> Dependence:
    """Returns what depends on all of these."""
    parts = list(parts)
    steps = max((p.steps for p in parts), default=0)
    parts = [p for p in parts if not p.empty]
    if not parts:
        return Dependence(steps)
    lows = [p.low for p in parts]
    low = None if any(v is None for v in lows) else min(v for v in lows if v is not None)
    return Dependence(steps, low, max(p.high for p in parts))


def dependences(graph: Graph, first: Node, frames: int = 1, time_dim: int = 0) -> dict[Node, Dependence]:
    """Returns the dependence of every node of a lowered graph.

    Args:
        graph: As ``lower`` wrote it.
        first: The input whose frames are counted.
        frames: Its new frames per step.
        time_dim: Its time dim, present if there is more than one frame.
    """
    found: dict[Node, Dependence] = {}
    queues: dict[Node, list[Dependence]] = {}
    for node in graph.nodes:
        result = union(found[n] for n in node.all_input_nodes)
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if node is first:
            result = Dependence(0, 0, frames - 1)
        elif source is first and frames > 1 and node.target is aten.select.int and node.args[1] == time_dim:
            result = Dependence(0, node.args[2], node.args[2])
        elif node.target is counter:  # speaks of the ends alone
            result = Dependence()
        elif node.target is carry:
            result = _carried(node, found, frames)
        elif node.target is expand_batch:  # of the other operand it reads the size alone
            result = found[node.args[0]]
        elif node.target is settled:
            stream = found[operand(node, 1)]
            result = replace(stream, steps=max(stream.steps, whole(node, 2)))
        elif node.target is previous:
            result = result.earlier(1, frames)
        elif node.target is fifo:
            queues[node] = _queue(node, found, frames)
            result = union(queues[node])
        elif source in queues and node.target is aten.select.int:
            result = queues[source][node.args[2]]
        elif source in queues and node.target is aten.slice.Tensor:
            result = union(queues[source][slice(node.args[2], node.args[3], node.args[4] if len(node.args) > 4 else 1)])
        found[node] = result
    return found


def _carried(node: Node, found: dict[Node, Dependence], frames: int) -> Dependence:
    """Returns what a state depends on that is handed on from turn to turn.

    Of all turns, or of the last that it remembers.
    """
    memory = argument(node, 4, "memory")
    if argument(node, 2, "of_ends", False):
        return Dependence()
    if memory is None:
        return Dependence(0, None, 0)
    reads = node.args[0]
    assert isinstance(reads, (list, tuple))
    turns = [union(found[n] for n in turn) for turn in reads]  # type: ignore[union-attr, index]
    backs = range(1, memory + 1)
    return union(turns[-1 - (back - 1) % len(turns)].earlier(-(-back // len(turns)), frames) for back in backs)


def _queue(node: Node, found: dict[Node, Dependence], frames: int) -> list[Dependence]:
    """Returns the dependence of each row of a queue, oldest first."""
    rows = operand(node)
    new = [found[p] for p in (operand_list(rows) if rows.target is aten.cat.default else [rows])]
    backs = range(whole(node, 1), 0, -1)
    return [new[-1 - (back - 1) % len(new)].earlier(-(-back // len(new)), frames) for back in backs] + new
