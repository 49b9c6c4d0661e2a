"""Windows and gates: what looks at the whole clip looks at the newest entries instead."""

from __future__ import annotations

from torch.fx import Node

from co3d_compile.analysis.window_groups import frames_to_box
from co3d_compile.ir.box_operators import ALIGN, BOXES, POOL
from co3d_compile.ir.graph_edits import fake_mode, insert_marker, replace, shape_of_call
from co3d_compile.ir.markers import shift, window
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, Kind, amend, fact_of, is_stream, is_window
from co3d_compile.rules import rule_for, rule_of
from co3d_compile.rules.failures import blaming


class WindowsAndGates(Pass):
    """Rewrites, for an operator that was found to be a window:

    1. ``mean(x, [2, 3, 4])`` to ``mean(mean(x, [3, 4]), [2])``: what is remembered is pooled over space first;
    2. each of its streaming operands ``x`` to ``window(x, T)``: all behind it is as in the clip.

    Boxes are renumbered, ``shift(boxes, p)``: they belong to the middle entry of the window whose features they are cut
    out of, or to its newest one (``box_frame``).

    Gates were marked by the pass annotate_time; their pools are split alike.
    """

    requires = frozenset({"time", "continual"})
    ensures = frozenset({"windowed"})

    def run(self, program: Program) -> bool:
        modified = False
        for node in list(program.graph.nodes):
            if node.op == "call_function" and is_window(node) and any(is_stream(n) for n in node.all_input_nodes):
                with blaming(program, node):
                    rule = rule_of(node)
                    parts = rule.split(node) if rule is not None and len(node.all_input_nodes) == 1 else None
                    target = self._split(program, node, parts) if parts is not None else node
                for x in [n for n in target.all_input_nodes if is_stream(n)]:
                    target.replace_input_with(x, insert_marker(program, target, window, x, fact_of(x).length, like=x))
                modified = True
            if node.target in (ALIGN, POOL) and (is_window(node) or is_stream(node)):
                modified |= self._renumber(program, node)
        return modified

    def _renumber(self, program: Program, node: Node) -> bool:
        """Gives boxes the numbers of the clips that they belong to."""
        boxes = operand(node, BOXES)
        reader, x = (boxes, operand(boxes)) if boxes.target is window else (node, boxes)
        frames = frames_to_box(operand(node), program.options.box_frame == "newest")
        if not is_stream(x) or not (entries := int(frames / fact_of(x).rate)):
            return False
        marker = insert_marker(program, reader, shift, x, -entries, like=x)
        amend(marker, delay=fact_of(x).delay + entries, cut=fact_of(x).cut + entries)
        reader.replace_input_with(x, marker)
        return True

    def _split(self, program: Program, node: Node, parts: tuple[Node, Node]) -> Node:
        space, over_time = parts
        mode = fake_mode(program)
        for part in parts:
            part.meta = {k: v for k, v in node.meta.items() if k != "val"}
            part.meta["val"] = shape_of_call(mode, part.target, part.args, part.kwargs)
        rule = rule_for(space.target)
        assert rule is not None
        space.meta[KEY] = rule.flow(space)
        assert fact_of(space).kind is Kind.STREAM
        replace(node, over_time)
        return over_time
