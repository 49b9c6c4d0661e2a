"""What belongs to a window though it could slide: paddings, and strides that no common step has room for.

A convolution slides: what its padding fills in lies outside of a stream, which has real frames there. A window does
not slide. Behind ``F.pad(x, (0, T))`` an operator over all 2 T entries, such as a Fourier transform that must not wrap
around, or a linear layer over them, has T frames and T zeros.

Pools over 2, 3, 5 and 6 frames side by side, as in a temporal pyramid, would give whole entries every 30 frames. Where
that is more than a clip has, and windows alone read them, they are computed on the window.
"""

from __future__ import annotations

from math import lcm

import torch
from torch.fx import Node

from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.layout import LayoutLost
from co3d_compile.ir.node_reading import operands
from co3d_compile.ir.operator_arguments import order_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import NoExtension, fact_of, is_stream, is_window
from co3d_compile.rules import rule_of

aten = torch.ops.aten
VIEWS = {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}


def paddings_of(node: Node) -> frozenset[str]:
    """Names the paddings over time that an operator on a window reads; it may move their dims before."""

    def moved(n: Node) -> list[Node]:
        return [x for x in operands(n) if is_stream(x)] if n is node or _moves(n) else []

    return frozenset(n.name for n in reached([node], moved) if n is not node and _grows(n) and _whole(n))


def uneven_strides(program: Program) -> frozenset[str]:
    """Names the strides that end in windows, where a step would take more frames than a clip has."""
    streams = [n for n in program.graph.nodes if n.op == "call_function" and is_stream(n)]
    if lcm(*(fact_of(n).rate.numerator for n in streams)) <= program.first_timed()[1]:
        return frozenset()
    return frozenset(n.name for n in streams if (k := _kernel(n)) is not None and k.s > 1 and _ends_in_windows(n))


def _ends_in_windows(node: Node) -> bool:
    """Says whether no result streams that is computed from a node."""
    behind = reached([node], lambda n: n.users if is_stream(n) else [])
    return all(is_stream(n) or is_window(n) for n in behind)


def _grows(node: Node) -> bool:
    """Says whether a padding adds more entries than are cut off in front of it."""
    added, kernel = 0, _kernel(node)
    if kernel is None or max(kernel.p, kernel.p_end) <= 0:
        return False
    while kernel is not None and kernel.k == kernel.s == 1:
        added += kernel.p + kernel.p_end
        node = max((x for x in operands(node) if is_stream(x)), key=lambda x: x.meta["val"].numel())
        kernel = _kernel(node)
    return added > 0


def _whole(node: Node) -> bool:
    """Says whether nothing but windows reads a padding."""
    readers = reached([node], lambda n: n.users if n is node or _moves(n) else [])
    return all(is_window(n) or n is node or _moves(n) for n in readers)


def _moves(node: Node) -> bool:
    """Says whether an operator only puts dims elsewhere."""
    return node.target in VIEWS or (node.op == "call_function" and order_of(node) is not None)


def _kernel(node: Node) -> Kernel | None:
    """The index equation of an operator over time, if it has one."""
    rule = rule_of(node) if node.op == "call_function" else None
    try:
        return rule.kernel(node) if rule is not None and is_stream(node) else None
    except (LayoutLost, NoExtension):
        return None
