"""Where the batch is inside a loop over frames: its body is looked at as operators on one entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from co3d_compile.analysis.window_facts import window_layout
from co3d_compile.ir.frame_loop import loop_of
from co3d_compile.ir.layout import BATCH, PLAIN, TIME, Axis, Layout
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.time_facts import KEY, STATIC, Fact, Kind, fact_of
from co3d_compile.rules import rule_for

ROUNDS = 4  # of looking where the batch is in what is handed on: it is first guessed, then read off the body


def annotate_body(node: Node) -> None:
    """Gives the operators in the body of a loop their facts: the layouts of one entry, in which time is no dim."""
    loop = loop_of(node)
    walked, states, fixed = loop.parts(loop.placeholders())
    entries, starts, given = loop.parts([n for n in node.args if isinstance(n, Node)])
    rows = _rows(entries)
    for inner, outer in zip(walked, entries, strict=True):
        layout = fact_of(outer).layout
        _note(inner, layout.entry() if layout is not None and layout.time is not None else None)
    for inner, outer in zip(fixed, given, strict=True):
        fact = fact_of(outer)
        inner.meta[KEY] = fact if fact.kind is Kind.STATIC else Fact(Kind.WINDOW, _timeless(fact.layout))
    for inner, outer in zip(states, starts, strict=True):
        _note(inner, _timeless(fact_of(outer).layout) or _guess(shape_of(inner), rows))
    for _ in range(ROUNDS):
        for inner in loop.body.graph.nodes:
            if inner.op == "call_function":
                _operator(inner)
        handed = [fact_of(result).layout for result in loop.results()[0]]
        if handed == [fact_of(state).layout for state in states]:
            return
        for state, layout in zip(states, handed, strict=True):
            _note(state, layout or fact_of(state).layout)


def _rows(entries: Sequence[Node]) -> int:
    """The batch of the captured clip."""
    places = [layout.batch for n in entries if (layout := fact_of(n).layout) is not None]
    return next((place.size for place in places if place is not None), 1)


def _operator(node: Node) -> None:
    if all(fact_of(n).kind is Kind.STATIC for n in node.all_input_nodes):
        node.meta[KEY] = STATIC
    else:
        _note(node, window_layout(node, rule_for(node.target)))


def _note(node: Node, layout: Layout | None) -> None:
    node.meta[KEY] = Fact(Kind.WINDOW, layout)


def _timeless(layout: Layout | None) -> Layout | None:
    return layout.without(TIME) if layout is not None else None


def _guess(shape: tuple[int, ...], rows: int) -> Layout:
    """Finds the first dim that the batch goes into."""
    layout = Layout.plain(shape)
    dim = next((d for d, size in enumerate(shape) if size and size % rows == 0), None)
    if dim is None:
        return layout
    return layout.replace(dim, [Axis(BATCH, rows), Axis(PLAIN, shape[dim] // rows)])
