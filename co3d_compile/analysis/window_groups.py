"""Windows that belong together, because their results meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction

from torch.fx import Node

from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.markers import window
from co3d_compile.ir.node_reading import operand, operands
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, Kind, fact_of, flush_steps


def newest(marker: Node) -> int:
    """The delay of the newest entry that a window reads, once windows that meet are aligned."""
    delay = Arguments(marker).given("newest")
    return delay if isinstance(delay, int) else fact_of(operand(marker)).delay


def set_newest(marker: Node, delay: int) -> None:
    """Notes the delay of the newest entry that a window reads."""
    marker.args = (*marker.args[:2], delay)


def windows_of(result: Node, fact: Callable[[Node], Fact] = fact_of) -> list[Node]:
    """Finds the window markers that a result comes from."""

    def onward(n: Node) -> list[Node]:
        return operands(n) if n.target is not window and fact(n).kind is Kind.WINDOW else []

    return [n for n in reached([result], onward) if n.target is window]


def frames_to_box(features: Node, newest_one: bool) -> Fraction:
    """Counts the frames of the first input from the start of the clip to the entry that boxes belong to.

    Args:
        features: What the boxes are cut out of.
        newest_one: Whether that is the newest entry of the window from which the features come, not its middle one.
    """
    read = [fact_of(operand(m)) for m in windows_of(features)] or [fact_of(features)]
    return max((f.crop + (f.length - 1 if newest_one else f.length // 2) * f.spacing) * f.rate for f in read)


def first_to_end(group: list[Node]) -> Node:
    """Finds, of windows that meet, the one whose last entry comes first."""
    return min(group, key=lambda marker: flush_steps(fact_of(operand(marker))))


def meeting_windows(program: Program) -> Iterable[list[Node]]:
    """Groups the window markers whose results meet in some operator."""
    leader: dict[Node, Node] = {}

    def find(n: Node) -> Node:
        while leader[n] is not n:
            n = leader[n]
        return n

    reached: dict[Node, Node] = {}
    for node in program.graph.nodes:
        if node.target is window:
            leader[node] = node
            reached[node] = node
            continue
        if fact_of(node).kind is not Kind.WINDOW:
            continue
        roots = [find(reached[n]) for n in node.all_input_nodes if n in reached]
        for other in roots[1:]:
            leader[find(other)] = find(roots[0])
        if roots:
            reached[node] = roots[0]
    groups: dict[Node, list[Node]] = {}
    for marker in leader:
        groups.setdefault(find(marker), []).append(marker)
    return groups.values()
