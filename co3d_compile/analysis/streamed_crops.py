"""Slices and selections over time in front of results with time: with exact ends, what they leave out must be told."""

from __future__ import annotations

from torch.fx import Node

from co3d_compile.ir.aten_operators import part_taken
from co3d_compile.ir.found_parts import StreamedCrop
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import operands, place_of, returned, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import fact_of, is_stream
from co3d_compile.rules import rule_for
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.remembering import remembers_all


def streamed_crops(program: Program) -> dict[str, StreamedCrop]:
    """Gives those, by their captured names, behind which a result has time, or something remembers all that came.

    A window, and a result that is one entry, are those of the last clip, so that it does not matter there.
    """
    if program.options.boundary != "exact":
        return {}
    results = [n for n in returned(program.graph) if is_stream(n) and not fact_of(n).single]
    remembering = [n for n in program.graph.nodes if remembers_all(n)]
    captured = set(program.notes.captured)
    found: dict[str, StreamedCrop] = {}
    for node in reached([*results, *remembering], _behind):
        crop = _crop(node, node.name in captured)
        if crop is not None:
            names = [node.name] if node.name in captured else [n for n in program.names_of(node) if n in captured]
            found.update(dict.fromkeys(names, crop))
    return found


def _behind(node: Node) -> list[Node]:
    """Lists the streams that a stream is computed from; of a pad by ``cat``, the padded one alone."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    if isinstance(rule, Concatenation) and rule.kernel(node) is not None:
        return [rule.main(node)]
    return [x for x in operands(node) if is_stream(x)]


def _crop(node: Node, own: bool) -> StreamedCrop | None:
    """Finds what it leaves out; ``own`` says whether it is written so, and not as a list of indices."""
    part = part_taken(node)
    if part is None:
        return None
    x, dim, start, end = part
    place, size = fact_of(x).time, shape_of(x)[dim]
    if not is_stream(x) or place is None or place.dim != dim or (start, end) == (0, size):
        return None
    given = Arguments(node)
    first, last = given.given("start") or given.given("index"), given.given("end")
    from_end = isinstance(first, int) and first < 0
    sure = own and not (isinstance(last, int) and 0 <= last < size)
    return StreamedCrop(start, end, size, True if from_end else False if sure else None, place_of(node))
