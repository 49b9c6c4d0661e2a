"""Writes the nodes of a step graph: each call once, constants computed, shapes and module paths attached."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Graph, Node, map_arg
from torch.fx.node import Argument, Target

from co3d_compile.ir.fake_values import Result, fake_like
from co3d_compile.ir.graph_edits import fake_mode, shape_of_call
from co3d_compile.ir.markers import carry, counter, expand_batch, fifo, previous, store
from co3d_compile.ir.node_reading import Args, Kwargs, called, operand, whole
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import get_constant, set_constant

aten = torch.ops.aten


FORM = re.compile(r"_(tap|as)_\d+$")  # what follows a constant's name where it is one tap of it, or another form
UNNAMED = "lowered.constant"


@dataclass(frozen=True)
class Slot:
    """An entry that is kept in a queue: row ``index`` of ``queue`` (batch, entries, features), viewed as ``shape``."""

    queue: Node
    index: int
    shape: tuple[int, ...]


Entry = Node | Slot


class Builder:
    """A builder of a new graph beside a program's own."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = Graph()
        self.mode = fake_mode(program)
        self.batch = program.inputs[0].shape[0]
        self.path = ""
        self._known: dict[Hashable, Node] = {}
        self._constants: dict[Node, str] = {}
        self._shapes: dict[Hashable, Result] = {}
        self._count = 0

    def call(self, target: Target, *args: Argument | Slot, **kwargs: Argument) -> Node:
        """Adds an operator on nodes of the new graph; the same call gives the same node, constants are computed."""
        operands = tuple(self.resolve(a) if isinstance(a, Slot) else a for a in args)
        key = (target, _hashable(operands), _hashable(tuple(sorted(kwargs.items()))))
        if key in self._known:
            return self._known[key]
        nodes: list[Node] = []
        map_arg((operands, kwargs), nodes.append)
        if nodes and all(n in self._constants for n in nodes):
            node = self._compute(target, operands, kwargs)
        else:
            node = self.graph.call_function(called(target), operands, kwargs)
            node.meta["path"] = self.path
            node.meta["val"] = self._shape(node)
        self._known[key] = node
        return node

    def _shape(self, node: Node) -> Result:
        if node.target not in (previous, store, fifo, expand_batch):
            return self._looked_up(node.target, node.args, node.kwargs)
        value = operand(node).meta["val"]
        if node.target is fifo:
            rows, entries, features = value.shape
            return self.empty((rows, entries + whole(node, 1), features), value.dtype)
        if node.target is expand_batch:
            shape = list(value.shape)
            shape[whole(node, 2)] = operand(node, 1).meta["val"].shape[whole(node, 3)]
            return self.empty(shape, value.dtype)
        return value

    def _looked_up(self, target: Target, args: Args, kwargs: Kwargs) -> Result:
        """Computes a shape once for operands of the same shapes: a step of sound has thousands of samples."""
        if target is aten.select.int:
            args = (*args[:2], 0)  # all places of a dim have one shape
        key = (target, _hashable(map_arg((args, tuple(sorted(kwargs.items()))), _described)))
        if key not in self._shapes:
            self._shapes[key] = shape_of_call(self.mode, target, args, kwargs)
        return self._shapes[key]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that has a shape and no values."""
        with self.mode:
            return torch.empty(list(shape), dtype=dtype)

    def constant(self, name: str, value: torch.Tensor) -> Node:
        """Adds a constant."""
        key = (name, "constant")
        if key in self._known:
            return self._known[key]
        set_constant(self.program.module, name, value)
        node = self.graph.get_attr(name)
        node.meta = {"path": self.path, "val": fake_like(self.mode, value)}
        self._known[key] = node
        self._constants[node] = name
        return node

    def is_constant(self, node: Node) -> bool:
        """Says whether a node of the new graph is one of its constants."""
        return node in self._constants

    def _compute(self, target: Target, args: Args, kwargs: Kwargs) -> Node:
        names: set[str] = set()

        def value(n: Node) -> torch.Tensor:
            names.add(FORM.sub("", self._constants[n]))
            return get_constant(self.program.module, self._constants[n])

        real_args, real_kwargs = map_arg((args, kwargs), value)
        with torch.no_grad():
            result = called(target)(*real_args, **real_kwargs)
        return self.new_constant(result, names.pop() if len(names) == 1 else UNNAMED)

    def new_constant(self, value: torch.Tensor, made_of: str = UNNAMED) -> Node:
        """Adds a constant that has no name in the model; ``made_of``: the one that it is another form of."""
        self._count += 1
        return self.constant(f"{made_of}_as_{self._count}", value.contiguous())

    def counter(self, like: Node, pulse: int) -> Node:
        """Counts the entries before this step, (batch, 1) of int64, where ``pulse`` come with each."""
        key = ("counter", pulse)
        if key not in self._known:
            read = self.count(like)
            self.call(store, read, self.call(aten.add.Tensor, read, pulse))
            self._known[key] = read
        return self._known[key]

    def zero_rows(self, like: Node, features: int) -> Node:
        """Makes zeros (batch, features)."""
        value = torch.zeros(1, features, dtype=like.meta["val"].dtype)
        return self.with_batch_of(self.constant(f"zeros_{features}", value), like)

    def count(self, like: Node) -> Node:
        """Adds a state (batch, 1) of int64; whoever makes it stores its next value."""
        read = self.graph.call_function(counter, (like,))
        read.meta = {"path": self.path, "val": self.empty((self.batch, 1), torch.int64)}
        return read

    def carry(self, like: Node, features: int, of_ends: bool = False, initial: float = 0.0) -> Node:
        """Adds a state of (batch, features); whoever makes it stores its next value."""
        return self._state([[like]], like, [features], of_ends, initial)

    def carry_value(
        self, turns: Sequence[Sequence[Node]], like: Node, initial: float = 0.0, memory: int | None = None
    ) -> Node:
        """Adds a state in the shape of a node, the batch in front; whoever makes it stores its next value.

        Args:
            turns: For each turn of a step the entries that it is made of.
            like: A node of that shape.
            initial: Its value at the start.
            memory: Turns after which nothing is left of a value; None: it never forgets.
        """
        return self._state(turns, like, self.sizes(like)[1:], False, initial, memory)

    def _state(self, turns: Sequence[Sequence[Node]], like: Node, shape: list[int], *rest: float | None) -> Node:
        node = self.graph.call_function(carry, ([list(turn) for turn in turns], shape, *rest))
        rows, dtype = like.meta["val"].shape[0], like.meta["val"].dtype
        node.meta = {"path": self.path, "val": self.empty((rows, *shape), dtype)}
        return node

    def resolve(self, ref: Entry) -> Node:
        """Finds the node of an entry."""
        if isinstance(ref, Slot):
            return self.call(
                aten.reshape.default, self.call(aten.select.int, ref.queue, 1, ref.index), [-1, *ref.shape[1:]]
            )
        return ref

    def sizes(self, node: Node) -> list[int]:
        """The shape of a node of the new graph, at the captured batch."""
        return [int(s) for s in node.meta["val"].shape]

    def features(self, node: Node) -> int:
        """Counts the numbers in one stream's share of a node of the new graph."""
        return prod(self.sizes(node)) // self.batch

    def with_batch_of(self, x: Node, like: Node, x_dim: int = 0, like_dim: int = 0) -> Node:
        """Repeats a constant of batch one, or one that is the same for each captured clip, for any batch."""
        if x not in self._constants or self.sizes(x)[x_dim] not in (1, self.batch):
            return x
        if self.sizes(x)[x_dim] != 1:
            value = get_constant(self.program.module, self._constants[x])
            if not bool((value == value.narrow(x_dim, 0, 1)).all()):
                return x
            x = self.call(aten.slice.Tensor, x, x_dim, 0, 1)
        return self.call(expand_batch, x, like, x_dim, like_dim)


def _described(node: Node) -> Argument:
    """What the shape of a result depends on, of an operand."""
    value = node.meta["val"]
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return tuple((tuple(t.shape), t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in tensors)


def _hashable(value: object) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, slice):
        return (value.start, value.stop, value.step)
    return (type(value), value) if isinstance(value, (bool, int, float)) else value
