"""States whose first values are computed from a frame, by operators that the turns of their loop do not have.

For example, in ``h = f(x[0]); for t in range(1, T): h = cell(x[t], h)`` the first state is entry 0 of ``f`` on all
frames. So it is an entry of a stream, as in a loop that begins with a frame itself.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.capture.loops.copies import Copies
from co3d_compile.capture.loops.first_turn import TOLERANCE, drawn_values
from co3d_compile.capture.loops.frames_at_once import rolled
from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import Take, frame_of
from co3d_compile.ir.graph_edits import erase_unused, insert
from co3d_compile.ir.graph_walks import in_order
from co3d_compile.ir.node_reading import operands, shape_of
from co3d_compile.ir.operator_arguments import filling_like
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal

aten = torch.ops.aten
MOST = 4_000  # operators that are written for a moment, one set for each frame


def take_starts_from_streams(program: Program, copies: Copies, states: list[tuple[int, int]], times: TimeDims) -> bool:
    """Makes each start that is computed from a frame an entry of the same function of all frames.

    Args:
        program: Has the copies.
        copies: Of the loop; their starts are replaced.
        states: The values that the loop hands on: an operator of the body, and over how many turns.
        times: Where time is in the program.

    Returns:
        Whether there was such a start, and all of them are entries now.
    """
    starts = {key: copies.starts[key] for key in states if copies.starts.get(key) in times.timed}
    starts = {key: node for key, node in starts.items() if frame_of(node) is None and filling_like(node) is None}
    if not starts or not copies.recurrent():
        return False  # nothing but pieces of a turn that are read by the next ones
    functions = {start: _FrameFunction.of(start, times) for start in starts.values()}
    entries: dict[Node, Node] = {}
    for start, function in functions.items():
        entry = function.on_all_frames(program, start) if function is not None else None
        if entry is None:
            for made in entries.values():
                erase_unused(made)
            return False
        entries[start] = entry
    for start, entry in entries.items():
        start.replace_all_uses_with(entry)
    copies.starts |= {key: entries[start] for key, start in starts.items()}
    return True


def is_of_first_frame(node: Node, times: TimeDims) -> bool:
    """Says whether a node is computed from the first frame alone, as what each turn compares its frame with."""
    function = _FrameFunction.of(node, times)
    return function is not None and all(t.start == 0 for t in function.frames.values())


class _FrameFunction:
    """What is computed from one frame.

    Args:
        nodes: The operators behind the selection of the frame, in their order.
        frames: The selections of the frame, of one tensor or of several.
    """

    def __init__(self, nodes: list[Node], frames: dict[Node, Take]) -> None:
        self.nodes, self.frames = nodes, frames

    @classmethod
    def of(cls, result: Node, times: TimeDims) -> _FrameFunction | None:
        """Finds the function that a node is of frame i of all that it reads; None where it reads more than that."""
        nodes: list[Node] = []
        frames: dict[Node, Take] = {}

        def read(node: Node) -> list[Node]:
            return [] if _selected(node, times) else [n for n in operands(node) if n in times.timed]

        for node in in_order([result], read):
            take = _selected(node, times)
            if take is not None:
                frames[node] = take
            elif node.op != "call_function":
                return None
            else:
                nodes.append(node)
        return cls(nodes, frames) if len({t.start for t in frames.values()}) == 1 else None

    def on_all_frames(self, program: Program, result: Node) -> Node | None:
        """Writes the result as an entry of the function on all frames; None where it cannot be written so."""
        sizes = {shape_of(t.root)[t.dim] for t in self.frames.values()}
        if len(sizes) > 1 or max(sizes) * len(self.nodes) > MOST:
            return None
        (at,) = {t.start for t in self.frames.values()}
        copies = [self._copied(program, result, i) for i in range(sizes.pop())]
        rows = [insert(program, result, aten.unsqueeze.default, c, 1) for c in copies]
        joined = insert(program, result, aten.cat.default, rows, 1)
        times = TimeDims(program)
        stream = rolled(program, joined, times)
        times.forget()
        erase_unused(joined)
        if stream is None:
            return None
        entry = insert(program, result.next, aten.select.int, stream, 1, at)
        values = drawn_values([result, entry], program, torch.randn)
        if equal(values[result], values[entry], TOLERANCE):
            return entry
        erase_unused(entry)  # something is computed over the batch, into which the frames are folded
        return None

    def _copied(self, program: Program, before: Node, index: int) -> Node:
        """Writes the function of one frame once more."""
        values = {
            node: insert(program, before, aten.select.int, take.root, take.dim, index)
            for node, take in self.frames.items()
        }
        for node in self.nodes:
            with program.graph.inserting_before(before):
                values[node] = program.graph.node_copy(node, lambda n: values.get(n, n))
        return values[self.nodes[-1]]


def _selected(node: Node, times: TimeDims) -> Take | None:
    """The frame that a node is, if it is one."""
    take = frame_of(node)
    return take if take is not None and take.length is None and times.is_time(take.root, take.dim) else None
