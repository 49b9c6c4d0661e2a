"""The batch: many streams advance together, so no size in the step graph may fix how many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node, map_arg
from torch.fx.node import Argument
from torch.utils._pytree import PyTree

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.fake_values import computed
from co3d_compile.ir.graph_edits import fake_mode, insert
from co3d_compile.ir.markers import expand_batch
from co3d_compile.ir.node_reading import place_of, rank_of, returned, shape_of, where
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal, random_tensor
from co3d_compile.support.silence_torch import quiet

aten = torch.ops.aten
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
MOVES = {
    aten.cat.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
"""What has a dim for an argument along which it does not compute."""
FACTOR = 3
SAME = 3e-4  # of the largest number: rounding of float32 in random states
Value: TypeAlias = Tensor | Sequence[Tensor]


def at_another_batch(program: Program) -> dict[Node, Value]:
    """Computes the fake value of each node where the batch is :data:`FACTOR` times the captured one.

    An operator that fixes the batch ends it, and so does a graph in which streams are found to mix:
    ``program.step.fixed_batch`` is set, a warning says why, and nothing is known of what follows.
    """
    if any(i.boxes is not None for i in program.inputs):
        program.step.fixed_batch = 1
    views = _Views(program)
    values, stuck = _values(program, views)
    if views.before and (stuck is not None or _streams_mix(program, values)):
        views.restore()
        values, stuck = _values(program, None)
    if stuck is not None:
        fix_batch(program, f"at {place_of(stuck)}")
        return {}
    crossing = next((n for n in values if _crosses(n, values)), None)
    if program.inputs[0].shape[0] == 1 and not program.step.fixed_batch and _streams_mix(program, values):
        unknown = "it was captured for one clip, and does not say which of its dims of size one is the batch"
        fix_batch(program, unknown if crossing is None else f"{place_of(crossing)} computes over several streams")
        return {}
    if not all(_per_stream(program, node, values) for node in returned(program.graph)[: len(program.outputs)]):
        fix_batch(program, "what it returns does not have one row per stream")
        return {}
    if not program.step.fixed_batch and _reads_others(program, values):
        over = "it" if crossing is None else place_of(crossing)
        fix_batch(program, f"{over} computes over several streams")
        return {}
    return values


def _values(program: Program, views: _Views | None) -> tuple[dict[Node, Value], Node | None]:
    """Computes the fake values up to an operator that fixes the batch, and gives that one, too."""
    values: dict[Node, Value] = {}
    with quiet():
        for node in program.graph.nodes:
            if node.op == "output":
                break
            if views is not None:
                views.look(node, values)
            try:
                values[node] = _value(program, node, values)
            except Exception:  # whatever a meta kernel raises for sizes that do not fit
                if not _fits_with_rows_repeated(program, node, values):
                    return values, node
    return values, None


def _fits_with_rows_repeated(program: Program, node: Node, values: dict[Node, Value]) -> bool:
    """Repeats what constants that an operator reads have for each captured clip, if it is always the same.

    Such as a learned query that the network itself has repeated for its batch, in heads or not. Says whether the
    operator fits then.
    """
    rows = program.inputs[0].shape[0]
    if rows == 1 or not any(grown_dims(n, values) for n in node.all_input_nodes):
        return False
    for constant in [n for n in node.all_input_nodes if n.op == "get_attr"]:
        numbers = program.constant(constant)
        parts = [(d, numbers.unflatten(d, (rows, -1))) for d, size in enumerate(numbers.shape) if size % rows == 0]
        dim = next((d for d, part in parts if bool((part == part.narrow(d, 0, 1)).all())), None)
        if dim is not None:
            _repeat_for_each_stream(program, node, constant, dim, values)
    program.module.recompile()
    try:
        values[node] = _value(program, node, values)
    except Exception:  # whatever a meta kernel raises for sizes that do not fit
        return False
    return True


def _repeat_for_each_stream(program: Program, node: Node, constant: Node, dim: int, values: dict[Node, Value]) -> None:
    """Lets an operator read a constant's part for the first captured clip, once for each stream."""
    first, sizes = program.placeholders()[0], shape_of(constant)
    length = sizes[dim] // program.inputs[0].shape[0]
    own = insert(program, node, aten.slice.Tensor, constant, dim, 0, length)
    apart = insert(program, node, aten.unsqueeze.default, own, dim)
    repeated = insert(program, node, expand_batch, apart, first, dim, 0)
    merged = [*sizes[:dim], -1, *sizes[dim + 1 :]]
    joined = insert(program, node, aten.reshape.default, repeated, merged)
    node.replace_input_with(constant, joined)
    for new in (own, apart, repeated, joined):
        values[new] = _value(program, new, values)


