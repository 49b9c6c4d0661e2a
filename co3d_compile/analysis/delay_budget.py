"""Which kernels must read less of the future for a network to answer in time, and how much less."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from co3d_compile.analysis.cheapest_cut import cheapest_cut
from co3d_compile.analysis.delay_model import DelayModel, Facts
from co3d_compile.analysis.kernel_future import Change, FutureKernel
from co3d_compile.errors import UnsupportedError
from co3d_compile.support.readable_numbers import plural

Left = Mapping[Node, int]


class DelayBudget:
    """The search for what to change, given how kernels are changed.

    A network is late by its longest paths alone. So each round finds, of all paths that are too long, the kernels whose
    future weighs least and that every such path goes through one of; in the end each kernel is given back as much of
    its future as leaves the network in time, first those whose future weighs most.

    Args:
        model: The delays of the program.
        budget: Frames from the newest one back to what an output is about, at most.
        by: How kernels are changed: ``delay_by``.
    """

    def __init__(self, model: DelayModel, budget: int, by: str) -> None:
        self.model, self.kernels, self.budget, self.by = model, model.kernels, budget, by

    def left(self) -> dict[Node, int]:
        """Chooses the kernels to be changed, and how many entries of the future each keeps.

        Raises:
            UnsupportedError: Even with no future at all some output would be too late.
        """
        everything = dict.fromkeys(self.kernels, 0)
        self._refuse(everything)
        left: dict[Node, int] = {}
        while late := self._late(facts := self._facts(left)):
            before = self.model.critical(late, facts)
            # a little for each kernel: of two ways that weigh the same the one with fewer kernels
            costs = {n: k.share() + 1e-6 for n, k in self.kernels.items() if n in before and n not in left}
            cut = cheapest_cut(before, late, costs)
            left = {**left, **dict.fromkeys(cut, 0)} if cut else everything
        return self._given_back(left)

    def changes(self, left: Left) -> dict[Node, Change]:
        """Says what is done to each kernel."""
        return {n: self.kernels[n].change(future, self.by) for n, future in left.items()}

    def _facts(self, left: Left) -> Facts:
        return self.model.facts(self.changes(left))

    def _late(self, facts: Facts) -> list[Node]:
        return [n for n in self.model.outputs if self.model.frames(n, facts) > self.budget]

    def _refuse(self, everything: Left) -> None:
        facts = self._facts(everything)
        if late := self._late(facts):
            least = max(self.model.frames(n, facts) for n in self.model.outputs)
            raise late_error(self.budget, least, self.model.waiting(late, facts))

    def _given_back(self, left: dict[Node, int]) -> dict[Node, int]:
        """Gives the kernels back as much of their future as leaves the network in time."""

        def in_time(node: Node, future: int) -> bool:
            return not self._late(self._facts({**left, node: future}))

        for node in sorted(left, key=lambda n: -self.kernels[n].share()):
            kernel: FutureKernel = self.kernels[node]
            left[node] = next(f for f in range(kernel.reach, -1, -1) if in_time(node, f))
        return {n: future for n, future in left.items() if future < self.kernels[n].reach}


def late_error(budget: int, least: int, waiting: list[str]) -> UnsupportedError:
    """Makes the error of a budget that is too small."""
    why = f" What makes it late has no causal form: {', '.join(waiting[:4])}." if waiting else ""
    return UnsupportedError(
        f"max_delay={budget} is less than the {plural(least, 'frame')} that this network needs at least.{why}",
        hint=f"Give max_delay={least} or more.",
    )
