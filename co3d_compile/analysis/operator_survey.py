"""What the passes decided, operator by operator: when each result is there, what it has seen, what it costs.

Taken once the graph is aligned and before time leaves it, for the report and its drawing.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.analysis.window_groups import newest, windows_of
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.markers import MARKERS, chain, history, shift, window
from co3d_compile.ir.node_reading import module_path, operand, operator_name, whole
from co3d_compile.ir.operator_row import Operator
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, Fact, Kind, fact_of, is_stream
from co3d_compile.rules import rule_for
from co3d_compile.rules.remembering import remembers_all


def survey(program: Program) -> list[Operator]:
    """Describes an aligned graph. Costs and states are added later, by ``with_costs``."""
    rows: list[Operator] = []
    index: dict[Node, int] = {}
    extents: dict[Node, tuple[Fraction, Fraction] | None] = {}
    origins = _origins(program)
    for node in program.graph.nodes:
        fact: Fact | None = node.meta.get(KEY)
        if fact is None or node.op not in ("placeholder", "call_function") or fact.kind is Kind.STATIC:
            continue
        extents[node] = _extent(node, fact, extents)
        if node.target in MARKERS:
            continue
        sources = [_source(n) for n in node.all_input_nodes if _source(n)[0] in index]
        index[node] = len(rows)
        row = _row(node, fact, [(index[n], held) for n, held in sources], extents[node])
        rows.append(replace(row, origin=origins.get(node.name, "")))
    return rows


def _origins(program: Program) -> dict[str, str]:
    """Finds the captured node that each node has the value of; one that is still there is its own."""
    places = program.places()
    found: dict[str, str] = {}
    for captured, name in places.items():
        if name == captured or name not in found:
            found[name] = captured
    return found


def with_values(rows: list[Operator], program: Program) -> list[Operator]:
    """Adds the ONNX values of an exported program that hold the entries of each operator."""
    found: dict[str, dict[int, str]] = {}
    for (name, entry), value in program.notes.values.items():
        found.setdefault(name, {})[entry] = value
    result = []
    for row in rows:
        own = found.get(row.name, {})
        whole = own and len(own) == row.entries
        result.append(replace(row, values=tuple(own[i] for i in sorted(own))) if whole else row)
    return result


def _row(node: Node, fact: Fact, inputs: list[tuple[int, int | None]], extent: Any) -> Operator:
    kernel = fact.own.slides.kernel if fact.own.slides is not None else Kernel()
    value = node.meta.get("val")
    streams = fact.kind is Kind.STREAM
    # A select leaves entries out in front: its entry is named for the first one.
    left_out = (fact.delay - fact.told) * fact.rate if streams else Fraction(0)
    return Operator(
        name=node.name,
        operator="input" if node.op == "placeholder" else operator_name(node.target),
        module_path="" if node.op == "placeholder" else module_path(node),
        kind="input" if node.op == "placeholder" else fact.kind.value,
        done=_done(node, fact),
        inputs=tuple(at for at, _ in inputs),
        held=tuple(held for _, held in inputs),
        shape=tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else (),
        taps=(kernel.k - 1) * kernel.d + 1,
        padding=max(0, kernel.p),
        rate=float(fact.rate),
        delay=float(fact.delay * fact.rate - left_out) if streams else float(_window_delay(node)),
        first=None if extent is None else float(extent[0] - left_out),
        last=None if extent is None else float(extent[1] - left_out),
        entries=int(fact.pulse) if streams else 1,
        late=fact.told if streams else _late(node),
    )


def _done(node: Node, fact: Fact) -> str:
    if fact.kind is Kind.WINDOW:
        return "on a window"
    if remembers_all(node):
        return "carries its state"
    if fact.own.gate is not None:
        return "gate over one frame" if fact.own.gate == "frame" else "gate over a window"
    if fact.own.slides is not None and any(
        m.target is history for n in node.all_input_nodes for m in chain(n, *MARKERS)
    ):
        return "continual"
    held = [h for n in node.all_input_nodes if (h := _source(n)[1])]
    return f"operand delayed by {max(held)}" if held else ""


def _source(node: Node) -> tuple[Node, int | None]:
    """Finds the operator behind the markers, and by how many of its entries it is delayed."""
    *_, source = chain(node, *MARKERS)
    if not is_stream(node) or not is_stream(source):
        return source, None
    return source, max(0, fact_of(node).delay - fact_of(source).delay)


def _window_delay(node: Node) -> Fraction:
    """Counts the frames by which the newest entry lags that a window result has read."""
    return min((newest(m) * fact_of(operand(m)).rate for m in windows_of(node)), default=Fraction(0))


def _late(node: Node) -> int:
    """Counts the entries by which the newest one lags that a window result has read."""
    return min((newest(m) for m in windows_of(node)), default=0)


def _extent(node: Node, fact: Fact, known: dict[Node, Any]) -> tuple[Fraction, Fraction] | None:
    """Counts the frames that an entry reads, from the one at its own index on."""
    if node.op == "placeholder":
        return Fraction(0), Fraction(0)
    parts = [known[n] for n in node.all_input_nodes if n in known]
    if not parts:
        return Fraction(0), Fraction(0)
    if any(part is None for part in parts) or remembers_all(node):
        return None
    first, last = min(part[0] for part in parts), max(part[1] for part in parts)
    before: Fact = next(n.meta[KEY] for n in node.all_input_nodes if n in known)
    if node.target is window or fact.own.gate == "window":
        return first - (before.length - 1) * before.spacing * before.rate, last
    if node.target is shift:
        move = whole(node, 1) * before.rate
        return first - move, last - move
    if fact.own.slides is None and fact.kind is Kind.WINDOW:
        return first, last
    if fact.own.slides is None:
        if before.rate <= fact.rate:
            return first, last
        rule = rule_for(node.target)  # the entries of a group read the same ones, from other places
        late = fact.delay * fact.rate - before.delay * before.rate
        past = rule.past(node) * before.rate if rule is not None else 0
        return first + late - past - (before.rate - fact.rate), last + late
    kernel = before.flowing(fact.own.slides.kernel)
    return first - kernel.p * before.rate, last + ((kernel.k - 1) * kernel.d - kernel.p) * before.rate