def _value(program: Program, node: Node, values: Mapping[Node, Value]) -> Value:
    """Computes what a node gives from the values of its operands."""
    captured: Value = node.meta["val"]
    if node.op == "get_attr":
        return captured
    if isinstance(captured, Tensor) and node.op == "placeholder":
        rows, *rest = captured.shape
        with fake_mode(program):
            return torch.empty(rows * FACTOR, *rest, dtype=captured.dtype)
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target in RECURRENT:
        _check_rows(args)
    value: Value = computed(fake_mode(program), node.target, args, kwargs)
    if _rank(value) != _rank(captured):
        raise ValueError("a dim of size one was the batch")
    return value


class _Views:
    """Views that have the batch as a number, because nothing knew where it is: they are made for any batch.

    A view keeps the order of numbers in memory, so the batch has as many places before it as in the operand. Whether
    streams stay apart is asked on numbers afterwards.
    """

    def __init__(self, program: Program) -> None:
        self.module, self.rows = program.module, program.inputs[0].shape[0]
        self.before: dict[Node, Argument] = {}  # the sizes of views that were changed
        self.outer: dict[Node, int] = {}  # of dims that hold more than the batch: what lies outside of it

    def look(self, node: Node, values: Mapping[Node, Value]) -> None:
        """Frees the batch of a view, and follows where the batch is."""
        read = next((n for n in node.all_input_nodes if len(grown_dims(n, values)) == 1), None)
        if read is None or self.rows == 1 or 0 in shape_of(read):
            return
        (dim,), shape = grown_dims(read, values), shape_of(read)
        outer = self.outer.get(read, 1)
        if node.target is aten.reshape.default:
            self._free(node, math.prod(shape[:dim]) * outer)
        elif outer > 1 and isinstance(node.meta["val"], Tensor) and shape[dim] in shape_of(node):
            self.outer[node] = outer

    def _free(self, node: Node, places: int) -> None:
        """Writes -1 for the size that has so many places before the batch, where it is a number."""
        sizes = list(shape_of(node))
        for d, size in enumerate(sizes):
            own, rest = divmod(places, math.prod(sizes[:d]))
            if rest or not own or size % (own * self.rows):
                continue
            self.outer[node] = own
            if Arguments(node).integers("shape")[d] != -1:
                self.before[node] = node.args[1]
                node.update_arg(1, [-1 if i == d else n for i, n in enumerate(sizes)])
                self.module.recompile()
            return

    def restore(self) -> None:
        """Writes the sizes that were there."""
        for node, sizes in self.before.items():
            node.update_arg(1, sizes)
        self.module.recompile()


def _check_rows(args: tuple[PyTree, ...]) -> None:
    """Refuses states for another number of rows, which a recurrent operator would write beyond without a check."""
    x, states, *_, batch_first = args
    rows = x.shape[0 if batch_first else 1]
    if any(state.shape[1] != rows for state in ([states] if isinstance(states, Tensor) else states)):
        raise ValueError("a state has another number of rows")


def _per_stream(program: Program, node: Node, values: Mapping[Node, Value]) -> bool:
    """Says whether a result is a constant, or has the batch for one of its dims and nowhere else."""
    grown = grown_dims(node, values)
    rows = program.inputs[0].shape[0]
    return node.op == "get_attr" or [node.meta["val"].shape[d] for d in grown] == [rows]


def _rank(value: Value) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def fix_batch(program: Program, why: str) -> None:
    """Fixes the batch at the captured one, with a warning that says why."""
    if program.step.fixed_batch:  # with boxes there is one stream, and :func:`free_rows` says what is wrong
        return
    rows = program.step.fixed_batch = program.inputs[0].shape[0]
    program.notes.warnings.append(f"The model fixes its batch at {rows} ({why}): run it with batch={rows}.")


def _streams_mix(program: Program, values: Mapping[Node, Value]) -> bool:
    """Says whether one step of two streams at once differs from the same step of each alone, on random numbers.

    Frames and states are random, so that every path through the graph is taken.
    """
    generator = torch.Generator().manual_seed(0)
    clips = [n.meta["val"] for n in program.placeholders()]
    both = [random_tensor((2, *clip.shape[1:]), clip.dtype, generator) for clip in clips]
    try:
        with torch.no_grad():
            together = program.module(*both)
            alone = [program.module(*(x[i : i + 1] for x in both)) for i in range(2)]
    except Exception:  # an operator that takes the batch for something else may fail in any way
        return True
    for node, result, *each in zip(returned(program.graph), together, *alone, strict=True):
        dims = grown_dims(node, values)
        if node.op != "get_attr" and (len(dims) != 1 or not equal(result, torch.cat(each, dims[0]), SAME)):
            return True
    return False


