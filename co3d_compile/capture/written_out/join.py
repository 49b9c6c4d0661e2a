"""Operators that were written out in smaller ones, by hand or by an exporter, as one operator again.

What is looked for is arithmetic: names, modules and the order of operators do not matter. The rules know what a norm or
attention does to time; of its pieces they know less, and would compute more on windows.
"""

from __future__ import annotations

from co3d_compile.capture.written_out.activations import join_activations
from co3d_compile.capture.written_out.attention import join_attention
from co3d_compile.capture.written_out.embedding_bags import open_bags
from co3d_compile.capture.written_out.group_norms import join_group_norms
from co3d_compile.capture.written_out.joined_parts import move_joined_parts
from co3d_compile.capture.written_out.norms import join_norms
from co3d_compile.capture.written_out.own_entries import select_own_entries
from co3d_compile.capture.written_out.resampling import join_interpolations
from co3d_compile.capture.written_out.rolls import join_rolls
from co3d_compile.capture.written_out.shared_heads import share_heads
from co3d_compile.capture.written_out.single_clips import give_rows_a_clip
from co3d_compile.capture.written_out.transposes import cancel_transposes
from co3d_compile.ir.graph_edits import erase_dead
from co3d_compile.ir.program import Program

JOINS = (
    open_bags, move_joined_parts, select_own_entries, join_rolls, give_rows_a_clip, join_interpolations,
    cancel_transposes, join_activations, join_norms, join_group_norms, join_attention, share_heads,
)  # fmt: skip


def join_written_out(program: Program) -> None:
    """Joins what was written out."""
    for join in JOINS:
        before = {n.name for n in program.graph.nodes}
        join(program)
        if {n.name for n in program.graph.nodes} != before:
            erase_dead(program.graph)
