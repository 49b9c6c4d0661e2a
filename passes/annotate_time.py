"""Annotate time: attaches to every tensor where time is in it and how it flows, and decides what is a window."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from torch.fx import Node

from co3d_compile.analysis.gate_dependence import forgets_entry
from co3d_compile.analysis.window_facts import window_fact
from co3d_compile.canonical.copy_forms import resample_again
from co3d_compile.canonical.operator_forms import slide_again, tiles_time
from co3d_compile.errors import UnsupportedError, UsageError
from co3d_compile.ir.aten_operators import SEPARABLE
from co3d_compile.ir.layout import TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import module_path, operator_name, rank_of, shape_of
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Fallback, Program, bytes_of
from co3d_compile.ir.time_facts import KEY, STATIC, Fact, Kind, NoExtension, fact_of, is_stream, is_window
from co3d_compile.rules import rule_for
from co3d_compile.rules.edge_copies import hold_back


class _Again(Exception):
    """Something decides about nodes that were passed already: they are marked, and the walk starts again."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def nodes(self, program: Program) -> list[Node]:
        return [n for n in program.graph.nodes if n.name in self.names]


class _Gates(_Again):
    """A window result meets the stream: the pools it comes from must become gates."""


class _Tiles(_Again):
    """A window result is up-sampled until it meets the stream: the pools it comes from are steps of a pyramid."""


class _Stay(_Again):
    """Gates that end in a window all the same: they are windows from the start, and compute what the clip does."""


