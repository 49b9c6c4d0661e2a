"""A continual convolution for one step: which of four exact forms computes it, and the forms.

With taps w_i and entries x_i, all over space alone, one output entry is ``sum_i w_i * x_i``. Older entries are state:

- ``concat``: one convolution on the channels of all entries; the states are entries.
- ``sum``: one convolution per tap; the states are entries.
- ``accumulate``: every tap on the entry that is new, partial sums are state (Listing 1.1 of the paper). The states
  are as large as outputs: smaller behind a spatial stride, or where a kernel reduces the channels.
- ``pair``: where a step has several outputs, two neighbours together from fewer convolutions, four for three taps
  instead of six (Winograd's minimal filtering; Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
  CVPR 2016, section 4.1, here over time); the states are entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from torch.fx import Node

from co3d_compile.ir.aten_operators import CONVOLUTIONS
from co3d_compile.ir.layout import Layout
from co3d_compile.step_graph.builder import Entry
from co3d_compile.step_graph.entry_operators import EntryOperators
from co3d_compile.step_graph.past_entries import AgedEntry

aten = torch.ops.aten
CONV = [aten.linear.default, *CONVOLUTIONS]
FEWEST = 16  # channels: with less, no kernel of ONNX Runtime is blocked
LARGE = 25  # pixels of a kernel: three channels through it take less time than many that are not blocked
FORMS = ("concat", "sum", "accumulate")  # of one output; two together: "pair"
WORTH_A_PAIR = 128  # multiply-adds that a tap does with each number it reads
Parts = tuple[list[Node], list[Node]]  # what two outputs are sums of
Chooser = Callable[["Layer"], "str | None"]
_chooser: ContextVar[Chooser | None] = ContextVar("chooser", default=None)


@dataclass(frozen=True)
class Layer:
    """The shape of one convolution in a step; kernel, stride, padding, dilation and size are over space.

    Attributes:
        ages: How many steps ago the entry under each tap was new, the oldest first.
    """

    channels: int
    outputs: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]
    ages: tuple[int, ...]


@contextmanager
def chosen(chooser: Chooser) -> Iterator[None]:
    """Asks for the form of every convolution that has several taps; None leaves it to the rule of :func:`choose`."""
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)


def forced(form: str) -> AbstractContextManager[None]:
    """Makes every convolution with several taps take this form, where the form exists: for tests and measurements."""
    return chosen(lambda _: form)


@dataclass(frozen=True)
class TapConvolution:
    """A kernel cut into taps; strides, paddings and dilations are over space."""

    taps: Sequence[Node]
    bias: Node | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def concat(self, low: EntryOperators, entries: Sequence[Entry]) -> Node:
        """Writes one dense convolution on the channels of all entries."""
        return self._convolve(low, low.joined(entries), low.call(aten.cat.default, list(self.taps), 1), self.bias)

    def sum(self, low: EntryOperators, entries: Sequence[Entry]) -> Node:
        """Writes one convolution per tap."""
        parts = [
            self._convolve(low, low.resolve(x), tap, None if i else self.bias)
            for i, (x, tap) in enumerate(zip(entries, self.taps, strict=True))
        ]
        return low.sum(parts)

    def accumulate(self, low: EntryOperators, entries: Sequence[AgedEntry], layout: Layout | None) -> Node:
        """Computes the partial sums, the oldest first: what is to wait longer is a state of a state."""
        total: Node | None = None
        newest = min(e.steps for e in entries)
        for age in range(max(e.steps for e in entries), -1, -1):
            here = [(e.node, tap) for e, tap in zip(entries, self.taps, strict=True) if e.steps == age]
            for i, (x, tap) in enumerate(here):
                part = self._convolve(low, x, tap, self.bias if age == newest and i == 0 else None)
                total = part if total is None else low.call(aten.add.Tensor, part, total)
            if age:
                assert total is not None
                total = low.before(total, 1, layout)
        assert total is not None
        return total

    def pair(self, low: EntryOperators, entries: Sequence[Node]) -> tuple[Node, Node]:
        """Computes two neighbouring outputs, from the entries under the taps of both, one more than there are taps.

        Taps are taken by threes, what is left by two or one: four, three and two convolutions for the two outputs.
        """
        first: list[Node] = []
        second: list[Node] = []
        for i in range(0, len(self.taps), 3):
            taps, x = self.taps[i : i + 3], entries[i : i + 4]
            bias = None if i else self.bias
            parts = {3: self._pair_of_three, 2: self._pair_of_two, 1: self._pair_of_one}[len(taps)](low, x, taps, bias)
            first += parts[0]
            second += parts[1]
        return low.sum(first), low.sum(second)

    def _pair_of_three(self, low: EntryOperators, x: Sequence[Node], taps: Sequence[Node], bias: Node | None) -> Parts:
        ends, middle = low.sum([taps[0], taps[2]]), taps[1]
        both, apart = (low.call(aten.mul.Tensor, g, 0.5) for g in (low.sum([ends, middle]), low.minus(ends, middle)))
        near = self._convolve(low, low.sum([x[1], x[2]]), both, bias)
        far = self._convolve(low, self._minus(low, x[2], x[1]), apart, None)
        start = self._convolve(low, self._minus(low, x[0], x[2]), taps[0], None)
        end = self._convolve(low, self._minus(low, x[1], x[3]), low.call(aten.neg.default, taps[2]), None)
        return [near, far, start], [self._minus(low, near, far), end]

    def _pair_of_two(self, low: EntryOperators, x: Sequence[Node], taps: Sequence[Node], bias: Node | None) -> Parts:
        near = self._convolve(low, x[1], low.sum(taps), bias)
        start = self._convolve(low, self._minus(low, x[0], x[1]), taps[0], None)
        end = self._convolve(low, self._minus(low, x[1], x[2]), low.call(aten.neg.default, taps[1]), None)
        return [near, start], [near, end]

    def _pair_of_one(self, low: EntryOperators, x: Sequence[Node], taps: Sequence[Node], bias: Node | None) -> Parts:
        one, other = (self._convolve(low, entry, taps[0], bias) for entry in x)
        return [one], [other]

    def _minus(self, low: EntryOperators, x: Node, y: Node) -> Node:
        """Subtracts; on images as a sum with a depthwise convolution: ONNX Runtime has no subtraction for tensors
        in its blocked layout, and computes these two as one operator."""
        channels = low.sizes(y)[1]
        if len(self.stride) != 2 or channels < FEWEST:
            return low.minus(x, y)
        weight = low.constant(f"lowered.minus_{channels}", -torch.ones(channels, 1, 1, 1, dtype=y.meta["val"].dtype))
        return low.call(
            aten.add.Tensor,
            low.call(aten.conv2d.default, y, weight, None, [1, 1], [0, 0], [1, 1], channels),
            x,
        )

    def output_features(self, low: EntryOperators, x: Node) -> int:
        """Counts the numbers in one stream's share of an output entry."""
        sizes = low.sizes(x)
        window = zip(
            sizes[len(sizes) - len(self.stride) :],
            low.sizes(self.taps[0])[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        space = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in window]
        return sizes[0] * low.sizes(self.taps[0])[0] * prod(space) // low.batch

    def _convolve(self, low: EntryOperators, x: Node, weight: Node, bias: Node | None) -> Node:
        if self.stride:
            arguments = (self.stride, self.padding, self.dilation, self.groups)
            return low.call(CONV[len(self.stride)], x, weight, bias, *arguments)
        if self.groups == 1:
            return low.call(aten.linear.default, x, weight, bias)
        one = [low.call(aten.unsqueeze.default, t, 2) for t in (x, weight)]
        return low.call(aten.squeeze.dim, low.call(aten.conv1d.default, *one, bias, [1], [0], [1], self.groups), 2)


def pairs(
    low: EntryOperators, conv: TapConvolution, positions: Sequence[Sequence[int]], entry: AgedEntry
) -> list[tuple[int, int]]:
    """Chooses which outputs of a step are computed two together.

    The second reads what the first reads, one tap further on.

    Measured in ONNX Runtime 1.31 on an AMD EPYC (AVX2), one thread, milliseconds of CPU time of a step: R3D-18 555 with
    sums of taps and 388 with pairs, R(2+1)D-18 564 and 539, I3D R50 at four frames per step 676 and 626. Additions of
    whole entries cost more than is saved where a kernel does little with each number: depthwise, or few outputs.

    Args:
        low: The step graph.
        conv: The convolution.
        positions: For each output, which entries its taps read.
        entry: One of these.
    """
    if len(positions) < 2 or len(conv.taps) < 2:
        return []
    outputs, _, *kernel = low.sizes(conv.taps[0])
    work = outputs * prod(kernel) // prod(conv.stride)
    chooser = _chooser.get()
    form = chooser(_layer(low, conv, [entry] * len(conv.taps))) if chooser is not None else None
    if not (form == "pair" or (form is None and conv.groups == 1 and work >= WORTH_A_PAIR)):
        return []
    found: dict[int, int] = {}
    for a, b in combinations(range(len(positions)), 2):
        neighbours = positions[b][:-1] == positions[a][1:]
        if neighbours and not {a, b} & {*found, *found.values()}:
            found[a] = b
    return list(found.items())


def choose(low: EntryOperators, conv: TapConvolution, entries: Sequence[AgedEntry], queued: bool, shared: int) -> str:
    """Chooses a convolution's form.

    ``accumulate`` where it keeps clearly less, else ``sum``, or ``concat`` where small.

    A state is read from memory that no cache holds, so bytes of state are what the forms differ in. Measured in ONNX
    Runtime 1.31 on an AMD EPYC, one thread, milliseconds of CPU time per frame, renamed states: I3D R50 123 with
    ``concat`` everywhere, 121 with ``sum``, 120 with ``accumulate``, 116 chosen so; Slow R50 141, 137, 136 and 136; of
    two threads, operators of X3D-M added up, 16.3 with ``sum``, 15.1 with ``accumulate`` and 13.7 chosen so.

    Args:
        low: The step graph.
        conv: The convolution.
        entries: What its taps read.
        queued: Whether past entries are kept in one tensor.
        shared: How many past entries are state anyway, for another reader.
    """
    x = entries[0].node
    same = all(low.sizes(e.node)[1:] == low.sizes(x)[1:] for e in entries)
    dense = conv.groups == 1 and len(entries) > 1 and same
    chooser = _chooser.get()
    form = chooser(_layer(low, conv, entries)) if chooser is not None and len(entries) > 1 else None
    if form == "accumulate" or (form == "concat" and dense) or form == "sum":
        return form
    past = max(0, len({(e.node, e.steps) for e in entries if e.steps}) - shared)
    waits = max(e.steps for e in entries)
    if not queued and waits * conv.output_features(low, x) < 0.75 * past * low.features(x):
        return "accumulate"
    blocked = len(conv.stride) == 2 and (low.sizes(x)[1] >= FEWEST or prod(low.sizes(conv.taps[0])[2:]) >= LARGE)
    return "concat" if dense and not blocked else "sum"


def _layer(low: EntryOperators, conv: TapConvolution, entries: Sequence[AgedEntry]) -> Layer:
    outputs, inputs, *kernel = low.sizes(conv.taps[0])
    size = low.sizes(entries[0].node)
    return Layer(
        inputs * conv.groups,
        outputs,
        conv.groups,
        tuple(kernel),
        tuple(conv.stride),
        tuple(conv.padding),
        tuple(conv.dilation),
        tuple(size[len(size) - len(kernel) :]),
        tuple(e.steps for e in entries),
    )


BLOCK = 4
