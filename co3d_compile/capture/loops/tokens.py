"""Where a captured graph repeats itself: a token for each operator, and runs of tokens that come again."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.fx.node import map_aggregate

from co3d_compile.ir.aten_operators import SAME, SIZED, sliced
from co3d_compile.ir.constant_facts import fill_of
from co3d_compile.ir.node_reading import norm_dims, operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.rules import is_pointwise

aten = torch.ops.aten
SHAPED = {*SIZED, *SAME}
SMALL = 64  # numbers: two constants with so many at most are the same if their numbers are
PERIODS = 24  # looked at for each length of a phrase
IN_PLACE_OF_A_TENSOR = "tensor"
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Take:
    """Entries that are taken out of a tensor along one dim; ``length`` None: a single one, without that dim."""

    root: Node
    dim: int
    start: int
    length: int | None


def taken(node: Node) -> Take | None:
    """What a selection, a slice without steps, or an item of a split takes."""
    if node.target is aten.select.int:
        x, given = operand(node), Arguments(node)
        dim = given.dim(x)
        return Take(uncut(x), dim, given.integer("index") % shape_of(x)[dim], None)
    if node.target is aten.slice.Tensor:
        x, dim, start, end, step = sliced(node)
        return Take(uncut(x), dim, start, end - start) if step == 1 and end - start < shape_of(x)[dim] else None
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return _item(operand(node), node.args[1])
    return None


def filling_of(node: Node, program: Program) -> float | None:
    """The one number that a constant is all over, as far as that is seen."""
    if node.target in SHAPED:
        return filling_of(operand(node), program)
    if node.target is aten.full.default:
        value = Arguments(node).given("fill_value")
        return float(value) if isinstance(value, (int, float)) else None
    if node.op == "get_attr":
        value = program.constant(node)
        return fill_of(value) if str(node.target) not in program.learned else None
    return None


def frame_of(node: Node) -> Take | None:
    """What a node takes; a slice of one entry that then loses its dim (``squeeze``) is a selection."""
    if node.target not in (aten.squeeze.dim, aten.squeeze.dims):
        return taken(node)
    x = operand(node)
    take, dims = taken(x), norm_dims(node.args[1], rank_of(x))
    return replace(take, length=None) if take is not None and take.length == 1 and dims == [take.dim] else None


def _item(split: Node, index: int) -> Take | None:
    """What an item of ``split`` takes."""
    if split.target is not aten.split_with_sizes.default:
        return None
    x = operand(split)
    dim = Arguments(split).dim(x)
    sizes = [int(part.shape[dim]) for part in split.meta["val"]]
    return Take(uncut(x), dim, sum(sizes[:index]), sizes[index])


def uncut(node: Node) -> Node:
    """Finds the tensor behind slices that leave nothing out."""
    while node.target is aten.slice.Tensor and shape_of(node) == shape_of(operand(node)):
        node = operand(node)
    return node


def alike(start: Node, value: Node) -> bool:
    """Says whether two nodes have numbers of one kind, and the shape of the first broadcasts to that of the second."""
    a, b = start.meta["val"], value.meta["val"]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype:
        return False
    return a.dim() == b.dim() and all(x in (1, y) for x, y in zip(a.shape, b.shape, strict=True))


def leaves(node: Node) -> list[Node]:
    """Lists the operands of a node, each as often and in the order in which it is read."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def flat(nest: Any) -> list[Any]:
    """Flattens a nest of lists, tuples and dicts, in its order: FX is many times faster at it than pytree."""
    found: list[Any] = []
    map_aggregate(nest, found.append)
    return found


class Tokens:
    """The operators of a graph, and for each a number: equal ones do the same to whatever they are given.

    Where a selection or a slice begins is left out of it, and so are operands that are no constants.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.takes = {n: take for n in self.nodes if (take := taken(n)) is not None}
        self.frames = {n: take for n in self.nodes if (take := frame_of(n)) is not None}
        self._constants: dict[Node, Hashable] = {}
        known: dict[Hashable, int] = {}
        self.ids = np.array([known.setdefault(self._token(n), len(known)) for n in self.nodes], dtype=np.int64)

    def constant(self, node: Node) -> Hashable:
        """What stands for a node outside of a loop: constants with the same numbers are the same."""
        if is_constant(node):
            args = node.args[1:] if node.target is aten.full.default else node.args  # a number broadcasts
            return (node.target, str(args), str(node.kwargs))
        if node.op != "get_attr":
            return node
        if node not in self._constants:
            value = self.program.constant(node)
            if value.numel() <= SMALL and str(node.target) not in self.program.learned:
                self._constants[node] = (tuple(value.shape), value.dtype, tuple(value.flatten().tolist()))
            else:
                self._constants[node] = str(node.target)
        return self._constants[node]

    def _token(self, node: Node) -> Hashable:
        values = flat((node.args, node.kwargs))
        take = self.takes.get(node)
        if take is not None:
            values = [node.args[0], take.dim]
        # A constant may be what the first copy reads in place of an earlier one's value.
        parts = [IN_PLACE_OF_A_TENSOR if self._is_start(node, v) else self._leaf(v) for v in values]
        shapes = [(tuple(v.shape), v.dtype) for v in flat(node.meta["val"]) if isinstance(v, Tensor)]
        return (node.target, *parts, *shapes)

    def _is_start(self, node: Node, value: Any) -> bool:
        return isinstance(value, Node) and is_pointwise(node.target) and alike(value, node)

    def _leaf(self, value: Any) -> Hashable:
        if isinstance(value, Node):
            return self.constant(value) if value.op == "get_attr" else IN_PLACE_OF_A_TENSOR
        return (type(value), str(value))


def is_constant(node: Node) -> bool:
    """Says whether an operator reads nothing and gives the same numbers each time that it runs, such as zeros."""
    made = node.op == "call_function" and not node.all_input_nodes and isinstance(node.target, torch._ops.OpOverload)
    return made and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]


@dataclass(frozen=True)
class Run:
    """Tokens from ``start`` to ``stop`` that come again after ``period`` others."""

    period: int
    start: int
    stop: int


def runs(ids: Numbers, minimum: int) -> list[Run]:
    """Finds the runs in which tokens come ``minimum`` times or more.

    The longest first, of equal ones the least period.
    """
    found: list[Run] = []
    for period in sorted(_periods(ids)):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        spans = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        found += [Run(period, a, b + period) for a, b in spans if b - a >= (minimum - 1) * period]
    return sorted(found, key=lambda run: (run.start - run.stop, run.period))


def _periods(ids: Numbers) -> set[int]:
    """Finds the distances at which phrases of tokens come again, of one token, of two, of four, and so on."""
    periods: set[int] = set()
    length = 1
    while len(ids) > length:
        order = np.argsort(ids, kind="stable")
        gaps = np.diff(order)[ids[order][1:] == ids[order][:-1]]
        values, counts = np.unique(gaps, return_counts=True)
        periods.update(values[np.argsort(-counts, kind="stable")][:PERIODS].tolist())
        if not len(gaps):
            break
        pairs = ids[:-length] * (ids.max() + 1) + ids[length:]
        _, ids = np.unique(pairs, return_inverse=True)
        length *= 2
    return periods