class AnnotateTime(Pass):
    """Gives every node a :class:`~co3d_compile.facts.Fact`:

    1. inputs stream; each rule says how its operator's output flows from its operands;
    2. an operator with no extension beyond the clip, and all behind it, is a window;
    3. where a window result meets the stream again, the pools it comes from become gates (``pool_scope``), or slide
       like any other pool if as many entries as they took meet the stream (the last level of a U-Net over time);
    4. with ends, what an operator cannot read as early as it comes is marked to be held back (``edges.py``);
    5. the pulse is the least that gives every tensor whole entries, or the multiple that was asked for.
    """

    requires = frozenset({"canonical"})
    ensures = frozenset({"time"})

    def run(self, program: Program) -> bool:
        gates: frozenset[str] = frozenset()
        while True:
            try:
                fallbacks = self._walk(program, gates)
                break
            except _Gates as found:
                gates |= found.names
            except _Tiles as found:
                for node in found.nodes(program):
                    slide_again(node)
            except _Stay as found:
                gates -= found.names
                for node in found.nodes(program):
                    node.meta["stays"] = True
        self._fix_pulse(program)
        self._report(program, fallbacks)
        return True

    def _walk(self, program: Program, gates: frozenset[str]) -> list[tuple[Node, str]]:
        fallbacks: list[tuple[Node, str]] = []
        self._inputs(program)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                node.meta.setdefault(KEY, STATIC)  # of a constant more may be known
            elif node.op == "call_function":
                node.meta.pop("gate", None)
                if "resampled" in node.meta and is_stream(x := node.args[0]) and not fact_of(x).per_entry:
                    resample_again(node)
                fact, reason = self._fact(program, node, gates)
                if hold_back(program, node, fact):
                    fact, reason = self._fact(program, node, gates)
                if fact.layout is None and fact.kind is Kind.STREAM and "items" not in node.meta:
                    raise AssertionError(f"{node.name} streams without a layout")
                node.meta[KEY] = fact
                if reason is not None:
                    fallbacks.append((node, reason))
            elif node.op == "output":
                hold_back(program, node, STATIC)
        return fallbacks

    def _inputs(self, program: Program) -> None:
        timed = [(i, i.shape[i.time_dim]) for i in program.inputs if i.time_dim is not None]
        common = math.gcd(*(t for _, t in timed))
        first = timed[0][1]
        window = program.options.window or first
        spec = timed[0][0]
        pooled = (len(spec.shape) - spec.time_dim, first, window)  # type: ignore[operator]
        if program.options.stride_mode == "dense" and len({t for _, t in timed}) > 1:
            raise UsageError(
                "stride_mode='dense' has no meaning for inputs at several rates.", hint="Use stride_mode='step'."
            )
        for node, spec in zip(program.placeholders(), program.inputs, strict=True):
            entries = spec.shape[spec.time_dim] if spec.time_dim is not None else first
            if window * entries % first:
                raise UsageError(f"window={window} gives the input {spec.name} no whole number of entries.")
            layout = Layout.of(spec.shape, 0, spec.time_dim)
            if spec.time_dim is None:  # one value per step: it belongs to each entry
                layout = Layout(((*layout.dims[0], Axis(TIME, 1)), *layout.dims[1:]))
            node.meta[KEY] = Fact(
                Kind.STREAM,
                layout,
                pulse=Fraction(entries if spec.time_dim is not None else first, common),
                length=window * entries // first if spec.time_dim is not None else 1,
                rate=Fraction(first, entries),
                dense=program.options.stride_mode == "dense",
                end=Fraction(0) if program.options.boundary == "exact" else None,
                per_entry=spec.time_dim is None,
                pooled=pooled if spec.time_dim is None else None,
            )

    def _fact(self, program: Program, node: Node, gates: frozenset[str]) -> tuple[Fact, str | None]:
        """The fact of a node, and why it falls back to a window if it does."""
        facts = [fact_of(n) for n in node.all_input_nodes]
        kinds = {f.kind for f in facts}
        rule = rule_for(node.target)
        if kinds <= {Kind.STATIC}:
            return STATIC, None
        if Kind.WINDOW in kinds:
            if Kind.STREAM in kinds:
                self._meeting(program, node, facts)
                if not all(f.single for f in facts if f.kind is Kind.STREAM):
                    return window_fact(node), "meets the result of a window"
            return window_fact(node), None
        if rule is None:
            return window_fact(node), "has no rule"
        scope = program.options.pool_scope
        try:
            if node.name in gates:
                gate = rule.gate(node, scope)
                assert gate is not None
                node.meta["gate"] = scope
                return gate, None
            fact = rule.flow(node)
            if isinstance(node.meta["val"], (tuple, list)):
                node.meta["items"] = rule.items(node, fact)  # type: ignore[attr-defined]
            return fact, None
        except LayoutLost:
            return window_fact(node), "moves time in a way that cannot be followed"
        except NoExtension as why:
            norm = rule.gate(node, scope) if scope != "recompute" and node.target not in SEPARABLE else None
            if norm is not None:
                node.meta["gate"] = scope
                return norm, None
            if useless := _gates_behind(node, gates):
                raise _Stay(useless) from why
            refuse_channels(program, node, str(why))
            return window_fact(node), None if node.target in SEPARABLE else str(why)

    def _meeting(self, program: Program, node: Node, facts: list[Fact]) -> None:
        """A window result meets the stream: turns the pools it comes from into gates where that is possible.

        A single entry (a selection, a head that has used up its time axis) is no stream in this sense.
        """
        if all(f.single for f in facts if f.kind is Kind.STREAM):
            return
        sources = frozenset().union(*(f.sources for f in facts))
        by_name = {n.name: n for n in program.graph.nodes}
        pyramid = program.options.stride_mode == "step" and _as_long(node)  # dense strides have no up-sampling
        if pyramid and sources and all(tiles_time(by_name[n]) for n in sources):
            raise _Tiles(sources)
        if program.options.pool_scope == "recompute":
            return
        for name in sources:
            source = by_name[name]
            rule = rule_for(source.target)
            if rule is None or "stays" in source.meta:
                return
            if any(fact_of(n).kind is Kind.WINDOW for n in source.all_input_nodes):
                return
            try:
                if rule.gate(source, program.options.pool_scope) is None:
                    return
            except LayoutLost:
                return
        if program.options.pool_scope == "frame" and forgets_entry(program, [by_name[n] for n in sources], node):
            for name in sources:
                by_name[name].meta["stays"] = True
            return
        if sources:
            raise _Gates(sources)

    def _fix_pulse(self, program: Program) -> None:
        facts = [n.meta[KEY] for n in program.graph.nodes if KEY in n.meta and n.meta[KEY].kind is Kind.STREAM]
        facts += [f for n in program.graph.nodes for f in n.meta.get("items", []) if n.meta[KEY].kind is Kind.STREAM]
        factor = Fraction(math.lcm(*(f.pulse.denominator for f in facts)))
        first = next(i for i in program.inputs if i.time_dim is not None)
        base = next(n for n in program.placeholders() if n.name == first.name).meta[KEY].pulse * factor
        wanted = program.options.frames_per_step
        if wanted is not None:
            if wanted % base:
                raise UsageError(
                    f"frames_per_step={wanted} gives some tensor no whole number of entries.",
                    hint=f"Use {base} or a multiple of it.",
                )
            factor *= wanted // base
        for node in program.graph.nodes:
            if KEY in node.meta:
                node.meta[KEY] = replace(node.meta[KEY], pulse=node.meta[KEY].pulse * factor)
            if "items" in node.meta:
                node.meta["items"] = [replace(f, pulse=f.pulse * factor) for f in node.meta["items"]]
        for node, spec in zip(program.placeholders(), program.inputs, strict=True):
            spec.pulse = int(node.meta[KEY].pulse)

    def _report(self, program: Program, fallbacks: list[tuple[Node, str]]) -> None:
        if fallbacks and program.options.unsupported == "error":
            lines = [f"{operator_name(n.target)} in {module_path(n) or 'the model'}: {why}" for n, why in fallbacks]
            raise UnsupportedError(
                "These operators have no extension beyond the clip: " + "; ".join(lines) + ".",
                hint="Without --unsupported error they are applied to a window of the newest entries.",
            )
        for node, why in fallbacks:
            size = sum(
                bytes_of(shape, n.meta["val"].dtype)
                for n in node.all_input_nodes
                if fact_of(n).kind is Kind.STREAM and (shape := tuple(n.meta["val"].shape))
            )
            program.notes.recomputed.append(Fallback(operator_name(node.target), module_path(node), why, size))
        for node in program.graph.nodes:
            if "gate" in node.meta:
                program.notes.gates.append((module_path(node), node.meta["gate"]))
                program.record(node, f"gate over one {node.meta['gate']}")
            elif fact_of(node).kind is Kind.WINDOW and node.op == "call_function":
                program.record(node, "on a window")
        wanted = program.options.window
        windows = any(fact_of(n).kind is Kind.WINDOW for n in program.graph.nodes)
        if windows or "window" in {s for _, s in program.notes.gates}:
            first = next(i for i in program.inputs if i.time_dim is not None)
            program.step.window = wanted or first.shape[first.time_dim]  # type: ignore[index]
        elif wanted is not None:
            program.notes.warnings.append("window has no effect: the model has no operator over the whole time axis.")


