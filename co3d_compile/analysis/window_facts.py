"""Facts of results that are computed on a window."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from co3d_compile.ir.layout import BATCH, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import called, operand
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, fact_of
from co3d_compile.rules import Rule


def window_fact(node: Node, rule: Rule | None) -> Fact:
    """The fact of an operator's output on a window, as far as its rule and trying other sizes tell."""
    facts = [fact_of(n) for n in node.all_input_nodes if fact_of(n).kind is not Kind.STATIC]
    began = any(f.kind is Kind.STREAM for f in facts)
    sources = frozenset().union(*(f.sources for f in facts)) | (frozenset({node.name}) if began else frozenset())
    told, layout = by_rule(node, rule), window_layout(node, rule)
    lost = any(f.lost or (f.clip > 1 and told is None) for f in facts) and (told is None or told.time is None)
    longer = [f.length for f in facts if f.length != f.clip]
    length = layout.time.size if layout is not None and layout.time is not None else 1
    if longer:  # the window is longer than the clip
        kernel = rule.kernel(node) if rule is not None and layout is not None and not began else None
        length = kernel.length(max(longer)) if kernel is not None else max(longer)
    pulse, dense = facts[0].pulse, facts[0].dense
    return Fact(Kind.WINDOW, layout, length=length, sources=sources, pulse=pulse, dense=dense, lost=lost)


def window_layout(node: Node, rule: Rule | None) -> Layout | None:
    """Finds batch and time behind an operator on a window: by its rule, or by trying other sizes."""
    layout = by_rule(node, rule)
    return layout if layout is not None else probe(node)


def by_rule(node: Node, rule: Rule | None) -> Layout | None:
    """Finds batch and time behind an operator on a window, as far as its rule tells."""
    value = node.meta.get("val")
    if rule is None or not isinstance(value, torch.Tensor):
        return None
    try:
        layout = rule.layout(node)
    except (LayoutLost, NoExtension):
        return None
    return layout if layout.shape == tuple(value.shape) else None


def probe(node: Node) -> Layout | None:
    """Finds the batch in an operator's output: it is the dim that grows with the batch of the operands."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    factor = 3

    def grown(n: Node) -> torch.Tensor:
        layout = fact_of(n).layout
        place = layout.batch if layout is not None else None
        value = n.meta["val"]
        shape = [s * factor if place is not None and d == place.dim else s for d, s in enumerate(value.shape)]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    item = node.args[1] if node.target is operator.getitem else None
    source = operand(node) if item is not None else node
    try:
        args, kwargs = torch.fx.map_arg((source.args, source.kwargs), grown)
        result = called(source.target)(*args, **kwargs)
        result = result if item is None else result[item]
    except Exception:  # an operator may refuse other sizes in any way it likes
        return None
    batches = {lay.batch.size for n in source.all_input_nodes if (lay := fact_of(n).layout) is not None and lay.batch}
    grown_dims = [
        d for d, (old, new) in enumerate(zip(node.meta["val"].shape, result.shape, strict=True)) if old != new
    ]
    if len(grown_dims) != 1 or len(batches) != 1:
        return None
    (dim,), batch = grown_dims, batches.pop()
    if node.meta["val"].shape[dim] != batch or result.shape[dim] != batch * factor:
        return None  # among other factors of the dim: nobody knows where
    return Layout.plain(node.meta["val"].shape).replace(dim, [Axis(BATCH, batch)])
