"""Operators that a clip computes for single frames of it, one by one: a stream computes all of them at every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

from torch.fx import Node
from torch.utils import _pytree as pytree

from co3d_compile.analysis.operator_families import MOVES, name_of
from co3d_compile.errors import without_extension
from co3d_compile.ir.markers import MARKERS
from co3d_compile.ir.node_reading import module_path, operator_name
from co3d_compile.ir.program import Fallback, Program
from co3d_compile.ir.time_facts import fact_of, is_stream

FEWEST = 3  # frames
POOLS = {"add", "maximum", "minimum"}
"""What adds up a window of frames, or finds their extremes, one by one: a pool, as cheap as one."""


def note_repeated_frames(program: Program, entries: Mapping[Node, Hashable]) -> None:
    """Notes as recomputed the operators that a step computes for several frames of the clip.

    They are those of a loop over frames that is none with a state. One is named for all in its module.

    Args:
        program: Annotated, and lowered.
        entries: What a node became in the step graph: that of another step, where the same was computed before.

    Raises:
        UnsupportedError: There are some, and ``unsupported`` is ``"error"``.
    """
    copies: dict[Hashable, list[Node]] = defaultdict(list)
    read = _frames_read(program)
    for node in filter(entries.__contains__, program.graph.nodes):
        computes = node.op == "call_function" and node.target not in MARKERS and name_of(node) not in MOVES | POOLS
        if computes and read[node]:
            copies[_kind(node)].append(node)
    found: dict[str, Fallback] = {}
    for nodes in copies.values():
        frames = min(len({read[n] for n in nodes}), len({entries[n] for n in nodes}))
        if frames >= FEWEST:
            why = f"is computed for {frames} frames of the clip, one by one"
            row = Fallback(operator_name(nodes[0].target), module_path(nodes[0]), why)
            found.setdefault(row.module_path, row)
    program.notes.recomputed += found.values()
    if found and program.options.unsupported == "error":
        lines = [f"{row.operator} in {row.module_path or 'the model'}: {row.reason}" for row in found.values()]
        raise without_extension(lines, "Without --unsupported error a step computes them for all of these frames.")


def _frames_read(program: Program) -> dict[Node, frozenset[int]]:
    """Finds the single frames that each node is computed from, counted from the first one of the clip."""
    read: dict[Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        fact = fact_of(node)
        streams = [x for x in node.all_input_nodes if is_stream(x)]
        first = fact.single and any(not fact_of(x).single for x in streams)
        own = frozenset([fact.crop]) if first else frozenset()
        read[node] = own.union(*(read[x] for x in node.all_input_nodes if not first))
    return read


def _kind(node: Node) -> Hashable:
    """Describes what is computed of one frame: the operator, its weights, shapes and numbers."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return (node.target, *map(_leaf, leaves))


def _leaf(leaf: object) -> str:
    if not isinstance(leaf, Node):
        return str(leaf)
    return str(leaf.target) if leaf.op == "get_attr" else str(getattr(leaf.meta["val"], "shape", None))
