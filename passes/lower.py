"""Lower: time leaves the graph. Each entry is a tensor of its own, and a 3D network becomes an image network."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.analysis.multiply_adds import region_costs
from co3d_compile.analysis.operator_survey import survey
from co3d_compile.analysis.receptive_field import dependences
from co3d_compile.analysis.repeated_frames import note_repeated_frames
from co3d_compile.analysis.single_entry_results import follow, pool, restore
from co3d_compile.analysis.window_groups import newest, windows_of
from co3d_compile.errors import Co3dError, UnsupportedError, first_line
from co3d_compile.ir.found_parts import RegionRun
from co3d_compile.ir.graph_edits import erase_dead
from co3d_compile.ir.layout import BATCH, Place
from co3d_compile.ir.markers import MARKERS, history, outside, region, shift, take, undelayed, window
from co3d_compile.ir.node_reading import module_path, operand, returned, shape_of, where, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Input, Output, Program
from co3d_compile.ir.stored_constants import delete_unused_constants, module_of
from co3d_compile.ir.time_facts import Kind, fact_of, is_start, is_stream, is_window, own_of
from co3d_compile.rules import rule_for, rule_of
from co3d_compile.rules.failures import blaming
from co3d_compile.rules.local_region import least_frames, pasts, run_entries
from co3d_compile.rules.remembering import remembered
from co3d_compile.step_graph.past_entries import ChosenEntries
from co3d_compile.step_graph.step_graph import StepGraph
from co3d_compile.step_graph.stream_ends import StreamEnds

aten = torch.ops.aten


class Lower(Pass):
    """Writes the step graph. A streaming tensor becomes a list of its entries, time taken out of each:

    1. ``conv3d`` on a history to ``conv2d``: on the channels of its taps, or one per tap, or partial sums as states;
    2. ``history`` to the values of earlier steps (``previous``), or a queue where entries are small (``fifo``);
    3. ``window`` to the newest entries as one clip; what follows stays as it is.

    Where several entries come per step the model's own inputs and outputs keep their time dim.
    """

    requires = frozenset({"time", "continual", "windowed", "aligned"})
    ensures = frozenset({"lowered"})
    breaks = frozenset({"time"})

    def run(self, program: Program) -> bool:
        program.notes.survey = survey(program)
        low = StepGraph(program)
        for node in program.graph.nodes:
            if node.target is history:
                low.capacity(operand(node), int(node.args[1]))
            elif node.target is window:
                source, delay = undelayed(operand(node))
                fact = fact_of(operand(node))
                low.capacity(source, delay + max(0, (fact.length - 1) * fact.spacing + 1 - int(fact.pulse)))
            elif node.target is region:
                for x, past in pasts(node, program):
                    source, delay = undelayed(x)
                    low.capacity(source, delay + past)
        self._regions(program)
        for node, spec in zip(program.placeholders(), program.inputs, strict=True):
            self._input(low, node, spec)
        if program.step.valid is not None:
            low.ends = StreamEnds(low, program.step.valid, program.inputs[0].pulse)
        low.for_good = frozenset(remembered(program.graph))
        for node in program.graph.nodes:
            low.path = module_path(node)
            if node.op == "call_function":
                with blaming(program, node):
                    self._node(low, node)
        singles = {n: entries[len(entries) - 1] for n, entries in low.streams.items() if fact_of(n).single}
        windows = {n: result for n, result in low.windows.items() if isinstance(result, Node)}
        note_repeated_frames(program, {**windows, **singles})
        self._outputs(low, program)
        self._holders(low, program)
        program.module = module_of(program.module, low.graph)
        erase_dead(program.graph)
        delete_unused_constants(program.module)
        return True

    def _regions(self, program: Program) -> None:
        """Notes on how many entries each region runs, and what that costs."""
        for node in program.graph.nodes:
            if node.target is region:
                part, entries = program.regions[str(node.args[1])], run_entries(node, program)
                costs, least = region_costs(part.captures, entries), least_frames(node, program)
                program.notes.regions.append(RegionRun(part, entries, costs, least))
                program.record(node, f"local in time: run on {entries} entries")

    def _input(self, low: StepGraph, node: Node, spec: Input) -> None:
        """Writes a model input: at one entry per step without its time dim."""
        new = low.graph.placeholder(node.name)
        if spec.boxes is not None:
            low.boxes.add(new)
        new.meta["val"] = low.empty(spec.step_shape, node.meta["val"].dtype)
        if spec.time_dim is not None and spec.pulse > 1:
            low.streams[node] = [low.call(aten.select.int, new, spec.time_dim, i) for i in range(spec.pulse)]
        else:
            low.streams[node] = [new] * int(fact_of(node).pulse)

    def _node(self, low: StepGraph, node: Node) -> None:
        if node.target is window:
            low.window_entries[node] = self._window(low, node)
        elif node.target in (history, take, shift, outside):
            low.streams[node] = self._marker(low, node)
        elif is_stream(node):
            self._stream(low, node)
        elif is_start(node) or (is_window(node) and not pool(low, node) and not follow(low, node)):
            self._on_window(low, node)

    def _holders(self, low: StepGraph, program: Program) -> None:
        """Notes which nodes of the step graph hold the entries of which results."""
        for node in program.graph.nodes:
            if node.target in MARKERS or node.op != "call_function":
                continue
            entries = low.streams.get(node, [low.windows[node]] if node in low.windows else [])
            for i, entry in enumerate(entries if isinstance(entries, list) else []):
                if isinstance(entry, Node):
                    holder, place = _holder(low, entry)
                    program.notes.holders.setdefault(holder, []).append((node.name, i, place))

    def _marker(self, low: StepGraph, node: Node) -> Any:
        x = operand(node)
        if node.target is shift:
            return low.streams[x]
        if node.target is outside:
            return low.start.mark(node)
        if node.target is history:
            return low.past(low.streams[x], whole(node, 1), x, fact_of(x).layout)
        start, step = whole(node, 1), Arguments(node).integer("step")
        return ChosenEntries(low.streams[x], [start + i * step for i in range(whole(node, 2))])

    def _window(self, low: StepGraph, node: Node) -> list[Any]:
        """Takes the newest entries, one clip of them."""
        x = operand(node)
        fact = fact_of(x)
        back = (fact.length - 1) * fact.spacing
        entries = low.with_past(x, max(0, back + 1 - len(low.streams[x])))
        newest = len(entries) - 1
        return [entries[newest - (fact.length - 1 - i) * fact.spacing] for i in range(fact.length)]

    def _stream(self, low: StepGraph, node: Node) -> None:
        rule = rule_for(node.target)
        assert rule is not None
        if isinstance(node.meta["val"], (tuple, list)):
            return
        if own_of(node).gate == "window":
            fact = fact_of(operand(node))
            low.streams[node] = rule.over_newest(node, low, (fact.length - 1) * fact.spacing, fact.spacing)
        else:
            low.streams[node] = rule.lower(node, low)
        _check_entries(node, low.streams[node])

    def _on_window(self, low: StepGraph, node: Node) -> None:
        rule, longer = rule_of(node), low.program.options.window
        try:
            low.windows[node] = rule.window(node, low) if rule is not None else low.same(node)
        except Co3dError:
            raise
        except Exception as error:
            if rule is not None and longer is None:
                raise  # what the clip's own length breaks is the rule
            way_out = f"Compile with a clip of {longer} frames in place of window={longer}, or leave window out."
            hint = way_out if longer else "Please report this operator."
            what = f"does not accept a window of {longer} frames" if longer else "cannot be applied to a window"
            raise UnsupportedError(
                f"An operator {what}: {first_line(error)}",
                **where(node),
                hint=hint,
            ) from error

    def _outputs(self, low: StepGraph, program: Program) -> None:
        results = []
        parts: list[Node] = []
        for spec, node in zip(program.outputs, returned(program.graph), strict=True):
            restore(low, node)
            fact, windows = fact_of(node), windows_of(node, low.window_fact)
            spec.dtype = node.meta["val"].dtype
            spec.delay, spec.pulse, spec.time_dim, spec.rate = fact.told, 1, None, fact.rate
            if fact.kind is Kind.STREAM:
                result = self._stream_output(low, node, spec)
                timed = spec.time_dim is not None
                parts += [low.entry(node, i) for i in range(low.pulse(node))] if timed else [result]
            elif fact.kind is Kind.WINDOW:
                result = low.plain(node)
                parts.append(result)
                delays = [(newest(m), fact_of(operand(m)).rate) for m in windows]
                spec.delay, spec.rate = min(delays, default=(0, Fraction(1)))
                if fact.layout is not None and fact.layout.time is not None and fact.layout.time.size > 1:
                    time = fact.layout.time
                    spec.time_dim, spec.pulse = time.dim, fact.length * (time.inner if time.outer == 1 else 1)
            else:
                result = low.plain(node)
            spec.lost = shape_of(node) if fact.lost and spec.time_dim is None else None
            if low.ends is not None and (fact.kind is Kind.WINDOW or spec.time_dim is None):
                result = low.ends.last(result, fact.layout, [fact_of(operand(m)) for m in windows] or [fact])
            results.append(result)
        low.graph.output(tuple(results))
        self._dependence(low, program, parts)

    def _stream_output(self, low: StepGraph, node: Node, spec: Output) -> Node:
        layout = fact_of(node).layout
        assert layout is not None and layout.time is not None
        single = layout.time.size == 1 and not layout.time.alone and fact_of(node).length == 1
        entries = low.streams[node]
        if single:
            return low.resolve(entries[len(entries) - 1])
        spec.time_dim, spec.pulse = layout.time.dim, len(entries)
        _count_places(spec, layout.time)
        if len(entries) == 1:
            return low.entry(node, 0)
        return low.as_clip([entries[i] for i in range(len(entries))], layout)

    def _dependence(self, low: StepGraph, program: Program, parts: list[Node]) -> None:
        """Notes the receptive field and the warm-up, entry by entry."""
        first, nodes = program.inputs[0], [n for n in low.graph.nodes if n.op == "placeholder"]
        found = dependences(low.graph, nodes[0], max(1, first.pulse), first.time_dim or 0)
        fields = [found[p].field for p in parts]
        program.step.receptive_field = None if None in fields else max((f for f in fields if f is not None), default=0)
        program.step.warmup_steps = max((found[p].steps for p in parts), default=0)
        for node, spec in zip(nodes, program.inputs, strict=False):
            if spec.boxes is not None:
                rows = dependences(low.graph, node)
                spec.waits = max((-(rows[p].low or 0) for p in parts), default=0)


def _count_places(spec: Output, time: Place) -> None:
    """Counts the places of a dim in which each entry has several, side by side: a reader sees no other entries."""
    if time.outer == 1:
        spec.delay, spec.pulse, spec.rate = spec.delay * time.inner, spec.pulse * time.inner, spec.rate / time.inner


def _check_entries(node: Node, entries: Sequence[Any]) -> None:
    """Checks that the entries that a rule has written are as large as its fact says: a rule that errs is found here.

    Raises:
        AssertionError: They are not.
    """
    layout = fact_of(node).layout
    assert layout is not None
    entry = layout.entry()
    sizes = [None if entry.has(BATCH, d) else size for d, size in enumerate(entry.shape)]
    for each in entries if isinstance(entries, list) else ():
        shape = shape_of(each)
        alike = len(shape) == len(sizes) and all(s in (None, size) for s, size in zip(sizes, shape, strict=True))
        assert alike, f"its rule gives entries of shape {shape}, and its fact says {entry}"


def _holder(low: StepGraph, entry: Node) -> tuple[Node, str]:
    """Finds the node that holds an entry, and where in it: entries that were computed together lie in one."""
    if entry.target is not aten.select.int or operand(entry) not in low.together:
        return entry, ""
    return operand(entry), f"@{whole(entry, 1)},{whole(entry, 2)}"
