"""Loops over frames, which are captured as one copy of their body per frame, as the body on all frames at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.graph_edits import fake_mode, insert, shape_of_call
from co3d_compile.ir.node_reading import argument, rank_of, shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten
SIZES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
SAME = 1e-4  # in standard deviations: the same sums in another order


class _Differ(Exception):
    """The parts are not copies of one body on frame after frame."""


def roll(program: Program) -> None:
    """``stack([f(x[:, :, t]) for t in range(T)])`` to f on the frames of x, folded into the batch.

    So too where the loop writes ``y[:, t] = f(x[:, :, t])``. The numbers stay the same, and are compared. What follows
    need not be computed on a window of T results: time has a dim again.
    """
    graph = program.graph
    loops = [n for n in graph.nodes if n.target in (aten.cat.default, aten.select_scatter.default)]
    if not loops or any(isinstance(s, torch.SymInt) for n in program.placeholders() for s in n.meta["val"].shape):
        return  # the program leaves its sizes open (TorchScript, dynamic shapes): its copies cannot be run
    clips = [_random(n) for n in program.placeholders()]
    before: list[torch.Tensor] = []
    for node in reversed(loops):  # what is collected step by step ends in the last concatenation
        new = _rolled(program, node) if node.users else None
        if new is not None:
            before = before or _results(program, clips)
            readers = list(node.users)
            node.replace_all_uses_with(new)
            if not _equal(before, _results(program, clips)):
                for reader in readers:
                    reader.replace_input_with(new, node)
            graph.eliminate_dead_code()


def _rolled(program: Program, node: Node) -> Node | None:
    """What takes the place of a concatenation, or of the last write, if it collects a loop over frames."""
    loop = _Loop(program, node)
    if len(loop.parts) < 3:
        return None
    try:
        return loop.rolled()
    except (_Differ, RuntimeError, ValueError, TypeError, IndexError):
        program.graph.eliminate_dead_code()  # what was written before it turned out
        return None


class _Loop:
    """One concatenation of what a loop collects, or the last of its writes."""

    def __init__(self, program: Program, node: Node) -> None:
        self.program, self.node = program, node
        self.rows = shape_of(program.placeholders()[0])[0]
        written = node.target is aten.select_scatter.default
        self.dim = argument(node, 2 if written else 1, "dim", 0) % rank_of(node)
        self.parts = _written(node, self.dim) if written else _joined(node, self.dim)
        self.found: dict[tuple[Node, ...], tuple[Node, bool]] = {}

    def rolled(self) -> Node:
        """The concatenation, computed from all frames at once."""
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
        """What all copies compute, and whether it is of all frames (else it is one and the same constant)."""
        if copies not in self.found:
            self.found[copies] = self._leaf(copies) or self._operator(copies)
        return self.found[copies]

    def _leaf(self, copies: tuple[Node, ...]) -> tuple[Node, bool] | None:
        """The frames of one tensor, one after the other, folded into the batch."""
        taken = [_taken(c) for c in copies]
        if any(t is None for t in taken) or len({t[:2] for t in taken if t}) != 1:
            return None
        x, dim, _ = taken[0]  # type: ignore[misc]
        if dim == 0 or dim != time_dim(self.program, x) or shape_of(x)[0] != self.rows:
            return None
        frames = self._frames(x, dim, [t[2] for t in taken if t])
        order = [0, dim, *(d for d in range(1, rank_of(x)) if d != dim)]
        first = insert(self.program, self.node, aten.permute.default, frames, order)
        sizes = [self.rows * len(copies), *shape_of(copies[0])[1:]]
        return insert(self.program, self.node, aten.reshape.default, first, sizes), True

    def _frames(self, x: Node, dim: int, indices: list[int]) -> Node:
        """Frames that follow each other, the first and the last of them maybe several times."""
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
        """The operator that all copies are, on what their operands are."""
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
            value: Any = values[0]
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
        return self._on_all(first, len(copies), args, kwargs), True

    def _on_all(self, first: Node, count: int, args: Any, kwargs: Any) -> Node:
        """The first copy's operator on all frames; each must be a row of what it gives."""
        if first.target in SIZES and args[1][0] == self.rows:
            args = (args[0], [self.rows * count, *args[1][1:]])
        with self.program.graph.inserting_before(self.node):
            new = self.program.graph.call_function(first.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = dict(first.meta)
        new.meta["val"] = shape_of_call(fake_mode(self.program), first.target, args, kwargs)
        several = isinstance(first.meta["val"], (tuple, list))  # each that is read is looked at by itself
        if not several and shape_of(new) != (self.rows * count, *shape_of(first)[1:]):
            raise _Differ
        return new


def _joined(node: Node, dim: int) -> tuple[Node, ...]:
    """What is joined along a dim, entry by entry, without that dim where it was made for it; nothing if by more."""
    parts = _flattened(node, dim)
    if any(shape_of(p)[dim] != 1 for p in parts):
        return ()
    made = all(p.target is aten.unsqueeze.default for p in parts)
    return tuple(p.args[0] for p in parts) if made else parts  # type: ignore[misc]


def _written(node: Node, dim: int) -> tuple[Node, ...]:
    """What is written to each index of a dim, one after the other; nothing if an index is left out."""
    at: dict[int, Node] = {}
    count = shape_of(node)[dim]
    while node.target is aten.select_scatter.default and argument(node, 2, "dim", 0) % rank_of(node) == dim:
        base, source, index = node.args[0], node.args[1], argument(node, 3, "index")
        assert isinstance(base, Node) and isinstance(source, Node)
        copied = source.args[1] if source.target is aten.copy.default else source
        alike = isinstance(copied, Node) and shape_of(copied) == shape_of(source)
        at.setdefault(index % count, copied if alike else source)  # type: ignore[arg-type]
        node = base
    return tuple(at[i] for i in range(count)) if len(at) == count else ()


def _flattened(node: Node, dim: int) -> tuple[Node, ...]:
    """The parts of a concatenation, and of concatenations on the same dim among them."""
    parts: list[Node] = []
    for part in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(part, Node)
        inner = part.target is aten.cat.default and argument(part, 1, "dim", 0) % rank_of(part) == dim
        parts += _flattened(part, dim) if inner else [part]
    return tuple(parts)


def _taken(node: Node) -> tuple[Node, int, int] | None:
    """The tensor, dim and index of a single entry that is selected, or cut out."""
    if node.target is aten.select.int:
        x, dim, index = node.args
    elif node.target is operator.getitem and getattr(node.args[0], "target", None) is aten.unbind.int:
        x, dim, index = node.args[0].args[0], argument(node.args[0], 1, "dim", 0), node.args[1]  # type: ignore
    elif node.target is aten.slice.Tensor and sliced(node)[3] - sliced(node)[2] == 1:
        x, dim, index, _, _ = sliced(node)
    else:
        return None
    assert isinstance(x, Node)
    x = _whole(x)
    dim %= rank_of(x)  # type: ignore[operator]
    return x, dim, index % shape_of(x)[dim]  # type: ignore[operator,return-value,index]


def _whole(node: Node) -> Node:
    """The tensor behind slices that leave nothing out."""
    while node.target is aten.slice.Tensor and shape_of(node) == shape_of(node.args[0]):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return node


def time_dim(program: Program, node: Node) -> int | None:
    """Where time is, behind operators that leave each dim in its place or say where they move it; else None."""
    chain = [node]
    while chain[-1].op == "call_function" and chain[-1].args and isinstance(chain[-1].args[0], Node):
        chain.append(chain[-1].args[0])
    dim = {i.name: i.time_dim for i in program.inputs}.get(chain.pop().name)
    for moving in reversed(chain):
        dim = _moved(moving, dim) if dim is not None else None
    return dim


def _moved(node: Node, dim: int) -> int | None:
    """Where an operator leaves a dim of its first operand; None where it is not known to leave it whole."""
    x = node.args[0]
    if not isinstance(x, Node) or not isinstance(x.meta["val"], torch.Tensor):
        return None
    if not isinstance(node.meta["val"], torch.Tensor):
        return None
    if node.target is aten.permute.default:
        order: list[int] = list(node.args[1])  # type: ignore[arg-type]
        return [d % rank_of(x) for d in order].index(dim)
    if node.target is aten.transpose.int:
        a, b = int(node.args[1]) % rank_of(x), int(node.args[2]) % rank_of(x)  # type: ignore[arg-type]
        return {a: b, b: a}.get(dim, dim)
    reduces = node.target in (aten.mean.dim, aten.amax.default)
    if reduces and all(d % rank_of(x) > dim for d in argument(node, 1, "dim") or [0]):
        return dim
    if node.target in SIZES:
        return dim if shape_of(node)[: dim + 1] == shape_of(x)[: dim + 1] else None
    return dim if rank_of(node) == rank_of(x) else None


def _random(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tuple(value.shape), generator=generator).abs().to(value.dtype)


def _results(program: Program, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(Interpreter(program.module).run(*(x.clone() for x in clips)))


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    def near(x: torch.Tensor, y: torch.Tensor) -> bool:
        scale = float(y.double().std(correction=0)) + 1e-6
        return bool(((x.double() - y.double()).abs() <= SAME * scale).all())

    return all(x.shape == y.shape and near(x, y) for x, y in zip(a, b, strict=True))
