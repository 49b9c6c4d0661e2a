"""What is known of each tensor: where time is in it and how it flows. One fact per node, in ``node.meta["co3d"]``.

The vocabulary is that of ``docs/semantics.md``: a tensor has entries n = 0, 1, 2, …; after step j its newest entry
is ``(j + 1) * pulse - 1 - delay``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from math import ceil, floor
from typing import Any

from torch.fx import Node

from co3d_compile.ir.constant_facts import Constant
from co3d_compile.ir.index_equation import NO_COPIES, EdgeCopies, Kernel, Sliding
from co3d_compile.ir.layout import TIME, Layout, LayoutLost, Place
from co3d_compile.ir.node_reading import operand, shape_of

KEY = "co3d"


class Kind(Enum):
    """How a tensor depends on the stream."""

    STATIC = "static"  # not at all: a constant
    STREAM = "stream"  # new entries at every step
    WINDOW = "window"  # computed afresh at every step from the newest entries
    START = "start"  # computed from the first entries alone, as many as the clip takes


class NoExtension(Exception):
    """An operator has no meaning beyond the clip: it is applied to a window. The message is the reason."""


class Uneven(NoExtension):
    """Entries meet that stand in blocks of different sizes: x, and every entry of x twice."""

    def __init__(self) -> None:
        super().__init__("meets entries that stand in blocks of another size")


@dataclass(frozen=True)
class Own:
    """What is known of an operator itself. What is computed from its result, or is a marker of it, has not got this.

    Args:
        constant: What is known of its values, if it is a constant of the model.
        slides: How it slides over time, behind ``strip_temporal_padding``.
        gate: ``"frame"`` or ``"window"``: over what it pools, if it is a gate.
        items: The facts of its outputs, if it has several.
        by_decree: Whether it is a window because its rule failed, and must not be asked again.
        block: Entries that it computes at once: a step gives whole blocks.
    """

    constant: Constant | None = None
    slides: Sliding | None = None
    gate: str | None = None
    items: tuple[Fact, ...] = ()
    by_decree: bool = False
    block: int = 1


@dataclass(frozen=True)
class Fact:
    """What is known of one tensor.

    Behind a convolution over time of three taps, padded by one, a clip of 8 frames has ``length`` 8, and the stream
    ``pulse`` 1 and ``delay`` 1: after step j the newest entry is j - 1.

    Args:
        kind: How it depends on the stream.
        layout: Where batch and time are, with the sizes of the captured clip; None where nothing is known.
        pulse: Entries per step (relative to one step of the least common pulse until the pulse is fixed).
        delay: Entries by which the newest entry lags behind the newest possible one.
        spacing: Distance of neighbouring entries of one clip in the stream (more than 1 in dense mode).
        length: Entries if the clip had ``window`` frames.
        rate: Frames of the first input per entry.
        cut: Entries that slices and selects left out in front, of all operands that met.
        filled: Entries that pads and constants put in front, and that no kernel behind them has taken for its padding.
        sources: Names of the nodes at which a window begins (WINDOW only).
        dense: Whether strides become dilations (``stride_mode="dense"``).
        per_entry: Whether the clip's single entry is one of each entry's own: a gate, or an input without time.
        pooled: Where time was in what a gate pools, counted from the last dim, its entries in the captured clip, and
            if the clip had ``window`` frames: what is expanded to that shape has time there again.
        copies: The entries at its edges that are copies of the one beside them.
        end: With ``boundary="exact"``: entry n is within the tensor's own range iff n >= 0 and frame
            ``floor(n * rate + end)`` of the first input is not behind the last; None without ends.
        frames: Of the first input in the captured clip, with ends: behind an up-sampling they are those of its length.
        due: Frames of the first input until all entries have come that it is computed from (START only).
        lost: Whether time may stand in a dim of which nothing is known: of a window, or of a list of single frames.
        own: What is known of the operator itself.
    """

    kind: Kind
    layout: Layout | None = None
    pulse: Fraction = Fraction(0)
    delay: int = 0
    spacing: int = 1
    length: int = 1
    rate: Fraction = Fraction(1)
    cut: int = 0
    filled: int = 0
    sources: frozenset[str] = frozenset()
    dense: bool = False
    end: Fraction | None = None
    per_entry: bool = False
    pooled: tuple[int, int, int] | None = None
    copies: EdgeCopies = NO_COPIES
    frames: int = 0
    due: Fraction = Fraction(0)
    lost: bool = False
    own: Own = Own()

    @property
    def time(self) -> Place | None:
        """Where time is, if anything is known of that."""
        return self.layout.time if self.layout is not None else None

    @property
    def clip(self) -> int:
        """Entries in the captured clip."""
        return self.time.size if self.time is not None else 1

    @property
    def single(self) -> bool:
        """Whether the clip has a single entry, without a dim of its own for it."""
        return self.time is not None and self.time.size == self.length == 1 and not self.time.alone

    @property
    def crop(self) -> int:
        """Entries that are left out in front: the delay less this is that of the newest entry read.

        What is put in front takes the place of what was cut.
        """
        return max(0, self.cut - self.filled)

    @property
    def told(self) -> int:
        """The delay as a reader is told it: that of a single entry is the delay of what it was selected from."""
        return self.delay - self.crop if self.single else self.delay

    @property
    def lag(self) -> Fraction:
        """Frames from the start of the newest whole window to the end of the step."""
        return (self.delay + (self.length - 1) * self.spacing + 1) * self.rate

    def through(self, kernel: Kernel, layout: Layout, edges: tuple[bool, bool] = (False, False)) -> Fact:
        """The fact of an operator's output over time, by its index equation.

        Three taps padded by one, ``Kernel(k=3, p=1, p_end=1)``, add one to the delay and leave the length as it is.

        With ends, a crop at the end is delayed until it is known which entries it drops, and what reads copies of
        an entry until that entry has come.

        Args:
            edges: Whether the padding in front, and at the end, repeats the entry at the edge.
        """
        length = kernel.length(self.length)
        clip = kernel.length(self.clip)
        flowing = self.flowing(kernel)
        spacing = self.spacing * kernel.s if self.dense else self.spacing
        cut, filled = self._in_front(flowing)
        moved = replace(
            self,
            layout=layout.resize(TIME, clip),
            pulse=self.pulse / flowing.s,
            delay=flowing.delay(self.delay),
            spacing=spacing,
            length=length,
            rate=self.rate * flowing.s,
            cut=cut,
            filled=filled,
            own=Own(),
        )
        if self.end is not None:
            end = self.end + kernel.reach * self.rate
            moved = replace(moved, end=end, delay=max(moved.delay, floor(end / moved.rate)))
        copies, known = self.copies, ceil(Fraction(self.delay + self.copies.lead, flowing.s))
        carried = copies.carried(kernel, edges) and not (copies.lead and moved.delay >= known)
        waits = [moved.delay]
        if self.end is not None and copies.lead and not carried:
            waits.append(known)
        if self.end is not None and edges[0]:  # the entry at the edge is given with the first frame, not before
            waits.append(-kernel.p)
        copies = copies if carried else NO_COPIES
        return replace(moved, delay=max(waits), copies=copies.padded(kernel, edges))

    def _in_front(self, flowing: Kernel) -> tuple[int, int]:
        """Counts what is cut and filled in front behind a kernel.

        A kernel that brings no padding takes what stands in front for it: ``conv(F.pad(x, (2, 0)))`` is causal.
        """
        left_out, padding, reach = max(0, -flowing.p), max(0, flowing.p), (flowing.k - 1) * flowing.d
        cut, filled = self.cut + max(0, left_out - self.filled), max(0, self.filled - left_out)
        filled = filled + max(0, padding - reach) if padding else max(0, filled - reach)
        if flowing.s > 1:
            cut, filled = max(0, cut - filled) // flowing.s, max(0, filled - cut) // flowing.s
        return cut, filled

    def no_sooner(self, due: Fraction) -> Fact:
        """The fact where the first entry must not come before so many frames have."""
        return replace(self, delay=max(self.delay, ceil(due / self.rate) - 1))

    def scaled(self, factor: Fraction) -> Fact:
        """The fact where a step is ``factor`` times as long."""
        items = tuple(item.scaled(factor) for item in self.own.items)
        return replace(self, pulse=self.pulse * factor, own=replace(self.own, items=items))

    def held_back(self, begun: bool) -> Fact:
        """The fact once the entries have come of which the first are copies.

        If ``begun``, no sooner than a frame.
        """
        delay = self.delay + self.copies.lead
        return replace(self, delay=max(0, delay) if begun else delay, copies=NO_COPIES, own=Own())

    def upsampled(self, r: int, delay: int, dropped: int = 0) -> Fact:
        """The fact of ``r`` times as many entries less the last ``dropped``, ``delay`` of these later.

        The end is that of the captured clip, and of those that are longer or shorter by a multiple of the rate.
        """
        end = None
        if self.end is not None:
            entries = ceil((self.frames - self.end) / self.rate)
            end = self.frames - entries * self.rate + dropped * self.rate / r
        more, later = self.length * r - dropped, self.delay * r + delay
        moved = replace(self, pulse=self.pulse * r, delay=later, length=more, rate=self.rate / r, end=end)
        return replace(moved, cut=self.cut * r, filled=self.filled * r)

    def flowing(self, kernel: Kernel) -> Kernel:
        """The kernel as it is applied to the stream: strides become dilations in dense mode."""
        return kernel.dense(self.spacing) if self.dense else kernel

    def __str__(self) -> str:
        text = f"{self.kind.value} {self.layout or ''}".rstrip()
        if self.kind is Kind.STREAM:
            text += f" pulse={self.pulse} delay={self.delay}"
        if self.kind is Kind.WINDOW:
            text += f" delay={self.delay}"
        return text


STATIC = Fact(Kind.STATIC)


def fact_of(node: Node) -> Fact:
    """Reads the fact attached to a node; a node without one is a constant."""
    return node.meta.get(KEY, STATIC)


@contextmanager
def facts_as(facts: Mapping[Node, Fact]) -> Iterator[None]:
    """Gives some nodes other facts, inside."""
    own = {node: fact_of(node) for node in facts}
    try:
        for node, fact in facts.items():
            node.meta[KEY] = fact
        yield
    finally:
        for node, fact in own.items():
            node.meta[KEY] = fact


def amend(node: Node, **changes: Any) -> None:
    """Gives a node its fact with some fields changed."""
    node.meta[KEY] = replace(fact_of(node), **changes)


def own_of(node: Node) -> Own:
    """Reads what is known of an operator itself."""
    return fact_of(node).own


def amend_own(node: Node, **changes: Any) -> None:
    """Changes some of what is known of an operator itself."""
    amend(node, own=replace(own_of(node), **changes))


def constant_of(node: Node) -> Constant:
    """Reads what is known of the values of a node: nothing, if it is no constant of the model."""
    return own_of(node).constant or Constant()


def kernel_of(node: Node) -> Kernel:
    """The kernel with which an operator slides over the entries of its operand as they come."""
    slides = own_of(node).slides
    return fact_of(operand(node)).flowing(slides.kernel) if slides is not None else Kernel()


def is_stream(node: object) -> bool:
    return isinstance(node, Node) and fact_of(node).kind is Kind.STREAM


def is_window(node: object) -> bool:
    return isinstance(node, Node) and fact_of(node).kind is Kind.WINDOW


def is_start(node: object) -> bool:
    return isinstance(node, Node) and fact_of(node).kind is Kind.START


def _joint_front(streams: Sequence[Fact]) -> tuple[int, int]:
    """Finds what operands that meet have cut in front, and what all of them have filled in there.

    All of them leave it out, or each is a single entry and the last one says.
    """
    if all(f.single for f in streams):
        crop = max(f.crop for f in streams)
    else:
        crop = min(f.crop for f in [f for f in streams if not f.per_entry] or streams)
    filled = min(f.filled for f in streams)
    return crop + filled if crop else min(filled, *(f.cut for f in streams)), filled


def combine(facts: Iterable[Fact], layout: Layout | None) -> Fact:
    """Combines the facts of several streaming operands that are read at equal index: the largest delay wins.

    Raises:
        NoExtension: The operands have different rates or lengths, or one is a single entry, of which each clip has one,
            and another is not.
    """
    streams = [f for f in facts if f.kind is Kind.STREAM]
    first = streams[0]
    if any((f.pulse, f.spacing) != (first.pulse, first.spacing) for f in streams):
        raise NoExtension("operands with different numbers of entries per step")
    several = layout is not None and layout.time is not None and layout.time.size > 1
    if several and any(f.clip > 1 for f in streams) and any(f.clip == 1 and not f.per_entry for f in streams):
        raise NoExtension("spreads a single entry over the whole time axis")
    last = max(streams, key=lambda f: f.delay)
    alike = len({(f.delay, f.copies) for f in streams}) == 1
    cut, filled = _joint_front(streams)
    return replace(
        last,
        layout=layout,
        length=max(f.length for f in streams),
        per_entry=all(f.per_entry for f in streams),
        lost=any(f.lost for f in streams),
        end=max((f.end for f in streams if f.end is not None), default=None),
        copies=last.copies if alike else NO_COPIES,
        cut=cut,
        filled=filled,
        own=Own(),
    )


def flush_steps(fact: Fact) -> int:
    """Counts the steps after the last frame until the last entry of a tensor has come."""
    return max(0, 1 + floor((_behind(fact) - 1) / fact.pulse))


def misfit(fact: Fact) -> int:
    """Counts the entries by which the last one of a stream of whole steps falls short of the end of a step."""
    return int(-_behind(fact) % fact.pulse)


def _behind(fact: Fact) -> int:
    """Counts the entries that are still due after the last frame of a stream of whole steps."""
    assert fact.end is not None
    return ceil(-fact.end / fact.rate) + fact.delay


def known(node: Node) -> Layout:
    """Reads the layout of an operand.

    Raises:
        LayoutLost: Nothing is known of it.
    """
    layout = fact_of(node).layout
    if layout is None:
        if fact_of(node).kind is Kind.STATIC:
            return Layout.plain(shape_of(node))
        raise LayoutLost
    return layout


def touches_time(node: Node, dims: Iterable[int]) -> bool:
    """Says whether time (more than one entry of it) is in one of these dims of a streaming operand."""
    if not is_stream(node):
        return False
    fact = fact_of(node)
    place = known(node).time
    if place is None or (place.size == 1 and fact.length == 1):
        return False
    return place.dim in {d % known(node).rank for d in dims}
