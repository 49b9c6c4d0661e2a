"""Canonicalize: fewer kinds of operators, none without effect, constants computed."""

from __future__ import annotations

from co3d_compile.canonical.canonical_graph import canonicalize
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program


class Canonicalize(Pass):
    """Rewrites the captured graph into a smaller language:

    1. what does nothing in inference (clone, dropout, assertions, …) goes;
    2. a pool over a whole axis is a mean or a maximum: ``avg_pool3d(x, [16, 7, 7])`` to ``mean(x, [2, 3, 4])``;
    3. ``slice_scatter``, ``select_scatter`` are slices and ``cat``; ``split`` is slices;
    4. gathering by evenly spaced constant indices is a slice;
    5. what does not depend on the input is computed; of parameters once, where it is computed several times.
    """

    ensures = frozenset({"canonical"})

    def run(self, program: Program) -> bool:
        return canonicalize(program)
