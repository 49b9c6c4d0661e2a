"""Annotates a program: every tensor gets the fact that says where time is in it and how it flows.

A walk over the graph only attaches facts and finds what must be decided. What is decided is data: when a walk adds
nothing to it, the operators are marked that wait for their operands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.analysis.operator_families import GATHERS, SCATTERS, name_of
from co3d_compile.analysis.reflected_starts import write_reflections
from co3d_compile.analysis.regrouping import KEPT, Regrouping, split_views
from co3d_compile.analysis.starts import separate, start_of
from co3d_compile.analysis.streamed_crops import streamed_crops
from co3d_compile.analysis.time_walk import Decisions, TimeWalk
from co3d_compile.errors import UsageError
from co3d_compile.ir.aten_operators import part_taken
from co3d_compile.ir.graph_edits import insert_marker
from co3d_compile.ir.graph_walks import computed_from, reached
from co3d_compile.ir.layout import TIME, Axis, Layout
from co3d_compile.ir.markers import blocks, hold, kept, unblocked
from co3d_compile.ir.node_reading import operand, operands, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, Fact, Kind, constant_of, fact_of, is_start, is_stream, is_window, own_of
from co3d_compile.rules import rule_for
from co3d_compile.rules.base import no_dense_form
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.edge_copies import begins
from co3d_compile.rules.pointwise import Pointwise, counts_on
from co3d_compile.rules.remembering import remembered, remembers_all

aten = torch.ops.aten


def annotate(program: Program) -> list[tuple[Node, str]]:
    """Attaches the facts; returns the nodes that are applied to a window, and why.

    Raises:
        UsageError: An option has no meaning for the model's inputs or rates.
        UnsupportedError: Results have no dense form.
    """
    annotate_inputs(program)
    given = Decisions()
    walk = TimeWalk(program, given)
    while True:
        found = walk.run()
        if found == given and write_reflections(program):
            walk = TimeWalk(program, given)
            continue
        if found == given:
            found = replace(given, late=given.late | late_starts(program))
        if found == given:
            break
        write_again(program, found.written - given.written)
        regroup(program, found.regrouped - given.regrouped)
        decisions = separate_starts(program, found, found.starts - given.starts)
        walk, given = walk.next(given, decisions), decisions
    for node, waiting in walk.waiting.items():
        hold_back(program, node, waiting)
    refuse_blocks(program)
    fix_pulse(program)
    program.notes.split_views = split_views(program)
    program.notes.goes_on = going_on(program)
    program.notes.remembers = frozenset(
        name for n in program.graph.nodes if remembers_all(n) for name in program.names_of(n)
    )
    program.notes.crops = cropped(program)
    program.notes.streamed_crops = streamed_crops(program)
    return walk.fallbacks


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
    boxes = next((i.name for i in program.inputs if i.boxes is not None), None)
    if boxes is not None and options.boundary == "exact":
        what = f"boundary='exact' has no meaning for the input {boxes}: which boxes lie beyond an end is not known."
        raise UsageError(what, hint="Use boundary='stream'.")
    base = Fact(
        Kind.STREAM,
        dense=options.stride_mode == "dense",
        end=Fraction(0) if options.boundary == "exact" else None,
        frames=first,
    )
    single = replace(base, pulse=Fraction(first, common), per_entry=True, pooled=(len(spec.shape) - dim, first, window))
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        layout = Layout.of(spec.shape, 0, spec.time_dim)
        if spec.time_dim is None:  # one value per step: it belongs to each entry
            if layout.rank == 0:
                raise UsageError(
                    f"The input {spec.name} is a single number, without a dim for the batch.",
                    hint="Write the number into the model before it is compiled.",
                )
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


def regroup(program: Program, regrouped: frozenset[Regrouping]) -> None:
    """Makes one entry of several, several of one, or the first one that of all, in front of what reads time so."""
    nodes = {n.name: n for n in program.graph.nodes}
    for reader, name, steps in sorted(regrouped):
        node, x = nodes[reader], nodes[name]
        for k in steps:
            marker = insert_marker(program, node, *_regrouped(program, x, k), like=x)
            node.replace_input_with(x, marker)
            x = marker
            if k == KEPT:
                program.record(node, "reads the first entry for ever")


def _regrouped(program: Program, x: Node, k: int) -> tuple[Any, ...]:
    """The marker of one regrouping, and its arguments."""
    if k == KEPT:
        selected = x.target is aten.select.int
        return kept, operand(x), Arguments(x).dim(operand(x)), selected, program.names_of(x)
    return (blocks, x, k) if k else (unblocked, x)


def separate_starts(program: Program, decisions: Decisions, names: frozenset[str]) -> Decisions:
    """Gives each of these concatenations a start of its own, and adds to the decisions what computes it."""
    firsts = decisions.firsts
    for node in [n for n in program.graph.nodes if n.name in names]:
        rule = rule_for(node.target)
        assert isinstance(rule, Concatenation)
        firsts |= separate(program, node, start_of(node, rule))
    return replace(decisions, firsts=firsts)


def late_starts(program: Program) -> frozenset[str]:
    """Names the streams that wait for a start of their own: with ends, or if something remembers it."""
    exact = program.options.boundary == "exact"
    nodes = program.graph.nodes if exact else remembered(program.graph)
    return frozenset(n.name for n in nodes if is_stream(n) and any(map(is_start, n.all_input_nodes)))


def hold_back(program: Program, node: Node, operands: Mapping[Node, Fact]) -> None:
    """Puts a marker in front of an operator for each operand that it cannot read as early as it comes."""
    for x, fact in operands.items():
        marker = insert_marker(program, node, hold, x, begins(node), like=x)
        marker.meta[KEY] = fact
        node.replace_input_with(x, marker)


def going_on(program: Program) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Gives the captured constants of streams that go on beyond the clip, with the dims that grow, and their values.

    Of numbers that say at which places a window reads entries no dim grows: they are places in the window.
    """
    captured = set(program.notes.captured)
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for node in filter(is_stream, program.graph.nodes):
        layout, pointwise = fact_of(node).layout, isinstance(rule_for(node.target), Pointwise)
        for x in node.all_input_nodes:
            line = constant_of(x).progression
            if pointwise and line is not None and layout is not None and counts_on(x, layout):
                dims: tuple[int, ...] = () if _says_where(program, node) else (line[0],)
            elif not pointwise and constant_of(x).band is not None:
                dims = (-2, -1)
            else:
                continue
            found.update({name: (dims, program.constant(x)) for name in program.names_of(x) if name in captured})
    return found


