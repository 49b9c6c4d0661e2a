"""A part of a network for clips of any length, and for any batch, made of captures of it that differ in one of them.

Captures of one network are the same node by node, but for whole numbers: sizes, ends of slices, how far a range counts.
Two lengths say how each of them grows with the clip, and a third capture whether it counts the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_aggregate

from co3d_compile.ir.aten_operators import SIZED
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import operands, operator_name, shape_of, sources
from co3d_compile.ir.stored_constants import get_constant

aten = torch.ops.aten
FULL = aten.full.default


class NotResizable(Exception):
    """The captures do not say what the graph is at another length. The message is the reason."""


@dataclass(frozen=True)
class Size:
    """A length and a batch: entries of the first input that a graph takes, and clips at once."""

    entries: int
    batch: int


@dataclass(frozen=True)
class Captures:
    """One part of a network, captured at two lengths, and for another batch where that is known.

    Args:
        short, long: At the lengths ``sizes[0]`` and ``sizes[1]``, for the same batch.
        wide: At the first length for the batch ``sizes[2]``; None where the network takes one batch alone.
        sizes: Of each of them.
    """

    short: GraphModule
    long: GraphModule
    wide: GraphModule | None
    sizes: tuple[Size, ...]

    def at(self, entries: int, batch: int | None = None) -> GraphModule:
        """Captures the graph at another length.

        Raises:
            NotResizable: A number among its arguments is not whole there, or grows in another way.
        """
        size = Size(entries, self.sizes[0].batch if batch is None else batch)
        graph = Graph()
        made: dict[Node, Node] = {}
        wide = self.wide if self.wide is not None else self.short
        for nodes in zip(self.short.graph.nodes, self.long.graph.nodes, wide.graph.nodes, strict=True):
            node = nodes[0]
            if node.op == "call_function":
                args, kwargs = ([n.args for n in nodes], [dict(n.kwargs) for n in nodes])
                new = graph.call_function(node.target, self._solved(args, size, made), self._solved(kwargs, size, made))
            elif node.op == "output":
                new = graph.output(self._solved([n.args[0] for n in nodes], size, made))
            else:
                new = graph.create_node(node.op, node.target, name=node.name)
            new.meta = {k: v for k, v in node.meta.items() if k != "val"}
            made[node] = new
        return GraphModule(self.short, graph)

    def numbers(self, entries: int) -> float:
        """Estimates how many numbers all its tensors have at another length, at which squares grow by squares."""
        one, two, *_ = self.sizes
        total = 0.0
        for a, b in zip(self.short.graph.nodes, self.long.graph.nodes, strict=True):
            values = [n.meta.get("val") for n in (a, b)]
            if all(isinstance(v, Tensor) for v in values):
                short, long = (max(1.0, v.numel()) for v in values)
                total += short * (entries / one.entries) ** (log(long / short) / log(two.entries / one.entries))
        return total

    def shapes(self, entries: int, batch: int | None = None) -> list[tuple[int, ...]]:
        """Computes the shapes of the inputs at another length."""
        size = Size(entries, self.sizes[0].batch if batch is None else batch)
        wide = self.wide if self.wide is not None else self.short
        modules = (self.short, self.long, wide)
        inputs = zip(*([n for n in m.graph.nodes if n.op == "placeholder"] for m in modules), strict=True)
        return [tuple(self._solved([list(map(int, n.meta["val"].shape)) for n in nodes], size, {})) for nodes in inputs]

    def _solved(self, values: Sequence[Any], size: Size, made: Mapping[Node, Node]) -> Any:
        """Finds one argument of a node, from what it is in each of the captures."""
        first = values[0]
        if isinstance(first, Node):
            return made[first]
        if any(type(v) is not type(first) for v in values):
            raise NotResizable("its operators have other arguments at another length")
        if isinstance(first, (list, tuple)):
            if any(len(v) != len(first) for v in values):
                raise NotResizable("its operators take other numbers of tensors or sizes at another length")
            return type(first)(self._solved(parts, size, made) for parts in zip(*values, strict=True))
        if isinstance(first, dict):
            return {key: self._solved([v[key] for v in values], size, made) for key in first}
        if isinstance(first, int) and not isinstance(first, bool):
            short, long, wide = values
            return self._number(short, long, wide, size)
        if any(v != first for v in values):
            raise NotResizable("a number among its arguments, which is not whole, grows with the clip")
        return first

    def _number(self, short: int, long: int, wide: int, size: Size) -> int:
        """Solves for a whole number at another size.

        A part of it grows with the length, once for each clip or once for all.
        """
        one, two, *more = self.sizes
        value = short + Fraction(long - short, two.entries - one.entries) * (size.entries - one.entries)
        if wide != short:
            if wide * one.batch != short * more[0].batch:
                raise NotResizable("a number among its arguments grows with the batch, but not by as much")
            value = value * size.batch / one.batch
        if value.denominator != 1:
            raise NotResizable(f"it takes no {size.entries} entries")
        return int(value)


def part_of(module: GraphModule, inputs: Sequence[Node], result: Node, order: Mapping[Node, int]) -> GraphModule:
    """Cuts out what computes a node from others, as a graph of its own with these for inputs.

    Args:
        module: Has the constants.
        inputs: What is given.
        result: What is computed.
        order: The place of each node in its graph.
    """
    wanted = reached([result], lambda n: [] if n in inputs else sources(n))
    graph = Graph()
    made: dict[Node, Node] = {}
    for node in [*inputs, *sorted(wanted.keys() - set(inputs), key=order.__getitem__)]:
        if node in inputs:
            made[node] = graph.placeholder(node.name)
            made[node].meta = dict(node.meta)
        elif operands(node) and not sources(node):
            value = node.meta["val"]
            made[node] = graph.call_function(FULL, (list(map(int, value.shape)), node.args[1]), {"dtype": value.dtype})
            made[node].meta = dict(node.meta)
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].args = _with_sizes(node, made[node].args)
    graph.output(made[result])
    return GraphModule(module, graph)


def drop_slices(graphs: Sequence[GraphModule]) -> None:
    """Takes out slices that take all of a dim in each capture: where they end may grow with the batch."""
    for nodes in list(zip(*(g.graph.nodes for g in graphs), strict=True)):
        if all(n.target is aten.slice.Tensor and shape_of(n) == shape_of(n.all_input_nodes[0]) for n in nodes):
            for n in nodes:
                n.replace_all_uses_with(n.all_input_nodes[0])
                n.graph.erase_node(n)
    for graph in graphs:
        graph.recompile()


def _with_sizes(node: Node, args: tuple[Argument, ...]) -> tuple[Argument, ...]:
    """The arguments of a view with the size that it leaves open: another one may be left open in its place."""
    sizes = args[1] if node.target in SIZED - {aten.expand.default} and len(args) > 1 else ()
    if not isinstance(sizes, (list, tuple)) or -1 not in sizes:
        return args
    return (args[0], list(map(int, node.meta["val"].shape)), *args[2:])


def in_float64(module: GraphModule) -> GraphModule:
    """Makes a graph compute in float64, casts among its operators included."""
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: torch.float64 if value is torch.float32 else value
        )
    return GraphModule(module, graph).double()


def check_same(graphs: Iterable[GraphModule]) -> None:
    """Refuses captures that are not the same node by node.

    Raises:
        NotResizable: They are not.
    """
    first, *others = graphs
    for other in others:
        pairs = list(zip(first.graph.nodes, other.graph.nodes, strict=False))
        if len(first.graph.nodes) != len(other.graph.nodes):
            raise NotResizable("the network has other operators for a longer clip")
        for a, b in pairs:
            if a.op != b.op or (a.op == "call_function" and a.target != b.target):
                name = operator_name(b.target)
                raise NotResizable(f"the network has another operator for a longer clip ({name})")
            if a.op == "get_attr":
                one, two = get_constant(first, str(a.target)), get_constant(other, str(b.target))
                if one is not two and (one.shape != two.shape or not torch.equal(one, two)):
                    raise NotResizable(f"the constant {a.target} depends on the clip's length")
