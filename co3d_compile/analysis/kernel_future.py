"""Convolutions and pools over time that read the future, and how much of their weights does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from co3d_compile.ir.aten_operators import CONVOLUTIONS
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, fact_of, is_stream, known
from co3d_compile.rules import rule_of
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.conv import Convolution
from co3d_compile.rules.pool import Pool


@dataclass(frozen=True)
class Change:
    """What makes a kernel read less of the future: it stands ``later`` entries later, or leaves out its last taps."""

    later: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class FutureKernel:
    """A convolution or pool over time that reads entries behind the one that it is computed for.

    Args:
        node: The operator.
        kernel: Its index equation.
        reach: Entries of its future that it reads.
        taps: The share of the weights that each tap has.
    """

    node: Node
    kernel: Kernel
    reach: int
    taps: Sequence[float]

    @property
    def time_dim(self) -> int:
        """The dim of the operand that is time."""
        place = known(operand(self.node)).time
        assert place is not None
        return place.dim

    def future(self, left: int = 0) -> int:
        """Counts the taps that read more than ``left`` entries of the future."""
        offset = (self.kernel.k - 1) * self.kernel.d - self.reach
        return sum(i * self.kernel.d - offset > left for i in range(self.kernel.k))

    def share(self, left: int = 0) -> float:
        """Says which share of the weights these taps have."""
        count = self.future(left)
        return sum(self.taps[len(self.taps) - count :]) if count else 0.0

    def change(self, left: int, by: str) -> Change:
        """Finds the change that leaves at most so many entries of the future."""
        return Change(later=self.reach - left) if by == "shift" else Change(dropped=self.future(left))

    def through(self, x: Fact, change: Change) -> Fact:
        """The fact of the result: a pad in front, the kernel, and a crop of what a clip has too many of."""
        kernel, layout = self.kernel, x.layout
        assert layout is not None
        front, back = kernel.p + change.later, kernel.p_end - change.later - change.dropped * kernel.d
        edge = "replication_pad" in str(operand(self.node).target) and kernel.p == 0
        padded = x.through(Kernel(p=front, p_end=max(0, back)), layout, (edge, edge))
        slid = padded.through(replace(kernel, k=kernel.k - change.dropped, p=0, p_end=0), layout)
        more = slid.length - kernel.length(x.length)
        return slid.through(Kernel(p_end=-more), layout) if more > 0 else slid


def future_kernels(program: Program) -> list[FutureKernel]:
    """Finds all of an annotated program."""
    found = (_future_kernel(program, n) for n in program.graph.nodes if n.op == "call_function" and is_stream(n))
    return [kernel for kernel in found if kernel is not None]


def _future_kernel(program: Program, node: Node) -> FutureKernel | None:
    rule = rule_of(node)
    kernel = rule.kernel(node) if isinstance(rule, (Convolution, Pool)) else None
    if kernel is None or kernel.k == 1:
        return None
    reach = (kernel.k - 1) * kernel.d - kernel.p - _early(operand(node))
    return FutureKernel(node, kernel, reach, _taps(program, node, kernel)) if reach > 0 else None


def _early(x: Node) -> int:
    """Counts the entries by which an operand comes early, because of what was padded in front of it."""
    early = most = 0
    while True:
        rule, streams = rule_of(x), [n for n in x.all_input_nodes if is_stream(n)]
        kernel = rule.kernel(x) if rule is not None and streams else None
        if kernel is not None and kernel.s == 1:
            x = rule.main(x) if isinstance(rule, Concatenation) else operand(x)
            early += kernel.p - (kernel.k - 1) * kernel.d
        elif kernel is None and len(streams) == 1 and fact_of(streams[0]).pulse == fact_of(x).pulse:
            x = streams[0]
        else:
            return most
        most = max(most, early)


def _taps(program: Program, node: Node, kernel: Kernel) -> Sequence[float]:
    """Gives the share of the sum of absolute weights; for a pool, and where weights are computed, each has the same."""
    if node.target in CONVOLUTIONS and operand(node, 1).op == "get_attr":
        weight = program.constant(operand(node, 1)).double().abs()
        axis = weight.dim() - (len(fact_of(operand(node)).layout.dims) - _time_dim(node))  # type: ignore[union-attr]
        sums = weight.sum([d for d in range(weight.dim()) if d != axis])
        if float(sums.sum()) > 0:
            return [float(share) for share in sums / sums.sum()]
    return [1 / kernel.k] * kernel.k


def _time_dim(node: Node) -> int:
    place = known(operand(node)).time
    assert place is not None
    return place.dim
