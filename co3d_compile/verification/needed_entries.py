"""Which entries of each tensor of the long clip are needed: those that are compared, and what these are computed from.

They are found from the results backwards. Operators that are not known to keep entries apart read all of a tensor.
Entries that are needed and not there are an error, never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import TypeAlias

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from co3d_compile.ir.aten_operators import AVERAGE, BATCH_NORMS, CONVOLUTIONS, DIMS, RESHAPES
from co3d_compile.ir.node_reading import operand, spread
from co3d_compile.ir.time_facts import Kind
from co3d_compile.verification.long_clip import LongClip, beside
from co3d_compile.verification.long_values import Entries, Stream
from co3d_compile.verification.resized_arguments import computes_over, pointwise
from co3d_compile.verification.time_claims import Arguments, Claim, Named, Value, claim_of, is_single

aten = torch.ops.aten
STREAMS = ("stream", "entries")
MOVES = {aten.permute.default, aten.transpose.int, aten.unsqueeze.default, *RESHAPES}
OVER_DIMS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.linear.default, aten.layer_norm.default}
Wanted: TypeAlias = Callable[[Node], range | None]


class NotCovered(Exception):
    """Entries are read that were not computed."""


@dataclass(frozen=True)
class Part:
    """What is computed of an operator's result.

    Attributes:
        own: The entries of the result.
        read: The entries of its operands that they are computed from.
        axis: Which of the numbers of its padding is that over time; None where it has none.
    """

    own: range
    read: range
    axis: int | None = None


@dataclass(frozen=True)
class Slide:
    """An operator whose kernel slides over the last dims of a tensor, by those of its arguments that are lists."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def read(self, axis: int, own: range) -> range:
        """Finds what entries are computed from, by the index equation."""
        first = own.start * self.stride[axis] - self.padding[axis]
        newest = (own.stop - 1) * self.stride[axis] - self.padding[axis]
        return range(first, newest + (self.kernel[axis] - 1) * self.dilation[axis] + 1)


class NeededEntries:
    """The entries of each tensor that are needed.

    Args:
        graph: The captured graph.
        claims: Where time is.
        sorts: How each node is computed on the long clip.
        windows: What the windows read of a stream; None where that is not known.
        others: Nodes that are not computed as the network has them, by name.
    """

    def __init__(
        self,
        graph: Graph,
        claims: dict[str, Claim],
        sorts: Mapping[Node, str],
        windows: Wanted,
        others: Collection[str],
    ) -> None:
        self.graph, self.claims, self.sorts, self.windows, self.others = graph, claims, sorts, windows, others
        self._timeless: set[Node] = set()
        for n in graph.nodes:
            constant = n.op == "get_attr" or (n.op == "placeholder" and sorts[n] == "static")
            if constant or (n.op == "call_function" and self._timeless.issuperset(n.all_input_nodes)):
                self._timeless.add(n)

    def parts(self, results: Mapping[Node, range | None]) -> dict[str, Part]:
        """Finds what is computed of each operator; of those that are not in it, all.

        Args:
            results: The entries of nodes that are looked at; None: all.
        """
        needs, parts = dict(results), {}
        for n in reversed(self.graph.nodes):
            if n.op != "call_function":
                continue
            own = needs.get(n)
            part = self._part(n, own) if own is not None and self.sorts[n] in STREAMS else None
            if part is not None and n.target is not getitem:
                parts[n.name] = part
            for a in n.all_input_nodes:
                if self.sorts[a] in STREAMS:
                    window = self.sorts[n] == "window" and n.target is not getitem
                    read = self.windows(a) if window else part.read if part is not None else None
                    needs[a] = joined(needs[a], read) if a in needs else read
        return parts

    def _part(self, n: Node, own: range) -> Part | None:
        """Finds what some entries of a result are computed from; None: from all of them, as far as is known."""
        streams = [a for a in n.all_input_nodes if self.sorts[a] in STREAMS]
        others = [a for a in n.all_input_nodes if a not in streams]
        regrouped = any(f"{a.name}>{n.name}" in self.claims for a in streams)
        kinds = {self._claim(a).kind for a in (n, *streams)}
        if n.name in self.others or regrouped or kinds != {Kind.STREAM} or not self._timeless.issuperset(others):
            return None
        return self._slid(n, own) if self._slides(n, streams) else Part(own, own) if self._apart(n, streams) else None

    def _claim(self, n: Node) -> Claim:
        return claim_of(n, self.claims)

    def _one_by_one(self, n: Node, streams: Sequence[Node]) -> bool:
        """Says whether the long clip computes it for each entry by itself."""
        gate = self._claim(n).gate
        return gate == "frame" or (
            gate is None and (is_single(n, self.claims) or any(self.sorts[a] == "entries" for a in streams))
        )

    def _slides(self, n: Node, streams: Sequence[Node]) -> bool:
        return slide_of(n) is not None and streams == [n.args[0]] and not self._one_by_one(n, streams)

    def _slid(self, n: Node, own: range) -> Part | None:
        x, slide = operand(n), slide_of(n)
        place, rank = self._claim(x).place, x.meta["val"].dim()
        assert slide is not None
        first = rank - len(slide.kernel)
        if self._claim(n).gate is not None or place is None or first != 2 or (place.dim > 0 and not place.alone):
            return None
        if place.dim == 0:
            return Part(own, own)
        return Part(own, slide.read(place.dim - first, own), place.dim - first) if place.dim >= first else None

    def _apart(self, n: Node, streams: Sequence[Node]) -> bool:
        """Says whether each entry of a result is computed from the entries of the same index, and from nothing else."""
        if n.target is getitem or self._one_by_one(n, streams):
            return True
        places = [self._claim(a).place for a in (n, *streams)]
        if self._claim(n).gate is not None or not streams or any(p is None for p in places):
            return False
        x, place, rank = streams[0], places[1], streams[0].meta["val"].dim()
        assert place is not None
        if n.target in BATCH_NORMS:
            return place.dim != 1
        if n.target in MOVES:
            return places[0] is not None and places[0].size == place.size
        if n.target in OVER_DIMS:
            return n.args[0] is x and not computes_over(n, n.args, place.dim, rank)
        return (pointwise(n) or beside(n, self._claim(n))) and not self._differs_over_time(n, streams)

    def _differs_over_time(self, n: Node, streams: Sequence[Node]) -> bool:
        """Says whether an operand may be a constant with a number for each entry."""
        right = max(a.meta["val"].dim() - place.dim for a in streams if (place := self._claim(a).place) is not None)
        shapes = [a.meta["val"].shape for a in n.all_input_nodes if a not in streams]
        return any(len(shape) >= right and shape[-right] != 1 for shape in shapes)


