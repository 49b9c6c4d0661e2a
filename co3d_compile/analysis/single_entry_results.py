"""What a pool over time leaves of a window: one entry. It is lowered like those of a stream, without a dim for time.

So the head behind the pool is computed on tensors of at most four dims, by the rules that the stream has.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import SEPARABLE, reduced
from co3d_compile.ir.layout import BATCH, LayoutLost
from co3d_compile.ir.markers import window
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.time_facts import KEY, Kind, NoExtension, amend, fact_of, is_window, known
from co3d_compile.rules import Rule, rule_of
from co3d_compile.rules.conv import Convolution
from co3d_compile.rules.sliding import SlidingRule
from co3d_compile.step_graph.memory import leading
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten


def pool(low: StepGraph, node: Node) -> bool:
    """Lowers a pool over nothing but the entries of a window."""
    if low.ends is not None or node.target not in SEPARABLE or len(node.args) > 3 or node.kwargs.get("dtype"):
        return False
    x, dims, keep = reduced(node)
    place = fact_of(x).time
    if x.target is not window or place is None or not place.alone or place.dim not in dims:
        return False
    layout, others = known(x), [d for d in dims if d != place.dim]
    if not leading(layout) or any(shape_of(x)[d] != 1 or layout.has(BATCH, d) for d in others):
        return False
    result = low.reduce_entries(low.window_entries[x], SEPARABLE[node.target])
    if keep:
        return _mark(low, node, result)
    numbers = layout.entry_dims()
    for d in sorted(others, reverse=True):
        result = low.call(aten.squeeze.dim, result, numbers[d])
    low.windows[node] = result
    return True


def follow(low: StepGraph, node: Node) -> bool:
    """Lowers an operator all of whose operands were lowered so, if its rule treats the entry as one of many."""
    singles = [n for n in node.all_input_nodes if n in low.window_facts]
    if not singles:
        return False
    rule, beside = rule_of(node), {n: low.window_entries[n] for n in node.all_input_nodes if n.target is window}
    several = any(is_window(n) for n in node.all_input_nodes) or any(len(e) > 1 for e in beside.values())
    if _treats_as_batch(rule, node) and not several:
        low.streams.update(beside)
        assert rule is not None
        try:
            fact = rule.flow(node)
        except (NoExtension, LayoutLost):
            fact = None
        if fact is not None and fact.pulse == 1 and fact.length == 1 and fact.clip == 1:
            low.window_facts[node], node.meta[KEY] = fact_of(node), fact
            low.streams[node] = rule.lower(node, low)
            return True
    for n in singles:
        restore(low, n)
    return False


def restore(low: StepGraph, node: Node) -> None:
    """Gives the entry its dim for time back, where an operator needs the window as it is in the clip."""
    if node in low.window_facts:
        layout = fact_of(node).layout
        assert layout is not None
        low.windows[node] = low.as_clip([low.streams[node][0]], layout)
        node.meta[KEY] = low.window_facts.pop(node)


def _mark(low: StepGraph, node: Node, entry: Node) -> bool:
    """Gives a window result of one entry, with a dim for time alone, the fact of a stream, if it is known which."""
    fact = fact_of(node)
    if fact.time is None:
        return False
    low.window_facts[node] = fact
    amend(node, kind=Kind.STREAM, pulse=Fraction(1), delay=0, spacing=1, length=1, dense=False, per_entry=True)
    low.streams[node] = [entry]
    return True


def _treats_as_batch(rule: Rule | None, node: Node) -> bool:
    """Says whether nothing is remembered between entries, and none but the one is read."""
    if rule is None or isinstance(node.meta["val"], (tuple, list)):
        return False
    try:
        kernel = rule.kernel(node)
    except (NoExtension, LayoutLost):
        return False
    plain = type(rule).lower in (Rule.lower, SlidingRule.lower) or isinstance(rule, Convolution)
    return plain and (kernel is None or kernel.trivial)
