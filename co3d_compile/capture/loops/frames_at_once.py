"""Loops over frames, which are captured as one copy of their body per frame, as the body on all frames at once."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise, takewhile

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import frame_of
from co3d_compile.ir.aten_operators import SIZED
from co3d_compile.ir.graph_edits import erase_dead, erase_unused, insert
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments, filled
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal, random_clips

aten = torch.ops.aten
DEPTH = 16  # operators behind each other that tell turns apart
MOST = 4  # loops whose results are listed in turn
SAME = 3e-5  # of the largest number: the same sums in another order


class _Differ(Exception):
    """The parts are not copies of one body on frame after frame."""


def take_frames_at_once(program: Program) -> None:
    """Rewrites ``stack([f(x[:, :, t]) for t in range(T)])`` to f on the frames of x, folded into the batch.

    Where the loop writes ``y[:, t] = f(x[:, :, t])``, that has become a concatenation already. The numbers stay the
    same, and are compared. What follows need not be computed on a window of T results: time has a dim again.
    """
    graph = program.graph
    loops = [n for n in graph.nodes if n.target is aten.cat.default]
    before: list[Tensor] = []
    # What is collected step by step ends in the last concatenation. A loop over what another collects comes after it.
    times = TimeDims(program)
    for node in [*reversed(loops), *loops]:
        new = rolled(program, node, times) if node.users else None
        if new is not None:
            times.forget()
            before = before or _results(program)
            readers = list(node.users)
            node.replace_all_uses_with(new)
            pairs = zip(_results(program), before, strict=True)
            if not all(equal(after, wanted, SAME) for after, wanted in pairs):
                for reader in readers:
                    reader.replace_input_with(new, node)
            erase_dead(graph)
            times = TimeDims(program)
    times.forget()


def rolled(program: Program, node: Node, times: TimeDims) -> Node | None:
    """Finds what may take the place of a concatenation, if it collects a loop over frames; else None.

    The first turns may be others, fewer than half of them: those of ``q = (q + [f(x[:, t])])[-3:]`` have a shorter
    list. They are a start of their own.

    Args:
        program: As captured.
        node: The concatenation.
        times: Where time is in the program. What is looked up stays on its nodes until it is asked to forget.
    """
    dim = Arguments(node).dim(node)
    flat = _flattened(node, dim)
    for first in dict.fromkeys((0, _other_turns(flat))):
        parts = _joined(flat[first:], dim)
        found = _rolled(program, node, dim, parts, times) if len(parts) >= 3 else None
        if found is not None:
            return insert(program, node, aten.cat.default, [*flat[:first], found], dim) if first else found
    return _in_turn(program, node, dim, _joined(flat, dim), times)


def _in_turn(program: Program, node: Node, dim: int, parts: tuple[Node, ...], times: TimeDims) -> Node | None:
    """What may take the place of ``stack([f(a[0]), g(b[0]), f(a[1]), g(b[1]), …])``: two loops, or more."""
    for several in range(2, MOST + 1):
        loops = [parts[i::several] for i in range(several)]
        alike = all(len({part.target for part in loop}) == 1 for loop in loops)
        if len(parts) < 3 * several or len(parts) % several or not alike:
            continue
        found = takewhile(bool, (_rolled(program, node, dim, loop, times) for loop in loops))
        apart = [insert(program, node, aten.unsqueeze.default, x, dim + 1) for x in found if x]
        if len(apart) == several:
            joined = insert(program, node, aten.cat.default, apart, dim + 1)
            return insert(program, node, aten.reshape.default, joined, list(shape_of(node)))
    return None


def _other_turns(parts: tuple[Node, ...]) -> int:
    """Counts the first parts that are computed otherwise than the last ones, by their operators; 0 if half of them."""
    kinds: dict[Hashable, int] = {}
    known: dict[tuple[Node, int], int] = {}

    def kind(node: Node, depth: int) -> int:
        if (node, depth) not in known:
            inner = [kind(n, depth - 1) for n in node.all_input_nodes] if depth else []
            known[node, depth] = kinds.setdefault((node.target if inner else node.op, *inner), len(kinds))
        return known[node, depth]

    found = [kind(part, DEPTH) for part in parts]
    first = max((i + 1 for i, own in enumerate(found) if own != found[-1]), default=0)
    return first if 2 * first < len(parts) else 0


def _rolled(program: Program, node: Node, dim: int, parts: tuple[Node, ...], times: TimeDims) -> Node | None:
    """Writes a concatenation of such parts, if they are the turns of a loop over frames."""
    there = set(program.graph.nodes)
    try:
        return _Loop(program, node, dim, parts, times).rolled()
    except (_Differ, RuntimeError, ValueError, TypeError, IndexError):
        for written in [n for n in program.graph.nodes if n not in there]:  # before it turned out
            erase_unused(written)
        return None


class Chains:
    """Which operators of a loop do the same in turn after turn, also where several turns read one result.

    Args:
        copies: One operator of each turn.
    """

    def __init__(self, copies: tuple[Node, ...]) -> None:
        self.after: dict[Node, set[Node]] = {}
        self.before: dict[Node, set[Node]] = {}
        for found in reached([copies], _operands_that_differ):
            for a, b in pairwise(found):
                self.after.setdefault(a, set()).add(b)
                self.before.setdefault(b, set()).add(a)

    def around(self, copies: tuple[Node, ...]) -> tuple[Node, ...]:
        """Adds to these copies those of the turns before and behind that are known to be turns."""
        front, back = self._walk(copies[0], self.before), self._walk(copies[-1], self.after)
        whole = (*reversed(front), *copies, *back)
        return whole if len(set(whole)) == len(whole) else copies

    def _walk(self, node: Node, onward: dict[Node, set[Node]]) -> list[Node]:
        found = [node]
        while len(others := onward.get(found[-1], set())) == 1:
            (node,) = others
            if node in found:
                break
            found.append(node)
        return found[1:]


def _operands_that_differ(copies: tuple[Node, ...]) -> list[tuple[Node, ...]]:
    """Lists what copies of an operator read, operand by operand, as far as it differs."""
    flat = [[v for v in pytree.tree_leaves((c.args, c.kwargs)) if isinstance(v, Node)] for c in copies]
    if len({(c.op, c.target, len(values)) for c, values in zip(copies, flat, strict=True)}) != 1:
        return []
    return [values for values in zip(*flat, strict=True) if len(set(values)) == len(values)]


class _Loop:
    """One concatenation of what a loop collects."""

    def __init__(self, program: Program, node: Node, dim: int, parts: tuple[Node, ...], times: TimeDims) -> None:
        self.program, self.node, self.dim, self.parts, self.times = program, node, dim, parts, times
        self.rows = shape_of(program.placeholders()[0])[0]
        self.found: dict[tuple[Node, ...], tuple[Node, bool]] = {}
        self.chains = Chains(parts)

    def rolled(self) -> Node:
        """Computes the concatenation from all frames at once."""
        count = len(self.parts)
        body, loops = self._alike(self.parts)
        if not loops:
            raise _Differ
        rest = [s for d, s in enumerate(shape_of(self.node)) if d != self.dim]
        if rest[0] != self.rows or shape_of(body)[0] != self.rows * count:
            raise _Differ
        apart = insert(self.program, self.node, aten.reshape.default, body, [rest[0], count, *rest[1:]])
        order = [0, *range(2, len(rest) + 1)]
        order.insert(self.dim, 1)
        return insert(self.program, self.node, aten.permute.default, apart, order)

    def _alike(self, copies: tuple[Node, ...]) -> tuple[Node, bool]:
        """Finds what all copies compute, and whether it is of all frames (else it is one and the same constant)."""
        if copies not in self.found:
            self.found[copies] = self._leaf(copies) or self._among(copies) or self._operator(copies)
        return self.found[copies]

    def _among(self, copies: tuple[Node, ...]) -> tuple[Node, bool] | None:
        """Finds what all copies compute as a part of that, where the turns before or behind compute it too."""
        chain = self.chains.around(copies)
        if chain == copies:
            return None
        try:
            every, loops = self._alike(chain)
        except _Differ:
            return None
        if not loops:
            return every, False
        if shape_of(every)[0] != self.rows * len(chain):
            return None
        first, rest = chain.index(copies[0]), shape_of(copies[0])[1:]
        apart = insert(self.program, self.node, aten.reshape.default, every, [self.rows, len(chain), *rest])
        part = insert(self.program, self.node, aten.slice.Tensor, apart, 1, first, first + len(copies))
        return insert(self.program, self.node, aten.reshape.default, part, [self.rows * len(copies), *rest]), True

    def _leaf(self, copies: tuple[Node, ...]) -> tuple[Node, bool] | None:
        """Takes the frames of one tensor, one after the other, folded into the batch.

        In place of the first and last ones one number may stand: a padding.
        """
        taken = [frame_of(c) for c in copies]
        walked = [i for i, t in enumerate(taken) if t is not None and t.length in (None, 1)]
        if not walked:
            return None
        first, end = walked[0], walked[-1] + 1
        takes = [t for t in taken[first:end] if t is not None and t.length in (None, 1)]
        pad = _padding([*copies[:first], *copies[end:]])
        if len(takes) != end - first or len({(t.root, t.dim) for t in takes}) != 1 or pad is None:
            return None
        x, dim = takes[0].root, takes[0].dim
        batch = 0 if dim else 1  # (T, N, …)
        one = copies[first]
        selected = rank_of(one) < rank_of(x)
        if not self.times.is_time(x, dim) or shape_of(x)[batch] != self.rows or not (dim or selected):
            return None
        frames = self._frames(x, dim, [t.start for t in takes])
        if len(copies) > len(takes):
            sides = [0, 0] * (rank_of(x) - 1 - dim) + [first, len(copies) - end]
            frames = insert(self.program, self.node, aten.constant_pad_nd.default, frames, sides, pad)
        order = [batch, dim, *(d for d in range(rank_of(x)) if d not in (batch, dim))]
        rows = insert(self.program, self.node, aten.permute.default, frames, order)
        sizes = [self.rows * len(copies), *shape_of(one)[1:]]
        return insert(self.program, self.node, aten.reshape.default, rows, sizes), True

    def _frames(self, x: Node, dim: int, indices: list[int]) -> Node:
        """Takes the frames that follow each other, and what stands in front of the first and behind the last."""
        size = shape_of(x)[dim]
        if indices == list(range(size)):
            return x
        steps = [b - a for a, b in pairwise(indices)]
        step = max(set(steps), key=steps.count)
        begin = next(i for i, s in enumerate(steps) if s == step)
        end = begin + next((i for i, s in enumerate(steps[begin:]) if s != step), len(steps) - begin) + 1
        if step < 1 or (end - begin) * 2 < max(size // step, len(indices)):
            raise _Differ

        def part(start: int, end: int, by: int = 1) -> Node:
            return insert(self.program, self.node, aten.slice.Tensor, x, dim, start, end, by)

        main = part(indices[begin], indices[end - 1] + 1, step)
        if end - begin == len(indices):
            return main
        front, back = [part(i, i + 1) for i in indices[:begin]], [part(i, i + 1) for i in indices[end:]]
        return insert(self.program, self.node, aten.cat.default, [*front, main, *back], dim)

    def _operator(self, copies: tuple[Node, ...]) -> tuple[Node, bool]:
        """Writes the operator that all copies are, on what their operands are."""
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
        if first.target in SIZED and args[1][0] == self.rows:
            args = (args[0], [self.rows * count, *args[1][1:]])
        new = insert(self.program, self.node, first.target, *args, **kwargs)
        new.meta = {**first.meta, "val": new.meta["val"]}
        several = isinstance(first.meta["val"], (tuple, list))  # each that is read is looked at by itself
        if not several and not self._holds_turns(new, first, count):
            raise _Differ
        return new, True

    def _holds_turns(self, new: Node, one: Node, count: int) -> bool:
        """Says whether a tensor is that of one turn with all turns in the dim of the batch, wherever that is."""
        changed = [(a, b) for a, b in zip(shape_of(new), shape_of(one), strict=True) if a != b]
        return changed == [(self.rows * count, self.rows)]


def _padding(nodes: list[Node]) -> float | None:
    """The number that all of these are filled with, 0 where there are none; None for anything else."""
    made = [filled(n) for n in nodes]
    numbers = {None if m is None else m.flatten()[0].item() for m in made} or {0.0}
    return numbers.pop() if len(numbers) == 1 else None


def _joined(parts: tuple[Node, ...], dim: int) -> tuple[Node, ...]:
    """Lists what is joined along a dim, entry by entry, without that dim where it was made for it.

    Nothing if by more.
    """
    if any(shape_of(p)[dim] != 1 for p in parts):
        return ()
    made = all(p.target is aten.unsqueeze.default for p in parts)
    return tuple(map(operand, parts)) if made else parts


def _flattened(node: Node, dim: int) -> tuple[Node, ...]:
    """Lists the parts of a concatenation, and of concatenations on the same dim among them; without empty ones."""
    parts: list[Node] = []
    for part in Arguments(node).tensors("tensors"):
        if shape_of(part) == (0,):
            continue  # ``y = torch.tensor([])``, to which others are added: it need not have their dims
        inner = part.target is aten.cat.default and Arguments(part).dim(part) == dim
        parts += _flattened(part, dim) if inner else [part]
    return tuple(parts)


def _results(program: Program) -> list[Tensor]:
    """Runs a program on random clips, the same ones each time."""
    with torch.no_grad():
        return pytree.tree_leaves(Interpreter(program.module).run(*random_clips(program)))
