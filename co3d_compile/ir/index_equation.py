"""The index equation of an operator that slides over time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor


@dataclass(frozen=True)
class Reads:
    """Which entries one is computed from: ``(o*down + pad + first) // up`` to ``(o*down + pad + last) // up`` for o.

    ``Kernel(k=3, p=1)`` reads ``Reads(1, 1, 0, 2, -1)``: entry 5 is computed from the entries 4 to 6. Of what makes two
    entries of each, ``Reads(2, 1)``, the entries 6 and 7 are computed from entry 3, each in its own way.

    Args:
        up, down: Of so many entries that are read (``down``) there are so many (``up``).
        first, last: Where it begins and ends to read, without padding.
        pad: What padding adds to both.
    """

    up: int = 1
    down: int = 1
    first: int = 0
    last: int = 0
    pad: int = 0

    def of(self, o: int) -> range:
        """The numbers of the entries that entry ``o`` is computed from."""
        at = o * self.down + self.pad
        return range((at + self.first) // self.up, (at + self.last) // self.up + 1)

    def way(self, o: int) -> int:
        """Says in which way entry ``o`` is computed: two that are computed alike have the same number."""
        return (o * self.down + self.pad) % self.up


@dataclass(frozen=True)
class Kernel:
    """The index equation of an operator over time: ``y[o] = f(x[o*s + i*d - p], i = 0 … k-1)``.

    ``Kernel(k=3, p=1)`` is ``y[o] = f(x[o-1], x[o], x[o+1])``, and ``Kernel(s=2, p=-1)`` is the slice ``x[1::2]``.

    Args:
        k: Taps.
        d: Dilation in entries.
        s: Stride in entries.
        p: Padding in front (negative: a crop).
        p_end: Padding at the end; matters for the length of a clip only.
        ceil: Whether the length of the clip's output is rounded up (pools).
    """

    k: int = 1
    d: int = 1
    s: int = 1
    p: int = 0
    p_end: int = 0
    ceil: bool = False

    @property
    def trivial(self) -> bool:
        """Whether every entry is computed from the entry of the same index alone."""
        return self.k == 1 and self.s == 1 and self.p == 0

    @property
    def identity(self) -> bool:
        """Whether the output has the entries of the input, and no others."""
        return self.trivial and self.p_end == 0

    def dense(self, spacing: int) -> Kernel:
        """The same kernel where entries lie ``spacing`` frames apart and every frame gives a result.

        ``Kernel(k=3, s=2, p=1).dense(2)`` is ``Kernel(k=3, d=2, p=2)``.
        """
        return replace(self, d=self.d * spacing, s=1, p=self.p * spacing, p_end=self.p_end * spacing)

    def length(self, entries: int) -> int:
        """Counts the entries of the clip's output: of 8 entries ``Kernel(k=3)`` makes 6, and ``Kernel(k=2, s=2)`` 4."""
        span = entries + self.p + self.p_end - (self.k - 1) * self.d - 1
        result = (ceil(span / self.s) if self.ceil else floor(span / self.s)) + 1
        if self.ceil and (result - 1) * self.s >= entries + self.p:
            result -= 1
        return result

    def delay(self, delay: int) -> int:
        """Computes the delay of the output, in its own entries, for a delay of the input.

        ``Kernel(k=3, p=1)`` waits for one entry of its future: ``delay(0)`` is 1. A causal one, with ``p=2``, waits for
        none.
        """
        return -1 - (self.p - 1 - delay - (self.k - 1) * self.d) // self.s

    def slack(self, delay: int, late: int) -> int:
        """Counts the input's entries that a step does not need yet, for its delay and the output's (``late``).

        ``Kernel(k=3, p=1).slack(0, 2)`` is 1: the output is one entry later than it could be.
        """
        return (1 + late) * self.s - 1 - delay + self.p - (self.k - 1) * self.d

    @property
    def reads(self) -> Reads:
        """Which entries an entry of the output is computed from."""
        return Reads(1, self.s, 0, (self.k - 1) * self.d, -self.p)

    @property
    def reach(self) -> int:
        """Entry o of the output is within its range iff entry ``o*s + reach`` is not behind the input's end."""
        last = (self.k - 1) * self.d - self.p - self.p_end
        return max(last - self.s + 1, -self.p) if self.ceil else last


Outside = float | str | None
"""A number, ``EDGE``, or None for what no entry can know before it is too late (reflection, the other end)."""
EDGE = "edge"


@dataclass(frozen=True)
class EdgeCopies:
    """Entries at the edges of a tensor that are copies of the one beside them: the edge, repeated.

    Behind a replicate pad of two in front ``lead`` is 2: the entries 0 and 1 are copies of entry 2.

    Args:
        lead: First entries that are copies of the one behind them, which may come after them.
        tail: Last entries that are copies of the one before them.
    """

    lead: int = 0
    tail: int = 0

    def __bool__(self) -> bool:
        return self.lead > 0 or self.tail > 0

    def carried(self, kernel: Kernel, edges: tuple[bool, bool]) -> bool:
        """Says whether copies are copies behind a kernel too.

        Args:
            kernel: The index equation.
            edges: Whether its padding in front, and at the end, repeats the entry at the edge.
        """
        front, back = kernel.p <= 0 or edges[0], kernel.p_end <= 0 or edges[1]
        return kernel.k == kernel.s == 1 and (front or not self.lead) and (back or not self.tail)

    def padded(self, kernel: Kernel, edges: tuple[bool, bool]) -> EdgeCopies:
        """The copies behind a pad, or a crop: those that are left, and those that it adds."""
        sides = ((self.lead, kernel.p, edges[0]), (self.tail, kernel.p_end, edges[1]))
        return EdgeCopies(*(max(0, there + p) if there or edge else 0 for there, p, edge in sides))


NO_COPIES = EdgeCopies()


@dataclass(frozen=True)
class Sliding:
    """How an operator of the stream slides, once its padding over time is out of its arguments.

    It is part of the operator's fact: a copy of the node has it too, and what is computed from its result has not.

    Args:
        kernel: The clip's index equation.
        outside: What it reads before its operand's first entry, and behind its last one.
        operator: The operator of the model, for people.
        within: Whether it must tell the entries within its operand's range from those outside.
    """

    kernel: Kernel
    outside: tuple[Outside, Outside]
    operator: str
    within: bool = False
