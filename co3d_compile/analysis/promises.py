"""What passes promise, as checks that look at the program: a pass that says what is not so is named.

Each check says the first thing that does not hold, or None. They run with ``--dump``, and in every test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Node

from co3d_compile.analysis.window_groups import meeting_windows, newest
from co3d_compile.ir.aten_operators import BATCH_NORMS, CHECKS, SAME, VIEWS
from co3d_compile.ir.markers import (
    MARKERS,
    begin,
    carry,
    counter,
    fifo,
    history,
    hold,
    previous,
    store,
    take,
    window,
)
from co3d_compile.ir.node_reading import operand, place_of, returned, shape_of, whole
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, fact_of, is_start, is_stream, is_window, kernel_of, own_of
from co3d_compile.rules import rule_for
from co3d_compile.rules.conv import Convolution
from co3d_compile.rules.pool import Pool

Check = Callable[[Program], "str | None"]
always = False  # whether every compilation checks them: set by the tests
STATES = {previous, fifo, carry, counter}


def calls(program: Program) -> Iterator[Node]:
    """Lists the operators of the graph."""
    return (n for n in program.graph.nodes if n.op == "call_function")


def named(node: Node) -> str:
    """Names a node for people."""
    return f"{node.name} ({place_of(node)})"


def canonical(program: Program) -> str | None:
    """Finds an operator that computes nothing, or a second way to write a view."""
    for n in calls(program):
        if n.target in SAME | CHECKS | VIEWS:
            return f"{named(n)} has no canonical form"
    return None


def no_batch_norm(program: Program) -> str | None:
    """Finds a batch norm that is left."""
    return next((f"{named(n)} is there" for n in calls(program) if n.target in BATCH_NORMS), None)


def time(program: Program) -> str | None:
    """Finds a tensor without a fact, or one that streams without whole entries and a known layout."""
    for n in program.graph.nodes:
        if n.op in ("placeholder", "call_function") and KEY not in n.meta:
            return f"{named(n)} has no fact"
        if is_stream(n):
            fact = fact_of(n)
            if fact.layout is None and not isinstance(n.meta["val"], (tuple, list)):
                return f"{named(n)} streams, and where time is in it is not known"
            if fact.pulse.denominator != 1 or fact.pulse < 1:
                return f"{named(n)} has {fact.pulse} entries per step"
    return None


def joined(program: Program) -> str | None:
    """Finds what is computed from the first entries alone, and meets a stream without a marker."""
    met = (
        n for n in filter(is_stream, calls(program)) if n.target is not begin and any(map(is_start, n.all_input_nodes))
    )
    return next((f"{named(n)} reads first entries and is no marker" for n in met), None)


def unpadded(program: Program) -> str | None:
    """Finds a convolution or pool over a stream that is padded over time, or has no index equation."""
    for n in filter(is_stream, calls(program)):
        rule = rule_for(n.target)
        kernel = rule.kernel(n) if isinstance(rule, (Convolution, Pool)) else None
        if kernel is None:
            continue
        if kernel.p or kernel.p_end:
            return f"{named(n)} has temporal padding"
        if not kernel.trivial and own_of(n).slides is None:
            return f"{named(n)} has lost its index equation"
    return None


def continual(program: Program) -> str | None:
    """Finds what slides over time and reads other entries than its new ones need, or still waits by a marker."""
    for n in filter(is_stream, calls(program)):
        if n.target is hold:
            return f"{named(n)} is still a marker"
        if isinstance(rule_for(n.target), (Convolution, Pool)) and own_of(n).slides is not None:
            kernel = kernel_of(n)
            needed = (int(fact_of(n).pulse) - 1) * kernel.s + (kernel.k - 1) * kernel.d + 1
            if entries(operand(n)) != needed:
                return f"{named(n)} reads {entries(operand(n))} entries and needs {needed}"
    return None


def entries(x: Node) -> int:
    """Counts the entries of a streaming tensor that there are in a step, past ones among them."""
    if x.target is take:
        return whole(x, 2)
    if x.target is history:
        return whole(x, 1) + entries(operand(x))
    return int(fact_of(x).pulse)


def windowed(program: Program) -> str | None:
    """Finds what is computed on a window, and reads a stream without a window marker."""
    for n in filter(is_window, calls(program)):
        for x in n.all_input_nodes:
            if is_stream(x) and x.target is not window:
                return f"{named(n)} is computed on a window and reads the stream {x.name}"
    return None


def aligned(program: Program) -> str | None:
    """Finds operands of an operator with several delays, or windows whose results meet and start at several frames."""
    for n in filter(is_stream, calls(program)):
        delays = {fact_of(x).delay for x in n.all_input_nodes if is_stream(x)}
        if len(delays) > 1:
            return f"the operands of {named(n)} have the delays {sorted(delays)}"
    for group in meeting_windows(program):
        starts = {(newest(m) + fact_of(operand(m)).crop, fact_of(operand(m))) for m in group}
        lags = {(late + (f.length - 1) * f.spacing + 1) * f.rate for late, f in starts}
        if len(lags) > 1:
            return f"windows that meet, {', '.join(m.name for m in group)}, start at different frames"
    return None


def ends(program: Program) -> str | None:
    """Finds, with both ends, that there is no input for them, or an output that begins before the first frame."""
    if program.options.boundary != "exact":
        return None
    if program.step.valid is None:
        return "no input says which frames are there"
    early = next((n for n in returned(program.graph) if is_stream(n) and fact_of(n).delay < 0), None)
    return f"the output {early.name} begins before the first frame" if early is not None else None


def lowered(program: Program) -> str | None:
    """Finds a marker of the clip graph that is left, an input with a time dim of one, or a state without a store."""
    stored = [n.args[0] for n in calls(program) if n.target is store]
    for n in calls(program):
        if n.target in (*MARKERS, hold):
            return f"{named(n)} is still a marker"
        if n.target in (carry, counter) and stored.count(n) != 1:
            return f"{named(n)} is a state that {stored.count(n)} nodes store"
    for n, spec in zip(program.placeholders(), program.inputs, strict=False):
        if shape_of(n)[1:] != tuple(spec.step_shape[1:]):
            return f"the input {n.name} has the shape {shape_of(n)} instead of {tuple(spec.step_shape)}"
    return None


def threaded(program: Program) -> str | None:
    """Finds a state that is not both an input and an output, or something else that remembers."""
    left = next((n for n in calls(program) if n.target in STATES | {store}), None)
    if left is not None:
        return f"{named(left)} is still a marker"
    inputs = len(program.inputs) + (program.step.valid is not None) + len(program.step.states)
    if len(program.placeholders()) != inputs:
        return f"there are {len(program.placeholders())} inputs instead of {inputs}"
    outputs, given = len(program.outputs) + len(program.step.states), len(returned(program.graph))
    return f"there are {given} outputs instead of {outputs}" if given != outputs else None


PROMISES: dict[str, Check] = {
    check.__name__: check
    for check in (
        canonical,
        no_batch_norm,
        time,
        joined,
        unpadded,
        continual,
        windowed,
        aligned,
        ends,
        lowered,
        threaded,
    )
}
