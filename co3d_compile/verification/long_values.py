"""What stands for the value of a node on the long clip: a tensor with all entries, or a result for each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._pytree import PyTree

from co3d_compile.ir.time_facts import Kind
from co3d_compile.verification.resized_arguments import as_many
from co3d_compile.verification.time_claims import Claim, NoReference, Value


@dataclass(frozen=True)
class Stream:
    """A tensor on the long clip.

    ``constant`` is what stands there in each single clip, if it depends on the clip's shape alone: ``zeros_like``.
    ``first`` is the index of its first entry: those before it were not computed.
    """

    value: Tensor
    claim: Claim
    constant: Tensor | None = None
    first: int = 0

    @property
    def count(self) -> int:
        """How many entries it has."""
        return self.claim.entries(self.value)

    def span(self, start: int | None, length: int) -> Tensor | None:
        """Takes some entries; None where they are not all there."""
        there = start is not None and self.first <= start <= self.first + self.count - length
        return self.claim.cut(self.value, start - self.first, length) if there and start is not None else None

    def entry(self, index: int | None) -> Tensor | None:
        """Takes one entry; None where it is not there."""
        return self.span(index, 1)

    def without_time(self, index: int | None, selected: bool) -> Tensor:
        """Takes one entry for a reader to which it is a constant; ``selected``: without its dim.

        Raises:
            NoReference: It is not there.
        """
        found, place = self.entry(index), self.claim.place
        if found is None or place is None:
            raise NoReference("the first entry of the stream is not in the long clip")
        return found.squeeze(place.dim) if selected else found


@dataclass(frozen=True)
class Windows:
    """A result for each position of the clip in the long clip; None where the clip does not fit in."""

    values: Sequence[Tensor | None]


@dataclass(frozen=True)
class Entries:
    """Results for each entry of the long clip, from the ``first`` on, that have no dim for time: those of a gate."""

    values: Sequence[Tensor]
    claim: Claim
    first: int = 0

    def entry(self, index: int | None) -> Tensor | None:
        """Takes one result; None where it is not there."""
        there = index is not None and self.first <= index < self.first + len(self.values)
        return self.values[index - self.first] if there and index is not None else None


def as_many_entries(given: PyTree) -> PyTree:
    """Cuts what meets at equal index to the entries that all of it has: a gate, one entry of a clip, beside a crop."""
    places = [(v, v.claim.place) for v in pytree.tree_leaves(given) if isinstance(v, Stream)]
    timed = [(v, place) for v, place in places if place is not None and place.alone]
    if len({place.size for _, place in timed}) < 2:
        return given
    least = min(v.count for v, _ in timed)
    cut = {id(v): replace(v, value=v.claim.cut(v.value, 0, least)) for v, _ in timed if v.count > least}
    return pytree.tree_map(lambda v: cut.get(id(v), v), given)


def counted(v: Value) -> Value:
    """Finds what stands in each single clip for numbers that depend on its shape alone.

    ``ones_like(x).cumsum(2)`` counts from the first frame of a clip, and not from that of the long clip.
    """
    constant = v.constant if isinstance(v, Stream) and v.claim.kind is Kind.STATIC else None
    return v if constant is None or not constant.numel() else constant


def extended(v: Value, stream: Stream, offset: int) -> Value:
    """Makes a constant that has the clip's entries go on beyond them: it counts, or stays the same.

    Args:
        v: It is returned as it is, if it is no such constant.
        stream: What it meets on the long clip.
        offset: Index of the stream's first frame in the long clip.

    Raises:
        NoReference: The constant differs over time.
    """
    place = stream.claim.place
    if not isinstance(v, Tensor) or place is None:
        return v
    right = stream.value.dim() - place.dim
    entries = stream.value.shape[place.dim]
    if not place.alone:
        return as_many(v, v.dim() - right, place.outer * place.size * place.inner, entries)
    if v.dim() < right or v.shape[-right] != place.size or place.size == entries:
        return v
    if place.size == 1:
        return v.repeat_interleave(entries, v.dim() - right)
    exact = v.double()
    step, rounding = exact.diff(dim=-right).mean(-right, keepdim=True), 4 * float(exact.abs().max())
    rounding *= torch.finfo(v.dtype).eps if v.is_floating_point() else 0
    if not bool(((exact.diff(dim=-right) - step).abs() <= rounding).all()):
        raise NoReference("a constant differs over time")
    first = (Fraction(-offset) / (stream.claim.rate * stream.claim.spacing)).numerator
    count = torch.arange(first, first + stream.value.shape[place.dim]).view(-1, *[1] * (right - 1))
    return (exact.narrow(-right, 0, 1) + step * count).to(v.dtype)
