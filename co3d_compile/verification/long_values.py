"""What stands for the value of a node on the long clip: a tensor with all entries, or a result for each place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._pytree import PyTree

from co3d_compile.verification.time_claims import Claim


@dataclass(frozen=True)
class Stream:
    """A tensor on the long clip.

    ``constant`` is what stands there in each single clip, if it depends on the clip's shape alone: ``zeros_like``.
    """

    value: Tensor
    claim: Claim
    constant: Tensor | None = None

    @property
    def count(self) -> int:
        """How many entries it has."""
        return self.claim.entries(self.value)

    def span(self, start: int | None, length: int) -> Tensor | None:
        """Returns some entries; None where they are not all there."""
        there = start is not None and start + length <= self.count
        return self.claim.cut(self.value, start, length) if there and start is not None else None

    def entry(self, index: int | None) -> Tensor | None:
        """Returns one entry; None where it is not there."""
        return self.span(index, 1)


@dataclass(frozen=True)
class Windows:
    """A result for each position of the clip in the long clip; None where the clip does not fit in."""

    values: Sequence[Tensor | None]


@dataclass(frozen=True)
class Entries:
    """Results for each entry of the long clip that have no dim for time, such as those of a gate."""

    values: Sequence[Tensor]
    claim: Claim

    def entry(self, index: int | None) -> Tensor | None:
        """Returns one result; None where it is not there."""
        return self.values[index] if index is not None and index < len(self.values) else None


def as_many_entries(given: PyTree) -> PyTree:
    """Cuts what meets at equal index to the entries that all of it has: a gate, one entry of a clip, beside a crop."""
    places = [(v, v.claim.place) for v in pytree.tree_leaves(given) if isinstance(v, Stream)]
    timed = [(v, place) for v, place in places if place is not None and place.alone]
    if len({place.size for _, place in timed}) < 2:
        return given
    least = min(v.count for v, _ in timed)
    cut = {id(v): replace(v, value=v.claim.cut(v.value, 0, least)) for v, _ in timed if v.count > least}
    return pytree.tree_map(lambda v: cut.get(id(v), v), given)
