"""Whether what a gate makes of one entry still depends on that entry: shown by evaluating it.

A gate pools over the one entry (``pool_scope="frame"``). ``x - x.mean(time)`` is zero then, and ``x / x.amax(time)``
is one: nothing of the entry is left, so such a pool is no gate.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.ir.graph_walks import reached, run_operator
from co3d_compile.ir.layout import TIME, Axis, LayoutLost
from co3d_compile.ir.node_reading import operands
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import NoExtension, constant_of, fact_of, is_stream, is_window
from co3d_compile.rules import rule_for

CHANGE = 0.1  # of each number of an entry, so that its sign stays
LEAST = 1e-3  # of the result: a smaller change is what an epsilon in a divisor leaves
SMALLER = (1.0, 2.0**-4, 2.0**-8)  # times: a sigmoid may say the same of all that is large
LITTLE = 2.0**-6  # of what a weight of zero may let through once it is trained
DRAWS = 16  # a result may be the same for two entries by chance (behind a comparison, a ReLU)


def forgets_entry(program: Program, pools: Collection[Node], meeting: Node) -> bool:
    """Says whether nothing of the entry is left where a pool over the one entry meets the stream, or on the way there.

    All entries of the clip are made equal, so that the clip's own pool is one over one entry. What the meeting
    computes is evaluated as captured, for several values of the entry.

    Args:
        pools: The pools over time whose result meets the stream in ``meeting``; none of them is a gate yet.
    """
    pooled = {x for pool in pools for x in pool.all_input_nodes if is_stream(x)}
    way, leaves = _way(meeting, stops=pooled)
    if len(pooled) > 1 or leaves != pooled:  # the stream and the pools come from something farther back
        way, leaves = _way(meeting, stops=())
    read = _read(pools, leaves)
    random = torch.Generator().manual_seed(0)
    entries = {n: _entry(n, random) for n in leaves}
    try:
        old = _run(program, way, entries)
        smooth = all(x.is_floating_point() for x in (old[meeting], *(entries[n] for n in read)))
        if smooth:
            moved = entries | {n: _moved(entries[n], random) for n in read}
            if not _differs(old, _run(program, way, moved), meeting, LEAST):
                return True
        same = {n for n in way if n is not meeting and is_window(n)} | (set() if smooth else {meeting})
        for draw in range(DRAWS):
            scale = SMALLER[draw % len(SMALLER)]
            new = _run(program, way, entries | {n: _entry(n, random, scale) for n in read})
            same = {n for n in same if not _differs(old, new, n)}
            if not same:
                return False
        return True
    except (RuntimeError, IndexError, ValueError, TypeError):  # an operator refuses these numbers: nothing is shown
        return False


def _way(meeting: Node, stops: Collection[Node]) -> tuple[list[Node], set[Node]]:
    """Finds the operators between a meeting and what each entry comes from, in the graph's order, and the latter."""

    def is_leaf(n: Node) -> bool:
        inner = n is meeting or is_window(n) or (n not in stops and _on_one_entry(n))
        return is_stream(n) and not inner

    found = reached([meeting], lambda n: [] if is_leaf(n) else operands(n))
    leaves = set(filter(is_leaf, found))
    return [n for n in meeting.graph.nodes if n in found and n not in leaves and n.op == "call_function"], leaves


def _on_one_entry(node: Node) -> bool:
    """Says whether a streaming operator computes an entry from the same entries of its operands."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    if rule is None or any(not isinstance(n.meta["val"], Tensor) for n in (node, *node.all_input_nodes)):
        return False
    try:
        kernel = rule.kernel(node)
    except (NoExtension, LayoutLost):
        return False
    return (kernel is None or kernel.trivial) and not rule.remembers_all(node) and not rule.past(node)


def _read(pools: Collection[Node], leaves: set[Node]) -> set[Node]:
    """Finds those of ``leaves`` that the pools read."""
    return leaves & reached(pools, lambda n: [] if n in leaves else operands(n)).keys()


def _run(program: Program, way: list[Node], entries: dict[Node, Tensor]) -> dict[Node, Tensor]:
    """Computes each operator on the way, on clips all of whose entries are those given."""
    read = {n for node in way for n in operands(node)}
    values = {n: _constant(program, n) for n in read if n.op == "get_attr"}
    values |= {n: _repeated(n, entry) for n, entry in entries.items()}
    for node in way:
        values[node] = run_operator(node, values)
    return values


def _constant(program: Program, node: Node) -> Tensor:
    """Reads a constant. A learned zero lets nothing through yet: what it may let through counts."""
    value, known = program.constant(node), constant_of(node)
    return torch.full_like(value, LITTLE) if known.fill == 0 and not known.filling else value


def _differs(old: dict[Node, Tensor], new: dict[Node, Tensor], node: Node, least: float = 0.0) -> bool:
    """Says whether a result changed by more than rounding, and more than ``least`` of itself."""
    a, b = old[node], new[node]
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return not isinstance(a, Tensor) or not torch.equal(a, b)
    operands = [_largest(old[n]) for n in node.all_input_nodes if n in old and old[n].is_floating_point()]
    rounding = 16 * torch.finfo(a.dtype).eps * max(operands, default=_largest(a))
    return not _largest(a - b) <= max(rounding, least * _largest(a))


def _largest(x: Tensor) -> float:
    """Finds the largest absolute value: many times faster by two extremes than by ``abs().max()``."""
    least, most = torch.aminmax(x)
    return max(-float(least), float(most))


def _moved(entry: Tensor, random: torch.Generator) -> Tensor:
    """Makes an entry near another one; numbers that are no floats stay."""
    if not entry.is_floating_point():
        return entry
    seed = int(torch.randint(2**10, (), generator=random))
    return _exact(entry * (1 + CHANGE * torch.cos(seed + 9.0 * entry)))


def _exact(entry: Tensor) -> Tensor:
    """Rounds an entry to few bits, so that the mean over equal ones is one of them and not only close to it."""
    return (entry * 64).round() / 64


def _entry(node: Node, random: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draws a random entry of a stream: one number for each axis but time."""
    dtype = node.meta["val"].dtype
    shape = [1 if a.label == TIME else a.size for a in _axes(node)]
    if dtype.is_floating_point:
        return (scale * _exact(torch.randn(shape, generator=random))).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 8, shape, generator=random).to(dtype)


def _repeated(node: Node, entry: Tensor) -> Tensor:
    """Makes a tensor in the shape of the clip whose entries over time are all this one."""
    return entry.expand([a.size for a in _axes(node)]).reshape(node.meta["val"].shape).contiguous()


def _axes(node: Node) -> list[Axis]:
    layout = fact_of(node).layout
    assert layout is not None
    return [a for dim in layout.dims for a in dim]