def _says_where(program: Program, node: Node) -> bool:
    """Says whether a window reads or writes entries at places that are computed from a node."""
    readers = (n for n in program.graph.nodes if is_window(n) and name_of(n) in {*GATHERS, *SCATTERS})
    return any(node in computed_from(*operands(n)[1:]) for n in readers)


def cropped(program: Program) -> dict[str, tuple[int, int, int]]:
    """Gives the captured slices and selections over time where ``window`` is another length than the clip's."""
    captured = set(program.notes.captured)
    found: dict[str, tuple[int, int, int]] = {}
    for node in program.graph.nodes:
        part = part_taken(node) if node.users else None
        if part is None:
            continue
        x, dim, start, end = part
        place, size = fact_of(x).time, shape_of(x)[dim]
        if place is not None and place.alone and place.dim == dim and fact_of(x).length != place.size:
            found.update({name: (start, end, size) for name in program.names_of(node) if name in captured})
    return found


def refuse_blocks(program: Program) -> None:
    """Refuses results that are put together from blocks of time where strides are dense.

    Clips that start at each frame have other blocks each.

    Raises:
        UnsupportedError: There is one.
    """
    for node in filter(is_stream, program.graph.output_node().all_input_nodes):
        place = fact_of(node).time if fact_of(node).dense else None
        if place is not None and place.inner > 1 and any(n.target is blocks for n in reached([node], operands)):
            raise no_dense_form(f"Giving {place.inner} entries for one", node)


def fix_pulse(program: Program) -> None:
    """Makes a step as long as it must be for every tensor to have whole entries, or as was asked for."""
    annotated = [n for n in program.graph.nodes if KEY in n.meta]
    flowing = [f for n in annotated if is_stream(n) for f in [fact_of(n), *own_of(n).items]]
    factor = Fraction(math.lcm(*((f.pulse / f.own.block).denominator for f in flowing)))
    base = fact_of(program.first_timed()[0]).pulse * factor
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
