"""Annotate time: attaches to every tensor where time is in it and how it flows, and decides what is a window."""

from __future__ import annotations

from torch.fx import Node

from co3d_compile.analysis.annotation import annotate
from co3d_compile.errors import without_extension
from co3d_compile.ir.found_parts import Region
from co3d_compile.ir.frame_loop import is_loop, loop_of
from co3d_compile.ir.markers import region
from co3d_compile.ir.node_reading import module_path, operator_name, place_of
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Fallback, Program, bytes_of
from co3d_compile.ir.time_facts import Kind, fact_of, is_stream, own_of


class AnnotateTime(Pass):
    """Gives every node a :class:`~co3d_compile.ir.time_facts.Fact`:

    1. inputs stream; each rule says how its operator's output flows from its operands;
    2. an operator with no extension beyond the clip, and all behind it, is a window;
    3. where a window result meets the stream again, the pools it comes from become gates (``pool_scope``), or slide
       like any other pool if as many entries as they took meet the stream (the last level of a U-Net over time);
    4. with ends, what an operator cannot read as early as it comes is marked to be delayed (``edge_copies.py``);
    5. the pulse is the least that gives every tensor whole entries, or the multiple that was asked for.
    """

    requires = frozenset({"canonical"})
    ensures = frozenset({"time"})

    def run(self, program: Program) -> bool:
        report(program, annotate(program))
        return True


def local_text(part: Region) -> str:
    """Says what is local, for people."""
    reads = f"each entry depends on {part.before} entries before it and {part.after} after it"
    return f"{part.operator} in {part.module_path or 'the model'}: has no rule, but is local in time ({reads})"


def own_reasons(program: Program, node: Node) -> list[str]:
    """Says why a region that begins at an operator is not local, if that was looked at."""
    found = program.notes.not_local
    return [found[name] for name in program.names_of(node) if name in found][:1]


def report(program: Program, fallbacks: list[tuple[Node, str]]) -> None:
    """Notes what falls back to a window, and what is a gate.

    Raises:
        UnsupportedError: Something falls back, and ``unsupported`` is ``"error"``.
    """
    regions = [n for n in program.graph.nodes if n.target is region]
    if (fallbacks or regions) and program.options.unsupported == "error":
        lines = [f"{place_of(n)}: {why}" for n, why in fallbacks]
        lines += [local_text(program.regions[str(n.args[1])]) for n in regions]
        raise without_extension(
            lines,
            "Without --unsupported error they are applied to a window of the newest entries, or to the few that "
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
        program.step.window = wanted or program.first_timed()[1]
    elif wanted is not None:
        program.notes.warnings.append("window has no effect: the model has no operator over the whole time axis.")


def _loop_text(node: Node) -> str:
    """Lists what a loop over frames hands on, and for how long."""
    loop = loop_of(node)
    values = "1 value" if loop.states == 1 else f"{loop.states} values"
    if loop.memory is None:
        lasts = "and runs on for longer than a clip"
    else:
        lasts = f"forgotten after {loop.memory} {'turn' if loop.memory == 1 else 'turns'}"
    return f"in {module_path(node) or 'the model'}: {values} handed on, {lasts}"
