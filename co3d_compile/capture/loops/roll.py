"""Loops over frames, which are captured as one copy of their body per frame, as one operator each."""

from __future__ import annotations

import logging
import operator

import torch
from torch.fx import Node

from co3d_compile.capture.loops.copies import Copies, copies_of
from co3d_compile.capture.loops.extension import Extension, Values
from co3d_compile.capture.loops.first_turn import add_first_turn
from co3d_compile.capture.loops.results import join_results
from co3d_compile.capture.loops.starts import take_starts_from_streams
from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import Run, Tokens, is_constant, runs
from co3d_compile.capture.loops.writer import LoopWriter
from co3d_compile.ir.aten_operators import CHECKS, SAME, SIZED
from co3d_compile.ir.graph_edits import erase_dead
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.program import Program

log = logging.getLogger(__name__)
aten = torch.ops.aten
FEWEST = 2  # copies that lie one behind the other
MOVES = {*SIZED, *SAME, aten.repeat.default}
RUNS = 40  # of tokens that are looked at for each loop


def roll_loops(program: Program, ends: bool = False) -> None:
    """Rewrites ``for t in range(T): h = cell(x[:, t], h); out.append(h)`` to one operator, :class:`FrameLoop`.

    Copies are found by what they are: the same operators again and again, which read the same, or what the copy before
    has computed, or frames at indices that walk. Whatever the loop looks like in Python is gone by then.

    Args:
        program: As captured.
        ends: Whether the first or last results may be computed in another way, where nothing is handed on.
    """
    tidy(program)
    while _one(program, ends):
        tidy(program)
    erase_dead(program.graph)


def _one(program: Program, ends: bool) -> bool:
    """Writes one loop as an operator; says whether there was one."""
    times = TimeDims(program)
    try:
        tokens = Tokens(program)
        found = runs(tokens.ids, FEWEST)[:RUNS]
        values = Values(tokens)
        for with_state in (True, False):
            for run in found:
                writers: list[LoopWriter] = []
                for copies in _ways(values, run):
                    if not with_state and any(walk.step > 1 for walk in copies.walks.values()):
                        continue  # parts of a clip that hand nothing on may be as many for any clip: heads of halves
                    writers.append(LoopWriter(program, copies, times))
                    if writers[-1].write(with_state, ends):
                        return True
                if with_state and (_with_first_turn(program, writers, times) or _by_core(values, writers, times)):
                    return True
    finally:
        times.forget()
    return False


def _ways(values: Values, run: Run) -> list[Copies]:
    """Lists the loops that a run of tokens may be, those with most operators first."""
    ways = list(copies_of(values.tokens, run))
    for copies in ways:
        Extension(values, copies).run()
    return sorted(ways, key=lambda c: (-sum(map(len, c.turns)), len(c.starts)))


def _with_first_turn(program: Program, writers: list[LoopWriter], times: TimeDims) -> bool:
    """Writes a loop whose first turn was captured as other operators, of which least is read; says whether one was."""
    late = [w for w in sorted(writers, key=lambda w: len(w.outputs)) if w.begins_late]
    for whole in (True, False):
        for writer in late:
            if add_first_turn(program, writer.signature, writer.outputs, whole):
                return LoopWriter(program, writer.copies, times).write(with_state=True)
    for writer in sorted(late, key=lambda w: len(w.copies.turns[-1]) < len(w.copies.body)):  # whole turns, if there are
        if take_starts_from_streams(program, writer.copies, writer.signature.states, times):
            return LoopWriter(program, writer.copies, TimeDims(program), pieces=True).write(with_state=True)
    return False


def _by_core(values: Values, writers: list[LoopWriter], times: TimeDims) -> bool:
    """Writes a loop without what only reads the values that it hands on; says whether one was."""
    for writer in writers:
        core = writer.copies.core() if writer.begins_late else None
        if core is not None:
            Extension(values, core).run()
            if LoopWriter(values.tokens.program, core, times).write(with_state=True):
                return True
    return False


def tidy(program: Program) -> None:
    """Takes out what stands between copies: assertions, constants, and results that are joined one by one."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in CHECKS:
            graph.erase_node(node)
    _fill_at_once(program)
    first = next((n for n in graph.nodes if n.op == "call_function"), None)
    for node in [n for n in graph.nodes if is_constant(n) and n is not first]:
        assert first is not None
        first.prepend(node)
    join_results(program)
    erase_dead(program.graph)
    _read_same_results(program)


def _read_same_results(program: Program) -> None:
    """Reads the same results of all layers of one kind: nothing reads the last ``h`` of ``y, h = gru(x, h)``."""
    graph = program.graph
    layers: dict[object, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], (tuple, list)):
            layers.setdefault((node.target, str(node.meta["val"])), []).append(node)
    for alike in layers.values():
        results = [{user.args[1]: user for user in node.users if user.target is operator.getitem} for node in alike]
        for node, there in zip(alike, results, strict=True):
            for index in sorted({i for read in results for i in read}, reverse=True):  # type: ignore[type-var]
                if index in there:
                    node.append(there[index])
                    continue
                with graph.inserting_after(node):
                    new = graph.call_function(operator.getitem, (node, index))
                new.meta = {**node.meta, "val": node.meta["val"][index]}


def _fill_at_once(program: Program) -> None:
    """Rewrites ``full([1, 4], 0).expand(2, 4)`` to ``full([2, 4], 0)``, as files from elsewhere make first states."""
    made: set[Node] = set()
    for node in list(program.graph.nodes):
        if node.target is aten.full.default:
            made.add(node)
        elif node.target in MOVES and operand(node) in made:
            _, number, *_ = operand(node).args
            with program.graph.inserting_before(operand(node)):
                new = program.graph.call_function(aten.full.default, ([*shape_of(node)], number))
            new.kwargs, new.meta = operand(node).kwargs, node.meta
            node.replace_all_uses_with(new)
            made.add(new)
