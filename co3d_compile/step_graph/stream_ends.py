"""Ends of a stream: which entries of a tensor exist, and what is read where none does.

Two counters per stream say it all: steps since the first frame, and frames since the last one. An entry is within its
tensor's own range if the one is large enough and the other small enough; the thresholds are read off its fact. Without
``boundary="exact"`` a stream has no last frame, and begins with the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

import torch
from torch.fx import Node

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.constant_facts import fill_of
from co3d_compile.ir.index_equation import EDGE, Kernel
from co3d_compile.ir.layout import Layout
from co3d_compile.ir.markers import OutsideArgs, chain, outside, store
from co3d_compile.ir.time_facts import Fact, fact_of, flush_steps
from co3d_compile.step_graph.builder import Entry
from co3d_compile.step_graph.entry_operators import EntryOperators
from co3d_compile.step_graph.past_entries import InitialPast
from co3d_compile.step_graph.values_before_start import ValuesBeforeStart

aten = torch.ops.aten


class StreamEnds:
    """Flags of a step graph that has an input ``valid`` (batch, frames per step); without one, those of its start.

    Args:
        low: The step graph.
        name: Of the input ``valid``; None where there is none.
        frames: Of the first input, per step.
    """

    def __init__(self, low: EntryOperators, name: str | None, frames: int) -> None:
        self.low, self.frames = low, frames
        self.since_last: Node | None = None
        if name is None:
            first = next(n for n in low.graph.nodes if n.op == "placeholder")
            self.before = low.counter(first, 1)
            self.steps = low.call(aten.add.Tensor, self.before, 1)
            counters = {self.before: lambda t: -t, self.steps: lambda t: 1 - t}
            self.before_start = ValuesBeforeStart(low.program.module, counters)
            return
        valid = low.graph.placeholder(name)
        valid.meta["val"] = low.empty([low.batch, frames], torch.bool)
        low.path = ""
        self.before, since_last = low.count(valid), low.count(valid)
        number = low.call(aten._to_copy.default, valid, dtype=torch.int64)
        number = number if frames == 1 else low.call(aten.sum.dim_IntList, number, [1], True)
        seen = low.call(aten.ge.Scalar, low.call(aten.add.Tensor, self.before, number), 1)
        runs = low.call(aten._to_copy.default, seen, dtype=torch.int64)
        self.steps = low.call(aten.add.Tensor, self.before, runs)
        lacking = low.call(aten.sub.Tensor, low.call(aten.mul.Tensor, runs, frames), number)
        self.since_last = low.call(aten.add.Tensor, since_last, lacking)
        low.call(store, self.before, self.steps)
        low.call(store, since_last, self.since_last)
        counters = {self.before: lambda t: -t, self.steps: lambda t: 1 - t, self.since_last: lambda t: 0}
        self.before_start = ValuesBeforeStart(low.program.module, counters)

    # --- which entries exist

    def inside(
        self, fact: Fact, i: int, front: bool = True, back: bool = True, lead: int = 0, tail: int = 0
    ) -> Node | None:
        """Says whether new entry ``i`` (negative: of the past) is in the range of its tensor: bool (batch, 1).

        None where neither end is asked for.
        """
        low, flags = self.low, []
        least = 1 + ceil(Fraction(lead + fact.delay - i) / fact.pulse)
        if front:
            flags.append(low.call(aten.ge.Scalar, self.steps, least))
        if back and self.since_last is not None:
            assert fact.end is not None
            most = self.frames - floor((i - fact.delay + tail) * fact.rate + fact.end)
            if most < 1:
                raise UnsupportedError(
                    "Whether an entry is the last one is known only after it has been used.",
                    module_path=low.path,
                    hint="Compile with boundary='stream'.",
                )
            flags.append(low.call(aten.lt.Scalar, self.since_last, most))
        return low.call(aten.logical_and.default, *flags) if len(flags) == 2 else flags[0] if flags else None

    def exists(self, fact: Fact, i: int) -> Node:
        """Says whether new entry ``i`` is in the range of its tensor."""
        flag = self.inside(fact, i)
        assert flag is not None
        return flag

    def counter(self, pulse: int) -> Node:
        """Counts the entries of a tensor before this step, were its delay 0."""
        return self.before if pulse == 1 else self.low.call(aten.mul.Tensor, self.before, pulse)

    def choose(self, flag: Node | None, new: Node, old: Node | float) -> Node:
        """Chooses ``new`` where the flag is set, else ``old``; both have the batch alone in front."""
        if flag is None:
            return new
        low = self.low
        if not isinstance(old, Node):
            dtype = new.meta["val"].dtype
            old = low.constant(f"ends.{str(dtype).removeprefix('torch.')}_{old}", torch.tensor(old, dtype=dtype))
        cond = low.call(aten.reshape.default, flag, [-1, *[1] * (len(low.sizes(new)) - 1)])
        return low.call(aten.where.self, cond, new, old)

    # --- what is read where there is none

    def mark(self, node: Node) -> list[Node]:
        """Writes the new entries of the marker ``outside``."""
        args, low = OutsideArgs.of(node), self.low
        fact, new = fact_of(args.x), [low.resolve(entry) for entry in low.streams[args.x]]
        if EDGE not in (args.front, args.back):
            return [self._filled(x, fact, i, args) for i, x in enumerate(new)]
        entries = [low.batch_first(x, fact.layout)[0] for x in new]
        restore = low.batch_first(new[0], fact.layout)[1]
        if args.back is not None:
            entries = self._hold(entries, fact, 0, args.tail)
        if args.front is not None:
            for i in reversed(range(len(entries) - 1)):
                flag = self.inside(fact, i, back=False, lead=args.lead)
                entries[i] = self.choose(flag, entries[i], entries[i + 1])
        return [restore(x) for x in entries]

    def _filled(self, x: Node, fact: Fact, i: int, args: OutsideArgs) -> Node:
        """Fills entry ``i`` with numbers where it is outside of the range of its tensor."""
        front, back = args.front, args.back
        if front == back and isinstance(front, float):
            return self.where(self.inside(fact, i, lead=args.lead, tail=args.tail), x, front, fact.layout)
        if isinstance(front, float):
            x = self.where(self.inside(fact, i, back=False, lead=args.lead), x, front, fact.layout)
        if isinstance(back, float):
            x = self.where(self.inside(fact, i, front=False, tail=args.tail), x, back, fact.layout)
        return x

    def where(self, flag: Node | None, x: Node, value: float, layout: Layout | None) -> Node:
        """Chooses ``x`` where the flag is set, else a number."""
        if flag is None:
            return x
        first, restore = self.low.batch_first(x, layout)
        return restore(self.choose(flag, first, value))

    def kept(self, x: Node, step: int) -> Node:
        """Keeps, from one step (counted from 0) on, what a tensor was in it; the batch is alone in front."""
        low = self.low
        state = low.carry(x, low.features(x), of_ends=True)
        came = low.call(aten.ge.Scalar, self.steps, step + 2)
        last = self.choose(came, low.call(aten.reshape.default, state, [-1, *low.sizes(x)[1:]]), x)
        low.call(store, state, low.call(aten.reshape.default, last, [-1, low.features(x)]))
        return last

    def _hold(self, entries: Sequence[Node], fact: Fact, first: int, tail: int = 0) -> list[Node]:
        """Lists the entries from the index ``first`` on; behind the last one within the range it comes again."""
        low, results = self.low, []
        shape = low.sizes(entries[0])
        kept = low.carry(entries[0], low.features(entries[0]), of_ends=True)
        last = low.call(aten.reshape.default, kept, [-1, *shape[1:]])
        for i, x in enumerate(entries, first):
            last = self.choose(self.inside(fact, i, front=False, tail=tail), x, last)
            results.append(last)
        low.call(store, kept, low.call(aten.reshape.default, last, [-1, low.features(entries[0])]))
        return results

    def last(self, result: Node, layout: Layout | None, facts: Sequence[Fact]) -> Node:
        """Writes a result per step that does not change any more once the last entry has come."""
        facts = [f for f in facts if f.end is not None]
        place = layout.batch if layout is not None else None
        if not facts or (place is not None and (place.dim or place.outer > 1)):
            return result
        if self.low.sizes(result)[:1] != [self.low.batch]:  # where nothing is known, the batch is in front
            return result
        fact = min(facts, key=flush_steps)  # windows that meet are for one clip
        return self._hold([result], fact, int(fact.pulse) - 1)[0]

    # --- means

    def mean_of_inside(self, x: Node, fact: Fact, own: Fact, kernel: Kernel, pad: tuple[int, int], o: int) -> Node:
        """Makes a mean over ``k`` entries one over those that exist (or are padding that is counted)."""
        low = self.low
        flags = []
        for tap in range(kernel.k):
            i = (o - own.delay) * kernel.s + tap * kernel.d - kernel.p + fact.delay
            flags.append(self.inside(fact, i, lead=-pad[0], tail=-pad[1]))
        number = low.sum(
            [low.call(aten._to_copy.default, f, dtype=x.meta["val"].dtype) for f in flags if f is not None]
        )
        certain = sum(f is None for f in flags)
        number = low.call(aten.add.Tensor, number, float(certain)) if certain else number
        return self.scaled(x, low.call(aten.clamp.default, number, 1.0), kernel.k, own.layout)

    def mean_of_newest(self, x: Node, fact: Fact, i: int, entries: int, layout: Layout | None) -> Node:
        """Makes a mean over the newest entries one over those that exist."""
        low = self.low
        number = low.call(aten.add.Tensor, self.counter(int(fact.pulse)), i - fact.delay + 1)
        number = low.call(aten.clamp.default, number, 1, entries)
        return self.scaled(x, low.call(aten._to_copy.default, number, dtype=x.meta["val"].dtype), entries, layout)

    def scaled(self, x: Node, number: Node, entries: int, layout: Layout | None) -> Node:
        """Gives a mean over ``entries`` another divisor."""
        low = self.low
        first, restore = low.batch_first(x, layout)
        factor = low.call(aten.mul.Tensor, low.call(aten.reciprocal.default, number), float(entries))
        factor = low.call(aten.reshape.default, factor, [-1, *[1] * (len(low.sizes(first)) - 1)])
        return restore(low.call(aten.mul.Tensor, first, factor))

    # --- the past of a stream that has just begun

    def start(self, x: Node, new: Sequence[Entry], n: int) -> InitialPast | None:
        """Finds what the past of a tensor is at the start; None where zeros do."""
        low, fact = self.low, fact_of(x)
        layers = [OutsideArgs.of(n) for n in chain(x, outside)[:-1]]
        edge = next((args for args in layers if args.front == EDGE), None)
        over = layers[: layers.index(edge)] if edge is not None else layers  # padding in front of copies of the edge
        fill = next((args.front for args in over if isinstance(args.front, float)), None)
        if edge is None:
            entries = [low.batch_first(low.resolve(e), fact.layout)[0] for e in new]
            return self.constants(entries, fact, n, fill)
        first, _ = low.batch_first(low.resolve(low.streams[edge.node][0]), fact.layout)
        came = self.inside(fact, -1, back=False, lead=edge.lead)  # before this step: the past holds it where due

        def fix(i: int, t: int, value: Node) -> Node:
            if fill is None:
                return self.choose(came, value, first)
            flag = self.inside(fact, i - t * len(new), back=False)
            return self.choose(came, value, self.choose(flag, first, fill))

        return InitialPast(fix=fix)

    def constants(self, entries: Sequence[Node], fact: Fact, n: int, fill: float | None) -> InitialPast | None:
        """Finds the past where it does not depend on any frame.

        What lies before the first entry, and delays below 0.
        """
        pulse, known = len(entries), {}
        for back in range(1, n + 1):
            i, t = pulse - 1 - (back - 1) % pulse, -(-back // pulse)
            if i - t * pulse - fact.delay >= 0:
                known[i, t] = self.before_start.value(entries[i], t)
            elif fill is not None:
                shape = [1, *self.low.sizes(entries[i])[1:]]
                known[i, t] = torch.full(shape, fill, dtype=entries[i].meta["val"].dtype)
        numbers = set(map(fill_of, known.values()))
        if numbers <= {0.0}:
            return None
        if len(numbers) == 1 and None not in numbers:
            return InitialPast(numbers.pop())
        return InitialPast(fix=lambda i, t, value: self._fresh(value, known.get((i, t))))

    def _fresh(self, value: Node, constant: torch.Tensor | None) -> Node:
        """Chooses between a past value and the constant that it is when a stream begins."""
        if constant is None:
            return value
        low = self.low
        begun = low.call(aten.ge.Scalar, self.before, 1)
        fixed = self.choose(begun, value, low.constant(f"ends.{value.name}", constant[:1].contiguous()))
        self.before_start.same[fixed] = value
        return fixed
