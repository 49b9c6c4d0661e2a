"""Layers that remember, run on pieces of a clip: each piece starts anew, so that the layer does not run on."""

from __future__ import annotations

from itertools import combinations

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import sliced
from co3d_compile.ir.frame_loop import is_loop
from co3d_compile.ir.layout import TIME
from co3d_compile.ir.time_facts import fact_of, is_stream

aten = torch.ops.aten


def pieces_with(node: Node) -> frozenset[str]:
    """Names a layer and those in front of it that are the same one on another piece of the clip.

    ``[gru(p)[1] for p in x.split(8, 1)]``: they share their weights, and what they read begins elsewhere. Empty where
    there are none. Pieces that overlap, such as ``x[:, i : i + 8]`` at each fourth i, start anew all of them, though
    neighbours among them are nearly the same. Everything in front of the layer has its facts.
    """
    alike = [node]
    for other in node.graph.nodes:
        if other is node:
            break
        if (other.target is node.target or (is_loop(other) and is_loop(node))) and _origin(other) & _origin(node):
            alike.append(other)
    pieces = [_piece(n) for n in alike]
    apart = any(not _go_on(a, b) for a, b in combinations(pieces, 2))
    return frozenset(n.name for n in alike) if apart else frozenset()


def _go_on(a: range, b: range) -> bool:
    """Says whether two layers read entries from the same one on, or nearly so, as ``x[:, 1:]`` and ``x[:, :-1]``."""
    return a.start == b.start or (len(a) == len(b) and 2 * abs(a.start - b.start) < len(a))


def _origin(node: Node) -> set[object]:
    """Collects the weights that an operator reads; of one without any, what its operands were cut from."""
    weights: set[object] = {n.target for n in node.all_input_nodes if n.op == "get_attr"}
    return weights or {n.args[0] for n in node.all_input_nodes if n.target is aten.slice.Tensor}


def _piece(node: Node) -> range:
    """Finds the entries of a clip that an operator reads, counted where a slice was cut out last."""
    streams = [n for n in node.all_input_nodes if n.op != "get_attr"]
    start, length = 0, fact_of(streams[0]).clip if streams else 0
    while streams:
        start += min(map(_cut, streams))
        if len(streams) > 1 or is_loop(streams[0]):
            break
        streams = [n for n in streams[0].all_input_nodes if n.op != "get_attr"]
    return range(start, start + length)


def _cut(node: Node) -> int:
    """Counts the entries that a slice over time leaves out in front; 0 for any other operator."""
    if node.target is not aten.slice.Tensor:
        return 0
    source, dim, start, *_ = sliced(node)
    fact = fact_of(source)
    return start if is_stream(source) and fact.layout is not None and fact.layout.has(TIME, dim) else 0
