"""A loop over frames as one operator, and how passes reach the operators inside of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

from co3d_compile.ir.graph_edits import fake_mode, insert_constant
from co3d_compile.ir.node_reading import module_path, returned
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import get_constant

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class FrameLoop:
    """The operator of a node ``loop(*walked, *starts, *fixed)``: a body, run once for each frame.

    The body takes one entry of each walked tensor, the values that the turn before has handed on (in the first turn
    the starts), and what is the same in every turn. It returns the values that it hands on, then its outputs. The
    operator returns each output of all turns, stacked.

    Args:
        body: ``(*entries, *states, *fixed) -> (*next states, *outputs)``.
        walked: For each tensor that is walked along: the dim that a turn takes one entry of.
        states: How many values are handed on.
        outputs: For each output the dim on which the turns are stacked.
        memory: Turns after which nothing depends on the starts any more; None: it never forgets.
        opened: For each value that is handed on: which walked tensor's entry the first turn takes, as in ``h = x[0]``;
            None: it takes the start.
    """

    body: GraphModule
    walked: tuple[int, ...]
    states: int
    outputs: tuple[int, ...]
    memory: int | None
    opened: tuple[int | None, ...]

    __name__ = "frame_loop"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the loop, for as many turns as the walked tensors have entries."""
        walked, states, fixed = self.parts(tensors)
        rows = []
        for turn in range(walked[0].shape[self.walked[0]]):
            entries = [x.select(dim, turn) for x, dim in zip(walked, self.walked, strict=True)]
            states = self.first(entries, states) if turn == 0 else states
            results = self.body(*entries, *states, *fixed)
            states, outputs = results[: self.states], results[self.states :]
            rows.append(outputs)
        return tuple(
            torch.stack(list(row), dim) for row, dim in zip(zip(*rows, strict=True), self.outputs, strict=True)
        )

    def first(self, entries: Sequence[T], starts: Sequence[T]) -> Sequence[T]:
        """What the first turn takes for the values that are handed on."""
        return [start if at is None else entries[at] for at, start in zip(self.opened, starts, strict=True)]

    def parts(self, operands: Sequence[T]) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
        """Parts the operands, or the placeholders of the body: what is walked along, the states, what is fixed."""
        n = len(self.walked)
        return operands[:n], operands[n : n + self.states], operands[n + self.states :]

    def __eq__(self, other: object) -> bool:
        """Says whether it does the same as another loop, such as that of a longer clip."""
        if not isinstance(other, FrameLoop) or self._described() != other._described():
            return False
        return self.body is other.body or _written(self.body) == _written(other.body)

    def __hash__(self) -> int:
        return hash(self._described())

    def _described(self) -> tuple[object, ...]:
        return self.walked, self.states, self.outputs, self.memory, self.opened

    def placeholders(self) -> list[Node]:
        """What the body takes."""
        return _placeholders(self.body.graph)

    def results(self) -> tuple[list[Node], list[Node]]:
        """What the body hands on, and its outputs."""
        results = returned(self.body.graph)
        return results[: self.states], results[self.states :]


def is_loop(node: Node) -> bool:
    """Says whether a node is a loop over frames."""
    return isinstance(node.target, FrameLoop)


def loop_of(node: Node) -> FrameLoop:
    """The loop that a node is."""
    assert isinstance(node.target, FrameLoop)
    return node.target


def loop_bodies(program: Program) -> Iterator[Program]:
    """Yields the bodies of a program's loops, each as a program that a pass may rewrite.

    Constants that a loop is given are constants of that program. What becomes of them is given to the loop.
    """
    for node in [n for n in program.graph.nodes if is_loop(n)]:
        loop, graph = loop_of(node), deepcopy(loop_of(node).body.graph)
        *_, fixed = loop.parts(_placeholders(graph))
        *_, given = loop.parts(node.args)
        for inner, outer in zip(fixed, given, strict=True):
            if isinstance(outer, Node) and outer.op == "get_attr":
                with graph.inserting_after(_placeholders(graph)[-1]):
                    constant = graph.get_attr(str(outer.target))
                constant.meta = dict(outer.meta)
                inner.replace_all_uses_with(constant)
        inside = program.on(graph)
        yield inside
        _close(program, node, inside)


def _close(program: Program, node: Node, inside: Program) -> None:
    """Gives a loop its body back: constants in it become operands of the loop, and what nothing reads is left out."""
    loop, graph = loop_of(node), inside.graph
    walked, states, fixed = loop.parts(_placeholders(graph))
    operands = list(node.args)
    kept = operands[: len(walked) + len(states)]
    for inner, outer in zip(fixed, operands[len(kept) :], strict=True):
        if inner.users:
            kept.append(outer)
        else:
            graph.erase_node(inner)
    given: dict[str, Node] = {}
    for constant in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(constant.target)
        if name not in given:
            with graph.inserting_after(_placeholders(graph)[-1]):
                given[name] = graph.placeholder(f"{name.replace('.', '_')}_of_loop")
            given[name].target = given[name].name  # a path may have signs that no name in Python has
            given[name].meta = dict(constant.meta)
            kept.append(_outside(program, node, name, get_constant(inside.module, name)))
        constant.replace_all_uses_with(given[name])
        graph.erase_node(constant)
    node.args = tuple(kept)
    node.target = replace(loop, body=GraphModule({}, graph))


def _outside(program: Program, node: Node, name: str, value: Tensor) -> Node:
    """Puts a constant in front of a loop: the one of this name if it has the same value, else a new one."""
    there = dict(program.module.named_buffers()).get(name)
    if there is None or there.shape != value.shape or there.dtype != value.dtype or not torch.equal(there, value):
        return insert_constant(program, node, name, value)
    with program.graph.inserting_before(node):
        constant = program.graph.get_attr(name)
    constant.meta = {"val": fake_mode(program).from_tensor(there, static_shapes=True), "path": module_path(node)}
    return constant


def _written(body: GraphModule) -> list[object]:
    """Writes down the operators of a body and what each reads, by their places in it."""
    place = {n: i for i, n in enumerate(body.graph.nodes)}
    return [
        (n.op, None if n.op == "placeholder" else n.target, map_arg((n.args, dict(n.kwargs)), place.__getitem__))
        for n in place
    ]


def _placeholders(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]
