"""Views that split time: into blocks of as many frames, or into as many parts, however long the clip is."""

from __future__ import annotations

from collections.abc import Callable

from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import NotResizable


def torn_views(program: Program, again: Callable[[int, bool], Program | None]) -> frozenset[str]:
    """The views of an annotated program that split time into parts which grow with the clip.

    A clip says nothing of that: (8,) as (2, 4) may be two blocks of four frames or two halves. A longer one does.

    Args:
        program: What is known of it is noted.
        again: Captures the network for clips so many times as long.
    """
    views = program.notes.split_views
    if not views:
        return frozenset()
    try:
        longer = again(2, False)
    except NotResizable as why:
        program.notes.warnings.append(
            f"A view splits time into blocks of frames; that they are as long in a longer clip is assumed: {why}."
        )
        return frozenset()
    there = {n.name: n for n in longer.graph.nodes} if longer is not None else {}
    return frozenset(
        name for name, shape in views.items() if name not in there or shape_of(there[name])[1:] != shape[1:]
    )