def _crosses(node: Node, values: Mapping[Node, Value]) -> bool:
    """Says whether an operator may compute over the batch: over a dim of it, or its result has no such dim any more."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    read = {d for n in node.all_input_nodes for d in grown_dims(n, values)}
    result = node.meta["val"]
    if not read or (isinstance(result, Tensor) and len(grown_dims(node, values)) != 1):
        return bool(read)
    given = Arguments(node)
    dims = [given.given(name) for name in ("dim", "dims") if node.target not in MOVES]
    along = [d for dim in dims for d in (dim if isinstance(dim, (list, tuple)) else [dim]) if isinstance(d, int)]
    rank = rank_of(node.all_input_nodes[0]) if isinstance(node.all_input_nodes[0].meta["val"], Tensor) else 0
    return any(d % rank in read for d in along if rank)


def _reads_others(program: Program, values: Mapping[Node, Value]) -> bool:
    """Says whether a stream's results are others where the other streams are, on random numbers.

    The first stream and the last are asked: a running sum over the batch reads what stands before.
    """
    generator = torch.Generator().manual_seed(0)
    clips = [n.meta["val"] for n in program.placeholders()]
    given, others = (
        [random_tensor((max(2, clip.shape[0]), *clip.shape[1:]), clip.dtype, generator) for clip in clips]
        for _ in range(2)
    )
    try:
        with torch.no_grad():
            wanted = program.module(*given)
            for kept in (0, -1):
                mixed = [other.clone() for other in others]
                for x, own in zip(mixed, given, strict=True):
                    x[kept] = own[kept]
                for node, one, other in zip(returned(program.graph), wanted, program.module(*mixed), strict=True):
                    dims = grown_dims(node, values)
                    if len(dims) == 1 and not equal(one.select(dims[0], kept), other.select(dims[0], kept), SAME):
                        return True
    except Exception:  # random numbers may be no indices
        return False
    return False


def grown_dims(node: Node, values: Mapping[Node, Value]) -> list[int]:
    """Finds the dims of a node's output that grow with the batch."""
    value = values.get(node)
    if not isinstance(value, Tensor):
        return []
    sizes = zip(node.meta["val"].shape, value.shape, strict=True)
    return [d for d, (old, new) in enumerate(sizes) if old != new]


def free_rows(program: Program) -> dict[Node, list[int]]:
    """Finds the dims of each input, state and result that are as long as there are boxes, of a step on one stream.

    Each state may have another number of them than the boxes of its step.

    Raises:
        UnsupportedError: An operator fixes how many boxes there are.
    """
    states = program.placeholders()[len(program.inputs) :]
    rows = {n for n, spec in zip(program.placeholders(), program.inputs, strict=False) if spec.boxes is not None}
    while True:
        few, many = (_with_rows(program, rows, count) for count in (3, 5))
        found = {
            n: [d for d, (a, b) in enumerate(zip(few[n].shape, many[n].shape, strict=True)) if a != b] for n in few
        }
        nexts = returned(program.graph)[len(program.outputs) :]
        more = {state for state, value in zip(states, nexts, strict=True) if found[value]} - rows
        if not more:
            return found
        rows |= more


def _with_rows(program: Program, rows: set[Node], count: int) -> dict[Node, Tensor]:
    """Makes the fake value of each input and result where there is one stream, and so many of what are rows."""
    values: dict[Node, Value] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            break
        value = node.meta["val"]
        if node.op == "placeholder":
            with fake_mode(program):
                values[node] = torch.empty(count if node in rows else 1, *value.shape[1:], dtype=value.dtype)
            continue
        try:
            with quiet():
                values[node] = _value(program, node, values)
        except Exception as error:  # whatever a meta kernel raises for sizes that do not fit
            raise UnsupportedError(
                "It fixes how many boxes there are.",
                **where(node),
                hint="Let it take any number of rows: x.flatten(1) or x.reshape(len(boxes), -1), for example.",
            ) from error
    wanted = [*program.placeholders(), *returned(program.graph)]
    return {n: value for n in wanted if isinstance(value := values[n], Tensor)}
