"""Loops over frames, which are captured as one copy of their body per frame, as the body on all frames at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from co3d_compile.capture.loop_tokens import frame_of
from co3d_compile.ir.graph_edits import insert
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments, order_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal, random_tensor

aten = torch.ops.aten
SIZES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
SAME = 3e-5  # of the largest number: the same sums in another order


class _Differ(Exception):
    """The parts are not copies of one body on frame after frame."""


def roll(program: Program) -> None:
    """Rewrites ``stack([f(x[:, :, t]) for t in range(T)])`` to f on the frames of x, folded into the batch.

    Where the loop writes ``y[:, t] = f(x[:, :, t])``, that has become a concatenation already. The numbers stay the
    same, and are compared. What follows need not be computed on a window of T results: time has a dim again.
    """
    graph = program.graph
    loops = [n for n in graph.nodes if n.target is aten.cat.default]
    clips = [n.meta["val"] for n in program.placeholders()]
    if not loops or any(isinstance(s, torch.SymInt) for clip in clips for s in clip.shape):
        return  # the program leaves its sizes open (TorchScript, dynamic shapes): its copies cannot be run
    generator = torch.Generator().manual_seed(0)
    clips = [random_tensor(clip.shape, clip.dtype, generator) for clip in clips]
    before: list[Tensor] = []
    collected: dict[Node, int] = {}
    # What is collected step by step ends in the last concatenation. A loop over what another collects comes after it.
    for node in [*reversed(loops), *loops]:
        new = _rolled(program, node, collected) if node.users else None
        if new is not None:
            before = before or _results(program, clips)
            readers = list(node.users)
            collected[new] = Arguments(node).dim(node)
            node.replace_all_uses_with(new)
            pairs = zip(_results(program, clips), before, strict=True)
            if not all(equal(after, wanted, SAME) for after, wanted in pairs):
                for reader in readers:
                    reader.replace_input_with(new, node)
            graph.eliminate_dead_code()


def _rolled(program: Program, node: Node, collected: dict[Node, int]) -> Node | None:
    """Returns what takes the place of a concatenation, if it collects a loop over frames."""
    loop = _Loop(program, node, collected)
    if len(loop.parts) < 3:
        return None
    try:
        return loop.rolled()
    except (_Differ, RuntimeError, ValueError, TypeError, IndexError):
        program.graph.eliminate_dead_code()  # what was written before it turned out
        return None


class _Loop:
    """One concatenation of what a loop collects."""

    def __init__(self, program: Program, node: Node, collected: dict[Node, int]) -> None:
        self.program, self.node, self.collected = program, node, collected
        self.rows = shape_of(program.placeholders()[0])[0]
        self.dim = Arguments(node).dim(node)
        self.parts = _joined(node, self.dim)
        self.found: dict[tuple[Node, ...], tuple[Node, bool]] = {}

    def rolled(self) -> Node:
        """Returns the concatenation, computed from all frames at once."""
        count = len(self.parts)
        body, loops = self._alike(self.parts)
        if not loops:
            raise _Differ
        rest = [s for d, s in enumerate(shape_of(self.node)) if d != self.dim]
        if rest[0] != self.rows:
            raise _Differ
        apart = insert(self.program, self.node, aten.reshape.default, body, [rest[0], count, *rest[1:]])
        order = [0, *range(2, len(rest) + 1)]
        order.insert(self.dim, 1)
        return insert(self.program, self.node, aten.permute.default, apart, order)

    def _alike(self, copies: tuple[Node, ...]) -> tuple[Node, bool]:
        """Returns what all copies compute, and whether it is of all frames (else it is one and the same constant)."""
        if copies not in self.found:
            self.found[copies] = self._leaf(copies) or self._operator(copies)
        return self.found[copies]

    def _leaf(self, copies: tuple[Node, ...]) -> tuple[Node, bool] | None:
        """Returns the frames of one tensor, one after the other, folded into the batch."""
        taken = [t for t in map(frame_of, copies) if t is not None and t.length in (None, 1)]
        if len(taken) != len(copies) or len({(t.root, t.dim) for t in taken}) != 1:
            return None
        x, dim = taken[0].root, taken[0].dim
        batch = 0 if dim else 1  # (T, N, …)
        selected = rank_of(copies[0]) < rank_of(x)
        if dim != time_dim(self.program, x, self.collected) or shape_of(x)[batch] != self.rows or not (dim or selected):
            return None
        frames = self._frames(x, dim, [t.start for t in taken])
        order = [batch, dim, *(d for d in range(rank_of(x)) if d not in (batch, dim))]
        first = insert(self.program, self.node, aten.permute.default, frames, order)
        sizes = [self.rows * len(copies), *shape_of(copies[0])[1:]]
        return insert(self.program, self.node, aten.reshape.default, first, sizes), True

    def _frames(self, x: Node, dim: int, indices: list[int]) -> Node:
        """Returns the frames that follow each other, the first and the last of them maybe several times."""
        size = shape_of(x)[dim]
        if indices == list(range(size)):
            return x
        steps = {b - a for a, b in pairwise(indices)}
        low, high = min(indices), max(indices)
        if len(indices) * 2 < size or indices != sorted(indices) or len(steps - {0}) != 1:
            raise _Differ
        step = (steps - {0}).pop()
        front, back = indices.count(low) - 1, indices.count(high) - 1
        once = list(range(low, high + 1, step))
        if indices != [low] * front + once + [high] * back:
            raise _Differ

        def part(start: int, end: int, by: int = 1) -> Node:
            return insert(self.program, self.node, aten.slice.Tensor, x, dim, start, end, by)

        main = part(low, high + 1, step)
        if not front + back:
            return main
        ends = [part(low, low + 1)] * front, [part(high, high + 1)] * back
        return insert(self.program, self.node, aten.cat.default, [*ends[0], main, *ends[1]], dim)

    def _operator(self, copies: tuple[Node, ...]) -> tuple[Node, bool]:
        """Returns the operator that all copies are, on what their operands are."""
        first = copies[0]
        if all(c is first for c in copies):
            if first.op != "get_attr":
                raise _Differ
            return first, False
        flat = [pytree.tree_flatten((c.args, c.kwargs)) for c in copies]
        if len({(c.op, c.target) for c in copies}) != 1 or any(spec != flat[0][1] for _, spec in flat):
            raise _Differ
        leaves, loops = [], False
        for values in zip(*(leaves for leaves, _ in flat), strict=True):
            value = values[0]
            if isinstance(value, Node):
                value, own = self._alike(values)
                loops |= own
            elif any(type(v) is not type(value) or v != value for v in values):
                raise _Differ
            leaves.append(value)
        if first.op != "call_function":
            raise _Differ
        if not loops:
            return first, False
        args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
        count = len(copies)
        if first.target in SIZES and args[1][0] == self.rows:
            args = (args[0], [self.rows * count, *args[1][1:]])
        new = insert(self.program, self.node, first.target, *args, **kwargs)
        new.meta = {**first.meta, "val": new.meta["val"]}
        several = isinstance(first.meta["val"], (tuple, list))  # each that is read is looked at by itself
        if not several and shape_of(new) != (self.rows * count, *shape_of(first)[1:]):
            raise _Differ
        return new, True


def _joined(node: Node, dim: int) -> tuple[Node, ...]:
    """Returns what is joined along a dim, entry by entry, without that dim where it was made for it.

    Nothing if by more.
    """
    parts = _flattened(node, dim)
    if any(shape_of(p)[dim] != 1 for p in parts):
        return ()
    made = all(p.target is aten.unsqueeze.default for p in parts)
    return tuple(map(operand, parts)) if made else parts


def _flattened(node: Node, dim: int) -> tuple[Node, ...]:
    """Returns the parts of a concatenation, and of concatenations on the same dim among them."""
    parts: list[Node] = []
    for part in Arguments(node).tensors("tensors"):
        inner = part.target is aten.cat.default and Arguments(part).dim(part) == dim
        parts += _flattened(part, dim) if inner else [part]
    return tuple(parts)


def time_dim(program: Program, node: Node, collected: Mapping[Node, int]) -> int | None:
    """Returns where time is, behind operators that leave each dim in its place or say where they move it; else None.

    Args:
        program: What the node is in.
        node: The tensor.
        collected: The dim of the frames in what other loops have collected.
    """
    chain = [node]
    while (
        chain[-1] not in collected
        and chain[-1].op == "call_function"
        and chain[-1].args
        and isinstance(chain[-1].args[0], Node)
    ):
        chain.append(chain[-1].args[0])
    first = chain.pop()
    dim = collected.get(first, {i.name: i.time_dim for i in program.inputs}.get(first.name))
    for moving in reversed(chain):
        dim = _moved(moving, dim) if dim is not None else None
    return dim


def _moved(node: Node, dim: int) -> int | None:
    """Returns where an operator leaves a dim of its first operand; None where it is not known to leave it whole."""
    x = operand(node)
    if not isinstance(x.meta["val"], Tensor) or not isinstance(node.meta["val"], Tensor):
        return None
    order = order_of(node)
    if order is not None:
        return order.index(dim)
    if node.target in (aten.mean.dim, aten.amax.default) and min(Arguments(node).dims(x)) > dim:
        return dim
    if node.target in SIZES:
        return dim if shape_of(node)[: dim + 1] == shape_of(x)[: dim + 1] else None
    return dim if rank_of(node) == rank_of(x) else None


def _results(program: Program, clips: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(Interpreter(program.module).run(*(x.clone() for x in clips)))
