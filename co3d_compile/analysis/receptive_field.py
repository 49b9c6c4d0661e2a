"""What an entry of the step graph depends on: how many steps back, and which frames of the first input.

Read off the graph that ``lower`` wrote, so the numbers are as tight as what is executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch.fx import Graph, Node

from co3d_compile.ir.aten_operators import ConvArgs, PoolArgs, is_pointwise, selected, sliced
from co3d_compile.ir.markers import carry, counter, expand_batch, fifo, previous, settled
from co3d_compile.ir.node_reading import operand, operand_list, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments

aten = torch.ops.aten
POOLED = {aten.avg_pool1d.default, aten.max_pool1d.default}
CONVOLVED = {aten.conv1d.default, aten.conv_transpose1d.default, *POOLED}


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
        """Moves the dependence to the value that was there so many steps ago."""
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


@dataclass(frozen=True)
class Places:
    """The dependence of each place along a dim of a tensor, such as the entries of a step."""

    dim: int
    each: list[Dependence]


def union(parts: Iterable[Dependence]) -> Dependence:
    """Joins what depends on all of these."""
    parts = list(dict.fromkeys(parts))
    steps = max((p.steps for p in parts), default=0)
    parts = [p for p in parts if not p.empty]
    if not parts:
        return Dependence(steps)
    lows = [p.low for p in parts]
    low = None if any(v is None for v in lows) else min(v for v in lows if v is not None)
    return Dependence(steps, low, max(p.high for p in parts))


def dependences(graph: Graph, first: Node, frames: int = 1, time_dim: int = 0) -> dict[Node, Dependence]:
    """Finds what every node of a lowered graph depends on.

    Args:
        graph: As ``lower`` wrote it.
        first: The input whose frames are counted.
        frames: Its new frames per step.
        time_dim: Its time dim, present if there is more than one frame.
    """
    found: dict[Node, Dependence] = {}
    places: dict[Node, Places] = {}
    for node in graph.nodes:
        result = union(found[n] for n in node.all_input_nodes)
        if node is first and frames > 1:
            places[node] = Places(time_dim, [Dependence(0, i, i) for i in range(frames)])
        elif node is first:
            result = Dependence(0, 0, 0)
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
            places[node] = _queue(node, found, places, frames)
        elif node.target is aten.cat.default:
            places[node] = _joined(node, found, places)
        elif node.target in CONVOLVED and (operand(node) in places or shape_of(operand(node))[2:3] == (1,)):
            places |= _convolved(node, found, places)
        elif is_pointwise(node.target) and any(n in places for n in node.all_input_nodes):
            places |= _by_itself(node, found, places)
        elif node.args and isinstance(node.args[0], Node) and node.args[0] in places:
            moved = _moved(node, places[node.args[0]])
            if isinstance(moved, Places):
                places[node] = moved
            result = moved if isinstance(moved, Dependence) else result
        if node in places:
            result = union(places[node].each)
        found[node] = result
    return found


def _carried(node: Node, found: dict[Node, Dependence], frames: int) -> Dependence:
    """Finds what a state depends on that is handed on from turn to turn.

    Of all turns, or of the last that it remembers.
    """
    given = Arguments(node)
    if given.given("of_ends"):
        return Dependence()
    if given.given("memory") is None:
        return Dependence(0, None, 0)
    reads = node.args[0]
    assert isinstance(reads, (list, tuple))
    turns = [union(found[n] for n in turn) for turn in reads]  # type: ignore[union-attr, index]
    backs = range(1, given.integer("memory") + 1)
    return union(turns[-1 - (back - 1) % len(turns)].earlier(-(-back // len(turns)), frames) for back in backs)


def _queue(node: Node, found: dict[Node, Dependence], places: dict[Node, Places], frames: int) -> Places:
    """Finds the dependence of each row of a queue, oldest first."""
    rows = operand(node)
    own = places.get(rows)
    new = own.each if own is not None and own.dim == 1 else [found[rows]] * shape_of(rows)[1]
    backs = range(whole(node, 1), 0, -1)
    return Places(1, [new[-1 - (back - 1) % len(new)].earlier(-(-back // len(new)), frames) for back in backs] + new)


def _joined(node: Node, found: dict[Node, Dependence], places: dict[Node, Places]) -> Places:
    """Finds the dependence of each place of a ``cat``."""
    dim = Arguments(node).dim(node)
    parts = [
        places[x].each if x in places and places[x].dim == dim else [found[x]] * shape_of(x)[dim]
        for x in operand_list(node)
    ]
    return Places(dim, [each for part in parts for each in part])


def _by_itself(node: Node, found: dict[Node, Dependence], places: dict[Node, Places]) -> dict[Node, Places]:
    """Finds the dependence of each place of a pointwise operator, under its node; nothing for others."""
    shape = shape_of(node)
    dims = {places[n].dim for n in node.all_input_nodes if n in places and shape_of(n) == shape}
    if len(dims) != 1:
        return {}
    (dim,) = dims
    whole_shape = [n for n in node.all_input_nodes if n in places and shape_of(n) == shape]
    rest = [found[n] for n in node.all_input_nodes if n not in whole_shape]
    each = zip(*(places[n].each for n in whole_shape), strict=True)
    return {node: Places(dim, [union([*place, *rest]) for place in each])}


def _moved(node: Node, places: Places) -> Places | Dependence | None:
    """Finds the dependence of what is read from a tensor: of each of its places, or of the one that is selected.

    None where places no longer lie side by side in a dim.
    """
    x, dim, each = operand(node), places.dim, places.each
    if node.target is aten.slice.Tensor:
        _, cut, *bounds = sliced(node)
        return Places(dim, each[slice(*bounds)]) if cut == dim else places
    if node.target is aten.select.int:
        _, cut, index = selected(node)
        return each[index] if cut == dim else Places(dim - (cut < dim), each)
    if node.target is aten.permute.default:
        return Places(Arguments(node).dims(x, "dims").index(dim), each)
    if node.target is not aten.reshape.default:
        return None
    before, count, shape = prod(shape_of(x)[:dim]), len(each), shape_of(node)
    at = [d for d, size in enumerate(shape) if size == count and prod(shape[:d]) == before]
    return Places(at[0], each) if at else None


def _convolved(node: Node, found: dict[Node, Dependence], places: dict[Node, Places]) -> dict[Node, Places]:
    """Finds the dependence of each place of a convolution or pool over time, transposed or not; nothing for others."""
    x, conv = operand(node), PoolArgs.of(node) if node.target in POOLED else ConvArgs.of(node)
    over = places.get(x, Places(2, [found[x]]))
    if over.dim != 2:
        return {}
    (k,), (s,), (d,), (p,) = conv.kernel, conv.stride, conv.dilation, conv.padding
    back = node.target is not aten.conv_transpose1d.default
    read: list[list[Dependence]] = [[] for _ in range(shape_of(node)[2])]
    for i, each in enumerate(over.each):
        for j in range(k):
            o, rest = divmod(i - j * d + p, s) if back else (i * s + j * d - p, 0)
            if not rest and 0 <= o < len(read):
                read[o].append(each)
    return {node: Places(2, [union(each) for each in read])}
