"""Mark ends: each operator reads, outside of its operand, what it reads there in the clip.

With ``boundary="exact"`` at both ends; else before the first entry alone, where something remembers it for good.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, lcm

from torch.fx import Node

from co3d_compile.analysis.window_groups import first_to_end, meeting_windows, newest, set_newest
from co3d_compile.errors import UnsupportedError, UsageError
from co3d_compile.ir.graph_edits import delay, insert_marker
from co3d_compile.ir.index_equation import EDGE, Outside, Sliding
from co3d_compile.ir.markers import chain, history, outside, take, window
from co3d_compile.ir.node_reading import module_path, operand, returned, where
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, amend_own, fact_of, flush_steps, is_stream, misfit, own_of
from co3d_compile.rules import rule_for
from co3d_compile.rules.edge_copies import reads_copies
from co3d_compile.rules.failures import blaming
from co3d_compile.rules.remembering import remembered
from co3d_compile.rules.resample import Upsample
from co3d_compile.rules.spreading import SpreadingRule


class MarkEnds(Pass):
    """Rewrites with ``boundary="exact"``:

    1. ``conv(history(x, n))`` to ``conv(history(outside(x, 0, 0), n))`` where the clip's convolution was padded; a max
       pool reads minus infinity there, a pad its own value; what reads copies of an edge, the entry at that edge;
    2. an output that would begin before the first frame is delayed, so that its first entry comes out;
    3. a window, or a result that is one entry, is delayed until the last entry ends a step: it ends with the clip.

    Where no padding was, nothing outside is read for an entry within the range, and nothing is marked.

    With ``boundary="stream"`` the first rewrite alone, before the first entry alone, and only for what a recurrent
    layer or a sum over time reads: a layer's own padding is zero, while a stream's states have made something of zeros,
    and what remembers for good would never be right again.
    """

    requires = frozenset({"time", "unpadded", "continual", "windowed", "aligned"})
    ensures = frozenset({"ends"})

    def run(self, program: Program) -> bool:
        self._marked: dict[tuple[Node, Outside, Outside, int, int], Node] = {}
        self._back = program.options.boundary == "exact"
        if not self._back:
            self._remembered = remembered(program.graph)
            for node in self._remembered:
                with blaming(program, node):
                    self._node(program, node)
            return bool(self._marked)
        if program.inputs[0].time_dim is None:
            raise UsageError("boundary='exact' counts the frames of the first input, and that has no time.")
        used = {i.name for i in program.inputs} | {o.name for o in program.outputs}
        program.step.valid = next(n for n in ["valid", *(f"valid_{i}" for i in range(len(used) + 1))] if n not in used)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and is_stream(node):
                with blaming(program, node):
                    self._node(program, node)
        self._share()
        self._outputs(program)
        program.step.length_multiple = _length_multiple(program)
        return True

    def _node(self, program: Program, node: Node) -> None:
        rule = rule_for(node.target)
        slides = own_of(node).slides
        if node.target is history and not self._back and fact_of(operand(node)).delay < 0:
            x = operand(node)  # its first entries, made of padding alone, have come before the first frame
            node.replace_input_with(x, self._outside(program, x, node, None, None))
        elif slides is not None:
            amend_own(node, slides=replace(slides, within=True))
            kernel, (front, back) = slides.kernel, slides.outside
            reads = kernel.p > 0, self._back and (kernel.p_end > 0 or kernel.ceil)
            if any(read and value is None for read, value in zip(reads, (front, back), strict=True)):
                raise refused(node, slides, self._back)
            wanted = [v if read and v != EDGE else None for read, v in zip(reads, (front, back), strict=True)]
            if wanted != [None, None]:
                self._mark(program, node, *wanted)
        elif isinstance(rule, SpreadingRule) and rule.spread(node) is not None:
            self._mark(program, node, 0.0, 0.0)
        elif isinstance(rule, Upsample) and rule.past(node):
            self._mark(program, node, EDGE, EDGE)
        copies = fact_of(node).copies
        if (copies.lead or (copies.tail and self._back)) and node.target not in (history, take, outside):
            self._copies(program, node)

    def _mark(self, program: Program, node: Node, front: Outside, back: Outside) -> None:
        """Marks the tensor whose past a sliding operator reads."""
        *_, reader, x = node, *chain(operand(node), history, take)
        back = back if self._back else None
        early = fact_of(node).delay < 0  # what it gives before the first frame is computed, and not a state
        if self._back or fact_of(x).delay > 0 or front != 0.0 or early:  # states start at zero as they are
            reader.replace_input_with(x, self._outside(program, x, node, front, back))

    def _outside(
        self, program: Program, x: Node, reader: Node, front: Outside, back: Outside, lead: int = 0, tail: int = 0
    ) -> Node:
        key = (x, front, back, lead, tail)
        if key not in self._marked:
            place = x.next
            while place.op == "placeholder":
                place = place.next
            new = insert_marker(program, place, outside, x, front, back, lead, tail, like=x)
            new.meta["path"] = module_path(reader)
            program.record(reader, "reads its padding at the ends")
            self._marked[key] = new
        return self._marked[key]

    def _copies(self, program: Program, x: Node) -> None:
        """Makes what reads copies of the entry at an edge read that entry, once it has come."""
        fact = fact_of(x)
        lead, tail = fact.copies.lead, fact.copies.tail
        ends = (EDGE if lead else None, EDGE if tail and self._back else None)
        for user in list(x.users):
            if reads_copies(user) and (self._back or _waits(user, fact)):
                user.replace_input_with(x, self._outside(program, x, x, *ends, lead, tail))
            elif reads_copies(user) and user in self._remembered:
                raise UnsupportedError(
                    "It repeats the first entry, is read before that has come, and is remembered for good.",
                    **where(x),
                    hint="Compile with boundary='exact', or with recurrence='window'.",
                )

    def _share(self) -> None:
        """Delays and windows of a marked tensor read the marked one: within the range both are the same."""
        for (x, front, back, _, _), marked in self._marked.items():
            if EDGE in (front, back):
                continue
            for user in list(x.users):
                if user.target in (history, window) and user is not marked:
                    user.replace_input_with(x, marked)

    def _outputs(self, program: Program) -> None:
        output = program.graph.output_node()
        for node in set(returned(program.graph)):
            if is_stream(node):
                fact = fact_of(node)
                held = misfit(fact) if fact.single else max(0, -fact.delay)
                if held:
                    output.replace_input_with(node, delay(program, output, node, held))
        steps = [flush_steps(fact_of(n)) for n in returned(program.graph) if is_stream(n)]
        for group in meeting_windows(program):
            self._end_together(program, group)
            steps.append(flush_steps(fact_of(operand(first_to_end(group)))))
        program.step.flush_steps = max(steps, default=0)

    def _end_together(self, program: Program, group: list[Node]) -> None:
        """Ends windows together whose results meet, for one clip: the one that ends first decides which is the last."""
        ends = fact_of(operand(first_to_end(group)))
        frames = misfit(ends) * ends.rate
        for marker in group:
            x = operand(marker)
            held = ceil(frames / fact_of(x).rate)
            if held:
                marker.replace_input_with(x, delay(program, marker, x, held))
                set_newest(marker, newest(marker) + held)


def _waits(reader: Node, x: Fact) -> bool:
    """Says whether an operator begins no sooner than the first entry of what it reads comes."""
    while reader.target in (history, take):
        reader = next(iter(reader.users))
    began, first = fact_of(reader), x.delay + x.copies.lead
    return began.delay // began.pulse >= first // x.pulse


def _length_multiple(program: Program) -> int:
    """Finds by multiples of how many frames a sequence may differ from the clip: an up-sampled entry is for several.

    Behind a stride of 2 a clip of 15 frames has 8 entries, which are up-sampled to 16, one too many; 16 frames have as
    many as are needed. A network that cuts off the last of 16 is made for the one, and not for the other.
    """
    streams = [n for n in program.graph.nodes if is_stream(n)]
    pairs = [(fact_of(x).rate, fact_of(n).rate) for n in streams for x in n.all_input_nodes if is_stream(x)]
    return lcm(*(before.numerator for before, behind in pairs if before > behind))


def refused(node: Node, slides: Sliding, back: bool) -> UnsupportedError:
    """Makes the error of an operator whose clip form has no stream with ends, or with a first entry."""
    for_good = "" if back else ", and what remembers for good reads those in front"
    return UnsupportedError(
        f"It reads entries from inside the clip at its ends (reflected, or of the other end){for_good}.",
        operator=slides.operator,
        module_path=module_path(node),
        hint="Compile with boundary='stream'."
        if back
        else "Pad with zeros or by repeating the edge, or compile with recurrence='window'.",
    )