class NeededClip(LongClip):
    """A run on a long clip that computes no other entries than those that are needed, as far as that is known."""

    parts: Mapping[str, Part] = {}

    def _call(self, n: Node, args: Arguments, kwargs: Named) -> Value:
        part = self.parts.get(n.name)
        if part is None:
            value = super()._call(n, args, kwargs)
            several = n.target is getitem and isinstance(value, Entries) and not isinstance(args[0], tuple)
            return replace(value, first=args[0].first) if several else value
        args, kwargs = pytree.tree_map(lambda v: _cut(v, part.read), (args, kwargs))
        if part.axis is not None:
            args = _without_padding(n, args, part.axis)
        result = super()._call(n, args, kwargs)
        first = part.own.start
        return pytree.tree_map(lambda v: replace(v, first=first) if isinstance(v, (Stream, Entries)) else v, result)

    def _captured_again(self, n: Node) -> Value:
        if n.name in self.parts:  # not all of its operands are there
            raise NotCovered
        return super()._captured_again(n)


def slide_of(n: Node) -> Slide | None:
    """Reads how the kernel of a convolution or a pool slides; None of another operator."""
    if n.target in CONVOLUTIONS:
        weight = n.args[1]
        assert isinstance(weight, Node)
        kernel = list(weight.meta["val"].shape[2:])
        rest = [_given(n, 3, 1), _given(n, 4, 0), _given(n, 5, 1)]
    elif n.target in DIMS:
        kernel = spread(n.args[1], DIMS[n.target])
        rest = [_given(n, 2, kernel) or kernel, _given(n, 3, 0), 1 if n.target in AVERAGE else _given(n, 4, 1)]
    else:
        return None
    return Slide(kernel, *(spread(value, len(kernel)) for value in rest))


def _given(n: Node, at: int, default: Value) -> Value:
    return n.args[at] if len(n.args) > at else default


def _without_padding(n: Node, args: Arguments, axis: int) -> Arguments:
    """Writes the arguments of an operator that slides over entries which are all there."""
    slide, at = slide_of(n), 4 if n.target in CONVOLUTIONS else 3
    if slide is None or len(args) <= at:
        return args
    return (*args[:at], [0 if a == axis else p for a, p in enumerate(slide.padding)], *args[at + 1 :])


def _cut(v: Value, read: range) -> Value:
    """Takes the entries that an operator reads.

    Raises:
        NotCovered: They are not all there.
    """
    if isinstance(v, Stream):
        start = read.start - v.first
        if start < 0 or start + len(read) > v.count:
            raise NotCovered
        value = v.value if len(read) == v.count else v.claim.cut(v.value, start, len(read))
        return replace(v, value=value, first=0)
    if isinstance(v, Entries):
        start = read.start - v.first
        if start < 0 or start + len(read) > len(v.values):
            raise NotCovered
        return replace(v, values=v.values[start : start + len(read)], first=0)
    return v


def joined(one: range | None, other: range | None) -> range | None:
    """Finds the entries that are needed for two readers."""
    if one is None or other is None:
        return None
    return range(min(one.start, other.start), max(one.stop, other.stop))
