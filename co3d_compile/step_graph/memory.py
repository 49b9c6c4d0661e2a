"""The past of a step graph: which entries of earlier steps it keeps, and how."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.layout import Layout
from co3d_compile.ir.markers import chain, fifo, history, outside, take
from co3d_compile.ir.node_reading import operand, whole
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact
from co3d_compile.step_graph.builder import Entry
from co3d_compile.step_graph.entry_operators import MANY, EntryOperators
from co3d_compile.step_graph.past_entries import InitialPast, PastEntries
from co3d_compile.step_graph.stream_ends import StreamEnds

SMALL = 16384  # elements of an entry up to which its past is kept in one tensor instead of one per entry


class Memory(EntryOperators):
    """Entries of earlier steps, as states.

    Attributes:
        ends: The flags of both ends of the stream; None with ``boundary="stream"``.
        for_good: What something behind it remembers for good.
        boxes: Inputs with rows of their own in each step.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.ends: StreamEnds | None = None
        self._start: StreamEnds | None = None
        self.for_good: frozenset[Node] = frozenset()
        self._capacity: dict[Node, int] = {}
        self.boxes: set[Node] = set()

    @property
    def start(self) -> StreamEnds:
        """The flags of where the stream begins: those of its ends where it has both."""
        if self.ends is None and self._start is None:
            self._start = StreamEnds(self, None, self.program.inputs[0].pulse)
        start = self.ends or self._start
        assert start is not None
        return start

    def remembered(self, x: Node) -> tuple[int, bool]:
        """Finds what is known of the past that a convolution reads: entries that others keep too.

        Whether they must be kept.
        """
        marker = chain(x, take)[-1]
        if marker.target is not history:
            return 0, False
        source, entries = operand(marker), self.streams[marker]
        others = [u for u in source.users if u.target is history and u is not marker]
        shared = max((whole(u, 1) for u in others), default=0)
        kept = isinstance(entries, PastEntries) and (entries.queue is not None or entries.start is not None)
        return shared, kept

    def capacity(self, marker: Node, n: int) -> None:
        """Notes how far back a tensor is read, so that its readers share one queue."""
        self._capacity[marker] = max(n, self._capacity.get(marker, 0))

    def past(
        self,
        new: Sequence[Entry],
        n: int,
        source: Node | None = None,
        layout: Layout | None = None,
        start: InitialPast | None = None,
    ) -> PastEntries:
        """Lists the ``n`` past and the new entries.

        Small entries with a long past are kept in one queue, others in one state per entry.
        """
        first = self.resolve(new[0])
        capacity = max(n, self._capacity.get(source, 0)) if source is not None else n
        first_dim = (layout is None or leading(layout)) and not self._of_boxes(first)
        if self.ends is not None and source is not None:
            start = self.ends.start(source, new, n)
        elif source is not None and source.target is outside:
            start = self.start.start(source, new, n)
        many = n > 0 and len(new) >= MANY and len(self.sizes(first)) <= 3
        few = (n < 2 or capacity < 4) and not many
        if few or self.features(first) > SMALL or not first_dim or (start and start.number is None):
            return PastEntries(self, list(new), n, layout, None, start)
        queue = self.queue([self.resolve(x) for x in new], capacity, (start and start.number) or 0.0)
        return PastEntries(self, list(new), n, layout, queue)

    def _of_boxes(self, node: Node) -> bool:
        """Says whether an entry is made of boxes, and so may have more rows than the next one.

        They have no common queue.
        """
        return bool(self.boxes) and not self.boxes.isdisjoint(computed_from(node))

    def opening(self, node: Node) -> StreamEnds | None:
        """The flags of where the stream begins, if what a node is there is ever read."""
        return self.start if self.ends is not None or node in self.for_good else None

    def newest(
        self, ends: StreamEnds, new: Sequence[Node], fact: Fact, layout: Layout | None, past: int, value: float
    ) -> PastEntries:
        """Puts a number in place of the entries before the first, among past and new ones."""
        marked = [ends.where(ends.inside(fact, i, back=False), x, value, layout) for i, x in enumerate(new)]
        firsts = [self.batch_first(x, layout)[0] for x in marked]
        return self.past(marked, past, None, layout, ends.constants(firsts, fact, past, value))

    def counter(self, like: Node, pulse: int) -> Node:
        """Counts the entries before this step, (batch, 1) of int64, where ``pulse`` come with each."""
        return self.ends.counter(pulse) if self.ends is not None else super().counter(like, pulse)

    def queue(self, new: Sequence[Node], capacity: int, initial: float = 0.0) -> Node:
        """Makes a queue (batch, capacity + new entries, features)."""
        queue = self.call(fifo, self.rows(new), capacity, initial)
        self.queued[queue] = new
        return queue


def leading(layout: Layout) -> bool:
    """Says whether the batch comes first in an entry."""
    place = layout.entry().batch
    return place is not None and place.dim == 0 and place.outer == 1
