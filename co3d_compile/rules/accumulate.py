"""Sums, products and extremes of all entries so far: over time they are a state, exact from the first entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.markers import store
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.time_facts import Fact, NoExtension, combine, fact_of, known, touches_time
from co3d_compile.rules.base import Rule, register
from co3d_compile.rules.order import Order
from co3d_compile.rules.recurrent import started
from co3d_compile.rules.reduce import AlongDims
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
NEUTRAL: dict[Target, tuple[OpOverload, float]] = {
    aten.cumsum.default: (aten.add.Tensor, 0.0),
    aten.cumprod.default: (aten.mul.Tensor, 1.0),
}
EXTREMES: dict[Target, tuple[OpOverload, OpOverload]] = {
    aten.cummax.default: (aten.maximum.default, aten.ge.Tensor),
    aten.cummin.default: (aten.minimum.default, aten.le.Tensor),
}


class OverTime(Rule):
    """What is accumulated over time streams: the result so far is a state."""

    def flow(self, node: Node) -> Fact:
        x = operand(node)
        place = known(x).time
        if self.remembers_all(node) and (place is None or not place.alone or fact_of(x).spacing > 1):
            raise NoExtension("accumulates over a dim into which time is folded")
        return combine([fact_of(x)], known(x))

    def remembers_all(self, node: Node) -> bool:
        return any(touches_time(x, dims) for x, dims in self.mixes(node))


@register(*NEUTRAL, aten.logcumsumexp.default)
class Accumulation(OverTime, AlongDims):
    """The sum, product or log of summed exponentials of all entries so far, as in causal squeeze-and-excitation."""

    def lower(self, node: Node, low: StepGraph) -> list[Node]:
        if not self.remembers_all(node):
            return super().lower(node, low)
        rows = Rows(node, low, node.meta["val"].dtype)
        if node.target not in NEUTRAL:
            return rows.handed_on(lambda total, row: _log_of_sum(low, total, row), begun(rows, low))
        operator, neutral = NEUTRAL[node.target]
        live = started(operand(node), low)
        if live is not None:
            nothing = low.constant(f"{node.name}_neutral", torch.tensor(neutral, dtype=rows.dtype))
            rows.new = [low.call(aten.where.self, flag, row, nothing) for flag, row in zip(live, rows.new, strict=True)]
        return rows.handed_on(lambda total, row: low.call(operator, total, row), initial=neutral)


@register(*EXTREMES)
class Extreme(OverTime, Order):
    """The largest or smallest of all entries so far, and where it was."""

    def flow(self, node: Node) -> Fact:
        if self.remembers_all(node) and operand(node).meta["val"].dtype is torch.bool:
            raise NoExtension("orders flags")
        return super().flow(node)

    def lower_items(self, node: Node, low: StepGraph) -> list[list[Node]]:
        if not self.remembers_all(node):
            return super().lower_items(node, low)
        extreme, replaces = EXTREMES[node.target]
        rows = Rows(node, low, operand(node).meta["val"].dtype)
        flags, wins = begun(rows, low), []

        def both(total: Node, row: Node) -> Node:
            nan = low.call(aten.ne.Tensor, row, row)
            wins.append(low.call(aten.logical_or.default, low.call(replaces, row, total), nan))
            return low.call(extreme, total, row)

        values = rows.handed_on(both, flags)
        if not any(user.args[1] == 1 for user in node.users):
            return [values, []]
        rows.dtype, places = torch.int64, rows.indices()
        rows.new = [low.call(aten.expand.default, place, [-1, rows.features]) for place in places]
        last = iter(wins)
        return [values, rows.handed_on(lambda old, new: low.call(aten.where.self, next(last), new, old), flags)]


class Rows:
    """The new entries of an operand as rows (batch, features), to be accumulated.

    Attributes:
        new: The rows, one for each entry.
    """

    def __init__(self, node: Node, low: StepGraph, dtype: torch.dtype) -> None:
        self.x, self.low, self.dtype = operand(node), low, dtype
        layout = fact_of(self.x).layout
        entries = [low.batch_first(low.entry(self.x, i), layout)[0] for i in range(low.pulse(self.x))]
        self.first, self._restore = low.batch_first(low.entry(self.x, 0), layout)
        self.features = low.features(self.first)
        self.new = [low.call(aten.reshape.default, entry, [-1, self.features]) for entry in entries]

    def handed_on(
        self, turn: Callable[[Node, Node], Node], begun: Sequence[Node] | None = None, initial: float = 0.0
    ) -> list[Node]:
        """Computes the result for each new entry from the one before; where ``begun`` is false, it is its row."""
        low, results = self.low, []
        read = total = low.carry(self.new[0], self.features, initial=initial)
        for i, row in enumerate(self.new):
            after = turn(total, row)
            total = after if begun is None else low.call(aten.where.self, begun[i], after, row)
            results.append(self._restore(low.call(aten.reshape.default, total, [-1, *low.sizes(self.first)[1:]])))
        low.call(store, read, total)
        return results

    def indices(self) -> list[Node]:
        """The index of each new entry, (batch, 1) of int64."""
        low, pulse = self.low, len(self.new)
        seen, late = low.counter(self.first, pulse), fact_of(self.x).delay
        return [low.call(aten.add.Tensor, seen, i - late) for i in range(pulse)]


def begun(rows: Rows, low: StepGraph) -> list[Node]:
    """Says of each new entry whether it is behind the stream's first one, (batch, 1) of bool."""
    return [low.call(aten.gt.Scalar, index, 0) for index in rows.indices()]


def _log_of_sum(low: StepGraph, a: Node, b: Node) -> Node:
    """Computes ``log(exp(a) + exp(b))``, where both may be minus infinity."""
    apart = low.call(aten.neg.default, low.call(aten.abs.default, low.call(aten.sub.Tensor, a, b)))
    nothing = low.constant(f"zero.{str(a.meta['val'].dtype)[6:]}", torch.zeros((), dtype=a.meta["val"].dtype))
    apart = low.call(aten.where.self, low.call(aten.eq.Tensor, a, b), nothing, apart)
    more = low.call(aten.log1p.default, low.call(aten.exp.default, apart))
    return low.call(aten.add.Tensor, low.call(aten.maximum.default, a, b), more)
