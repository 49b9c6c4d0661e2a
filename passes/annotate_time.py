"""Annotate time: attaches to every tensor where time is in it and how it flows, and decides what is a window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from torch.fx import Node

from co3d_compile.analysis.starts import separate, start_of
from co3d_compile.analysis.time_walk import Decisions, TimeWalk
from co3d_compile.errors import UnsupportedError, UsageError
from co3d_compile.ir.frame_loop import is_loop, loop_of
from co3d_compile.ir.graph_edits import insert_marker
from co3d_compile.ir.layout import TIME, Axis, Layout
from co3d_compile.ir.markers import hold, region
from co3d_compile.ir.node_reading import module_path, operator_name
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Fallback, Program, Region, bytes_of
from co3d_compile.ir.time_facts import KEY, Fact, Kind, fact_of, is_stream, own_of
from co3d_compile.rules import rule_for
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.edge_copies import begins


class AnnotateTime(Pass):
    """Gives every node a :class:`~co3d_compile.ir.time_facts.Fact`:

    1. inputs stream; each rule says how its operator's output flows from its operands;
    2. an operator with no extension beyond the clip, and all behind it, is a window;
    3. where a window result meets the stream again, the pools it comes from become gates (``pool_scope``), or slide
       like any other pool if as many entries as they took meet the stream (the last level of a U-Net over time);
    4. with ends, what an operator cannot read as early as it comes is marked to be held back (``edge_copies.py``);
    5. the pulse is the least that gives every tensor whole entries, or the multiple that was asked for.

    A walk over the graph only attaches facts and finds what must be decided. What is decided is data: when a walk adds
    nothing to it, the operators are marked that wait for their operands.
    """

    requires = frozenset({"canonical"})
    ensures = frozenset({"time"})

    def run(self, program: Program) -> bool:
        annotate_inputs(program)
        decisions = Decisions()
        while True:
            walk = TimeWalk(program, decisions)
            found = walk.run()
            if found == decisions:
                break
            write_again(program, found.written - decisions.written)
            decisions = separate_starts(program, found, found.starts - decisions.starts)
        for node, operands in walk.waiting.items():
            hold_back(program, node, operands)
        fix_pulse(program)
        report(program, walk.fallbacks)
        return True


def annotate_inputs(program: Program) -> None:
    """Says of each input how it flows, if the first one with time has ``window`` frames."""
    options = program.options
    timed = [(i, dim, i.shape[dim]) for i in program.inputs if (dim := i.time_dim) is not None]
    common = math.gcd(*(entries for _, _, entries in timed))
    spec, dim, first = timed[0]
    window = options.window or first
    if options.stride_mode == "dense" and len({entries for _, _, entries in timed}) > 1:
        raise UsageError(
            "stride_mode='dense' has no meaning for inputs at several rates.", hint="Use stride_mode='step'."
        )
    base = Fact(
        Kind.STREAM,
        dense=options.stride_mode == "dense",
        end=Fraction(0) if options.boundary == "exact" else None,
    )
    single = replace(base, pulse=Fraction(first, common), per_entry=True, pooled=(len(spec.shape) - dim, first, window))
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        layout = Layout.of(spec.shape, 0, spec.time_dim)
        if spec.time_dim is None:  # one value per step: it belongs to each entry
            layout = Layout(((*layout.dims[0], Axis(TIME, 1)), *layout.dims[1:]))
            node.meta[KEY] = replace(single, layout=layout)
            continue
        entries = spec.shape[spec.time_dim]
        if window * entries % first:
            raise UsageError(f"window={window} gives the input {spec.name} no whole number of entries.")
        node.meta[KEY] = replace(
            base,
            layout=layout,
            pulse=Fraction(entries, common),
            length=window * entries // first,
            rate=Fraction(first, entries),
        )


def write_again(program: Program, names: frozenset[str]) -> None:
    """Writes operators as the model has them, instead of in their canonical form."""
    for node in [n for n in program.graph.nodes if n.name in names]:
        program.originals.pop(node).write(node)


def separate_starts(program: Program, decisions: Decisions, names: frozenset[str]) -> Decisions:
    """Gives each of these concatenations a start of its own, and adds to the decisions what computes it."""
    firsts = decisions.firsts
    for node in [n for n in program.graph.nodes if n.name in names]:
        rule = rule_for(node.target)
        assert isinstance(rule, Concatenation)
        firsts |= separate(program, node, start_of(node, rule))
    return replace(decisions, firsts=firsts)


def hold_back(program: Program, node: Node, operands: Mapping[Node, Fact]) -> None:
    """Puts a marker in front of an operator for each operand that it cannot read as early as it comes."""
    for x, fact in operands.items():
        marker = insert_marker(program, node, hold, x, begins(node), like=x)
        marker.meta[KEY] = fact
        node.replace_input_with(x, marker)


def local_text(part: Region) -> str:
    """What is local, for people."""
    reads = f"each entry depends on {part.before} entries before it and {part.after} after it"
    return f"{part.operator} in {part.module_path or 'the model'}: has no rule, but is local in time ({reads})"


def own_reasons(program: Program, node: Node) -> list[str]:
    """Why a region that begins at an operator is not local, if that was looked at."""
    found = program.notes.not_local
    return [found[name] for name in program.names_of(node) if name in found][:1]


def fix_pulse(program: Program) -> None:
    """Makes a step as long as it must be for every tensor to have whole entries, or as was asked for."""
    annotated = [n for n in program.graph.nodes if KEY in n.meta]
    flowing = [f for n in annotated if is_stream(n) for f in [fact_of(n), *own_of(n).items]]
    factor = Fraction(math.lcm(*((f.pulse / f.own.block).denominator for f in flowing)))
    base = fact_of(first_timed(program)[0]).pulse * factor
    wanted = program.options.frames_per_step
    if wanted is not None:
        if wanted % base:
            raise UsageError(
                f"frames_per_step={wanted} gives some tensor no whole number of entries.",
                hint=f"Use {base} or a multiple of it.",
            )
        factor *= wanted // base
    for node in annotated:
        node.meta[KEY] = fact_of(node).scaled(factor)
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        spec.pulse = int(fact_of(node).pulse)


def first_timed(program: Program) -> tuple[Node, int]:
    """The first input that has time, and its frames."""
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        if spec.time_dim is not None:
            return node, spec.shape[spec.time_dim]
    raise AssertionError("a stream has frames")


def report(program: Program, fallbacks: list[tuple[Node, str]]) -> None:
    """Notes what falls back to a window, and what is a gate.

    Raises:
        UnsupportedError: Something falls back, and ``unsupported`` is ``"error"``.
    """
    regions = [n for n in program.graph.nodes if n.target is region]
    if (fallbacks or regions) and program.options.unsupported == "error":
        lines = [f"{operator_name(n.target)} in {module_path(n) or 'the model'}: {why}" for n, why in fallbacks]
        lines += [local_text(program.regions[str(n.args[1])]) for n in regions]
        raise UnsupportedError(
            "These operators have no extension beyond the clip: " + "; ".join(lines) + ".",
            hint="Without --unsupported error they are applied to a window of the newest entries, or to the few that "
            "what is local in time reads.",
        )
    for node, why in fallbacks:
        why = "; not local: ".join([why, *own_reasons(program, node)])
        values = [n.meta["val"] for n in node.all_input_nodes if is_stream(n)]
        size = sum(bytes_of(tuple(v.shape), v.dtype) for v in values if v.dim())
        program.notes.recomputed.append(Fallback(operator_name(node.target), module_path(node), why, size))
    program.notes.loops += [
        _loop_text(n) for n in program.graph.nodes if is_loop(n) and is_stream(n) and loop_of(n).states
    ]
    for node in program.graph.nodes:
        if scope := own_of(node).gate:
            program.notes.gates.append((module_path(node), scope))
            program.record(node, f"gate over one {scope}")
        elif fact_of(node).kind is Kind.WINDOW and node.op == "call_function":
            program.record(node, "on a window")
    wanted = program.options.window
    windows = any(fact_of(n).kind is Kind.WINDOW for n in program.graph.nodes)
    if windows or "window" in {scope for _, scope in program.notes.gates}:
        program.step.window = wanted or first_timed(program)[1]
    elif wanted is not None:
        program.notes.warnings.append("window has no effect: the model has no operator over the whole time axis.")


def _loop_text(node: Node) -> str:
    """What a loop over frames hands on, and for how long."""
    loop = loop_of(node)
    values = "1 value" if loop.states == 1 else f"{loop.states} values"
    if loop.memory is None:
        lasts = "and runs on for longer than a clip"
    else:
        lasts = f"forgotten after {loop.memory} {'turn' if loop.memory == 1 else 'turns'}"
    return f"in {module_path(node) or 'the model'}: {values} handed on, {lasts}"
