"""Writes the body of a loop: one copy of its operators, with placeholders for what it is given."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from co3d_compile.capture.loops.copies import Copies, Earlier, Edge, Frames, Inner, Walk
from co3d_compile.ir.graph_edits import fake_mode, shape_of_call
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.program import Program

aten = torch.ops.aten
POOLING = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.logical_or.default,
    aten.logical_and.default,
}


class Signature:
    """What a turn takes: entries along walks, values of turns before it, and what is the same for each turn.

    Args:
        copies: The loop as it was captured.
        outputs: The operators that are read outside of the loop.
        openings: Walks whose first entry is a start.

    Attributes:
        needed: The operators that the outputs depend on.
        walked: The entries that a turn takes: of which walk, and which of its entries.
        states: What is handed on: operators by their place in the body, and how many turns before.
        fixed: Nodes outside that are the same for each turn, by what stands for them.
    """

    def __init__(self, copies: Copies, outputs: list[int], openings: Iterable[Walk] = ()) -> None:
        self.copies, self.needed = copies, needed(copies, outputs)
        edges = [(at, k, e) for at in sorted(self.needed) for k, e in enumerate(copies.edges[at])]
        walks = dict.fromkeys(walk for at, k, _ in edges if (walk := self.walk(at, k)) is not None)
        kept = [copies.walk_of(e.at) for _, _, e in edges if isinstance(e, Earlier)]
        walks.update(dict.fromkeys(walk for walk in kept if walk is not None))
        walks.update(dict.fromkeys(openings))
        self.walked = [(walk, i) for walk in walks for i in range(walk.entries)]
        lags: dict[int, int] = {}
        for _, _, e in edges:
            if isinstance(e, Earlier):
                lags[e.at] = max(e.lag, lags.get(e.at, 0))
        self.states = [(at, back) for at, lag in lags.items() for back in range(1, lag + 1)]
        self.fixed: dict[Hashable, Node] = {}
        for at, k, e in edges:
            outer = self.outer(at, k, e)
            if outer is not None:
                self.fixed.setdefault(self.key(e, outer), outer)

    def walk(self, at: int, k: int) -> Walk | None:
        """The walk that an operand is, in the copy or outside of it."""
        edge = self.copies.edges[at][k]
        return self.copies.walk_of(edge.at) if isinstance(edge, Inner) else self.copies.walks.get((at, k))

    def outer(self, at: int, k: int, edge: Edge) -> Node | None:
        """The node outside of the loop that an operand is, if it is the same for each turn."""
        if isinstance(edge, (Earlier, Frames)) or self.walk(at, k) is not None:
            return None
        if isinstance(edge, Inner):
            return self.copies.body[edge.at] if edge.at in self.copies.invariant else None
        return edge.node

    def key(self, edge: Edge, outer: Node) -> Hashable:
        """What stands for a node outside."""
        return outer if isinstance(edge, (Inner, Earlier, Frames)) else edge.key


class Body:
    """The graph of one turn, ``(*entries, *states, *fixed) -> (*next states, *outputs)``.

    Args:
        program: Has the copies.
        signature: What a turn takes.

    Attributes:
        walked: For each entry that the body takes: the walk, and which of its entries.
        states: What is handed on: operators by their place in the body, and how many turns before.
        fixed: Nodes outside that are the same for each turn, by what stands for them.
        values: What the operators compute.
    """

    def __init__(self, program: Program, signature: Signature) -> None:
        self.copies, self.signature = signature.copies, signature
        self.mode = fake_mode(program)
        self.graph = Graph()
        self.walked = {
            (walk, i): self._input(f"entry_{n}", walk.root, walk.dim) for n, (walk, i) in enumerate(signature.walked)
        }
        self.states = {
            (at, back): self._input(f"state_{n}", self.copies.body[at]) for n, (at, back) in enumerate(signature.states)
        }
        self.fixed = {key: self._input(f"fixed_{n}", outer) for n, (key, outer) in enumerate(signature.fixed.items())}
        self.values: dict[int, Node] = {}
        self._windows: dict[Walk, Node] = {}
        for at in sorted(signature.needed):
            self.values[at] = self._operator(at)

    def _input(self, name: str, like: Node, without: int | None = None) -> Node:
        """Adds an input like a node, but for one of its dims."""
        node = self.graph.placeholder(name)
        value = like.meta["val"]
        with self.mode:
            shape = [int(s) for d, s in enumerate(value.shape) if d != without]
            node.meta["val"] = torch.empty(shape, dtype=value.dtype)
        return node

    def call(self, path: str, target: Any, *args: Any) -> Node:
        """Adds an operator to the body that the copies do not have."""
        node = self.graph.call_function(target, args)
        node.meta = {"val": shape_of_call(self.mode, target, args, {}), "path": path}
        return node

    def _operator(self, at: int) -> Node:
        node = self.copies.body[at]
        operands = iter([self._operand(at, k, e) for k, e in enumerate(self.copies.edges[at])])
        args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(operands))
        new = self.graph.create_node("call_function", node.target, args, kwargs)
        new.meta = {"val": node.meta["val"], "path": module_path(node)}
        return new

    def _operand(self, at: int, k: int, edge: Edge) -> Node:
        walk = self.signature.walk(at, k)
        if walk is not None:
            return self._frames(walk)
        outer = self.signature.outer(at, k, edge)
        if outer is not None:
            return self.fixed[self.signature.key(edge, outer)]
        if isinstance(edge, Earlier):
            return self.states[edge.at, edge.lag]
        assert isinstance(edge, Inner)
        return self.values[edge.at]

    def _frames(self, walk: Walk) -> Node:
        """Takes what a turn takes of a walk: an entry, or several of them with their dim."""
        if walk.length is None:
            return self.walked[walk, 0]
        if walk not in self._windows:
            path = module_path(walk.root)
            rows = [self.call(path, aten.unsqueeze.default, self.walked[walk, i], walk.dim) for i in range(walk.length)]
            self._windows[walk] = rows[0] if len(rows) == 1 else self.call(path, aten.cat.default, rows, walk.dim)
        return self._windows[walk]

    def _now(self, at: int) -> Node:
        """What an operator of the body has computed, or the frames that it has taken, in this turn."""
        walk = self.copies.walk_of(at)
        return self.values[at] if walk is None else self._frames(walk)

    def entry_of(self, at: int, dim: int, index: int) -> Node:
        """Takes one entry of an output that has several, or one with a dim of its own."""
        return self.call(module_path(self.copies.body[at]), aten.select.int, self.values[at], dim, index)

    def close(self, outputs: list[Node]) -> GraphModule:
        """Finishes the body."""
        handed = [self._now(at) if back == 1 else self.states[at, back - 1] for at, back in self.states]
        self.graph.output((*handed, *outputs))
        self.graph.lint()
        return GraphModule({}, self.graph)


def needed(copies: Copies, outputs: list[int]) -> set[int]:
    """Finds the operators that outputs depend on, in this turn or an earlier one.

    Frames and what is the same left out.
    """
    computed = {at for at in copies.body if at not in copies.invariant and copies.walk_of(at) is None}

    def onward(at: int) -> set[int]:
        return {e.at for e in copies.edges[at] if isinstance(e, (Inner, Earlier))} & computed

    return set(reached(computed.intersection(outputs), onward))


def common_path(nodes: list[Node]) -> str:
    """Finds the module that all of these lie in."""
    paths = [module_path(n).split(".") for n in nodes]
    shared = []
    for atoms in zip(*paths, strict=False):
        if len(set(atoms)) > 1:
            break
        shared.append(atoms[0])
    return ".".join(shared)


def leave_pools(copies: Copies) -> None:
    """Leaves out of a loop what only pools over its turns: a sum or a maximum of which the last value alone is read.

    A clip has one such value, so that it is a window over what is pooled, and no state: a sum would grow without end.
    """
    last = copies.turns[-1]
    inside = {n for turn in copies.turns for n in turn.values()}
    for at, node in list(copies.body.items()):
        operands = copies.edges[at]
        others = [e for e in operands if e != Earlier(at, 1)]
        if node.target not in POOLING or len(others) != 1 or isinstance(others[0], Earlier):
            continue
        reads = [
            k for k, edges in enumerate(copies.edges) for e in edges if isinstance(e, (Inner, Earlier)) and e.at == at
        ]
        early = [
            u for turn in copies.turns if turn is not last and at in turn for u in turn[at].users if u not in inside
        ]
        if reads == [at] and not early and at not in copies.invariant:
            for turn in copies.turns:
                turn.pop(at, None)
