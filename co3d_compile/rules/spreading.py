"""Operators whose entries each add to several outputs: transposed convolutions, overlap-and-add."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from co3d_compile.ir.index_equation import Reads
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.time_facts import Fact
from co3d_compile.rules.base import Rule, refuse_dense
from co3d_compile.step_graph.step_graph import StepGraph


@dataclass(frozen=True)
class Spread:
    """The index equation of such an operator over time: y[o] = sum over i, j with o = i*s + j*d - p of f[j](x[i]).

    With two taps and a stride of two, entry 3 adds to the outputs 6 and 7 alone.

    Args:
        k: Taps.
        s: Stride: how many outputs there are for each entry.
        p: Padding: so many outputs in front are left out.
        d: Dilation.
        more: Outputs behind those that the last entry adds to.
    """

    k: int
    s: int
    p: int
    d: int
    more: int

    def length(self, entries: int) -> int:
        """Counts the entries of the clip's output."""
        return (entries - 1) * self.s - 2 * self.p + self.d * (self.k - 1) + self.more + 1

    @property
    def reads(self) -> Reads:
        """Which entries add to an entry of the output."""
        return Reads(self.s, 1, self.s - 1 - self.d * (self.k - 1), 0, self.p)


class SpreadingRule(Rule):
    """Each new entry adds to ``s`` new outputs, and to some behind them."""

    def spread(self, node: Node) -> Spread | None:
        """Gives the index equation; None where time is not what the operator walks through."""
        raise NotImplementedError

    def tap(self, node: Node, low: StepGraph, i: int, j: int) -> Node:
        """Writes what entry ``i`` adds by tap ``j``."""
        raise NotImplementedError

    def finished(self, node: Node, low: StepGraph, total: Node) -> Node:
        """Writes an output from the sum of what was added to it."""
        return total

    def reads(self, node: Node) -> Reads:
        over = self.spread(node)
        return over.reads if over is not None else Reads()

    def flow(self, node: Node) -> Fact:
        fact, over = super().flow(node), self.spread(node)
        if over is None:
            return fact
        if over.s > 1 or fact.spacing > 1:
            refuse_dense(node)
        return fact.upsampled(over.s, over.p, over.s * fact.length - over.length(fact.length))

    def past(self, node: Node) -> int:
        """Counts the entries of the past that the newest outputs still need."""
        over = self.spread(node)
        return 0 if over is None else (over.k - 1) * over.d // over.s

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        over, total, past = self.spread(node), low.pulse(operand(node)), self.past(node)
        if over is None:
            return super().lower(node, low)
        results: list[Node | None] = []
        for o in range((total - past) * over.s):
            # the output o of this step is (newest input entry, tap) with o + past * s = i * s + j * d
            at = o + past * over.s
            parts = [
                self.tap(node, low, i, j) for j in range(over.k) for i in range(total) if i * over.s + j * over.d == at
            ]
            results.append(low.sum(parts) if parts else None)
        zero = low.zeros_like(next(r for r in results if r is not None))
        return [self.finished(node, low, zero if r is None else r) for r in results]
