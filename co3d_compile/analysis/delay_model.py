"""How late the tensors of an annotated program are where some of its kernels read less of the future."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil

from torch.fx import Node

from co3d_compile.analysis.kernel_future import Change, FutureKernel
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.index_equation import EDGE
from co3d_compile.ir.markers import hold
from co3d_compile.ir.node_reading import operand, operands, place_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, fact_of, flush_steps, is_stream, is_window, misfit
from co3d_compile.rules import rule_of
from co3d_compile.rules.combine import Concatenation

Facts = Mapping[Node, Fact]


@dataclass
class DelayModel:
    """The delays of an annotated program, without annotating it again.

    Args:
        program: An annotated program; nothing in it is changed.
        kernels: The kernels whose future may change.
    """

    program: Program
    kernels: Mapping[Node, FutureKernel]
    outputs: list[Node] = field(init=False)

    def __post_init__(self) -> None:
        output = self.program.graph.output_node()
        self.outputs = [n for n in output.all_input_nodes if is_stream(n) or is_window(n)]

    def facts(self, changes: Mapping[Node, Change]) -> Facts:
        """Computes the facts of all streaming tensors with some kernels changed."""
        found: dict[Node, Fact] = {}
        for node in filter(is_stream, self.program.graph.nodes):
            found[node] = self._fact(node, found, changes.get(node))
        return found

    def _fact(self, node: Node, found: Facts, change: Change | None) -> Fact:
        own, operands = fact_of(node), self._operands(node)
        if not operands:
            return own
        rule, x = rule_of(node), found[operands[0]]
        if change is not None:
            moved = self.kernels[node].through(x, change)
        elif node.target is hold:
            moved = x.held_back(bool(node.args[1]))
        elif rule is not None and (kernel := rule.kernel(node)) is not None and x.layout is not None:
            front, back = rule.outside(node)
            moved = x.through(kernel, x.layout, (front == EDGE, back == EDGE))
        else:
            latest = max(operands, key=lambda n: found[n].delay)
            before = max(fact_of(n).delay for n in operands)
            ratio = own.pulse / fact_of(latest).pulse
            later = ceil((found[latest].delay - before) * ratio)
            return replace(own, delay=own.delay + later) if later else own
        return replace(own, delay=moved.delay, copies=moved.copies, end=moved.end)

    def _operands(self, node: Node) -> list[Node]:
        """Lists what a streaming operator waits for."""
        rule, streams = rule_of(node), [n for n in node.all_input_nodes if is_stream(n)]
        if not streams:
            return []
        if isinstance(rule, Concatenation) and rule.kernel(node) is not None:
            return [rule.main(node)]
        slides = rule is not None and rule.kernel(node) is not None
        return [operand(node)] if slides and is_stream(operand(node)) else streams

    def frames(self, output: Node, facts: Facts) -> int:
        """Counts the frames from the newest one back to what the newest entry of an output is about."""
        if is_stream(output):
            fact = facts[output]
            places = fact.time.inner if fact.time is not None and fact.time.outer == 1 and not fact.single else 1
            return frames_late(fact.told * places, fact.rate / places)
        windows = [facts[n] for n in self._windowed(output)]
        lag = max((f.lag for f in windows), default=Fraction(0))
        newest = [(f.delay + ceil((lag - f.lag) / f.rate) - f.crop, f.rate) for f in windows]
        if windows and windows[0].end is not None:  # a clip ends with a step
            ends = min(windows, key=flush_steps)
            newest = [(late + ceil(misfit(ends) * ends.rate / rate), rate) for late, rate in newest]
        return frames_late(*min(newest, default=(0, Fraction(1))))

    def _windowed(self, output: Node) -> list[Node]:
        """Lists the streams that a result on windows comes from."""
        return [n for n in reached([output], lambda n: [] if is_stream(n) else operands(n)) if is_stream(n)]

    def critical(self, outputs: Iterable[Node], facts: Facts) -> dict[Node, list[Node]]:
        """Finds what some outputs wait for: for each node on these paths those before it that come last."""
        before: dict[Node, list[Node]] = {}
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node in before:
                continue
            if is_window(node):
                streams = self._windowed(node)
                latest = max((facts[n].lag for n in streams), default=None)
                before[node] = [n for n in streams if facts[n].lag == latest]
            else:
                operands = self._operands(node)
                last = max((facts[n].delay for n in operands), default=None)
                before[node] = [n for n in operands if facts[n].delay == last]
            stack += before[node]
        return before

    def waiting(self, outputs: Iterable[Node], facts: Facts) -> list[str]:
        """Lists the operators that some outputs wait for, as people read them."""
        found: dict[str, None] = {}
        for node, others in self.critical(outputs, facts).items():
            if is_stream(node) and others:
                late = facts[node].delay * facts[node].rate - max(facts[n].delay * facts[n].rate for n in others)
                if late > 0:
                    found[place_of(node)] = None
        return list(found)


def frames_late(late: int, rate: Fraction) -> int:
    """Counts the frames from the newest one back to an entry's own, which lags so many entries of ``rate`` frames."""
    return max(0, ceil((1 + late) * rate) - 1)