def _as_long(node: Node) -> bool:
    """Whether a window result has as many entries, more than one, as the streams that it meets have in the clip."""
    shapes = [shape_of(n) for n in filter(is_window, node.all_input_nodes)]
    for n in filter(is_stream, node.all_input_nodes):
        time = fact_of(n).layout.time  # type: ignore[union-attr]
        right = rank_of(n) - time.dim if time is not None else 0
        if time is None or time.size == 1 or any(len(s) < right or s[-right] != time.size for s in shapes):
            return False
    return True


def _gates_behind(node: Node, gates: frozenset[str]) -> frozenset[str]:
    """The gates that those operands come from which are one of each entry's own."""
    found: set[Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        n = stack.pop()
        if n not in found and fact_of(n).kind is Kind.STREAM and fact_of(n).per_entry:
            found.add(n)
            stack += n.all_input_nodes
    return frozenset(n.name for n in found) & gates


def refuse_channels(program: Program, node: Node, why: str) -> None:
    """A convolution that takes the time dim for its channels: the user named the wrong dim."""
    x = node.args[0]
    place = fact_of(x).layout.time if isinstance(x, Node) and fact_of(x).layout is not None else None  # type: ignore
    if operator_name(node.target) != "aten.conv3d" or place is None or place.dim != 1 or not place.alone:
        return
    dims = [i.time_dim for i in program.inputs]
    raise UsageError(
        f"time_dim={dims[0] if len(set(dims)) == 1 else dims} is what the model takes for channels.",
        operator=operator_name(node.target),
        module_path=module_path(node),
        hint="Give the dim that counts the frames; for (N, C, T, H, W) that is 2.",
    )
