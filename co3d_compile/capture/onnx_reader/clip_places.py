"""Where the clips of a batch lie in tensors of a file that is written for one clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

BROADCAST = {"Where", "Div", "Pow", "Mod", "PRelu", "Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean"}
ALIGNED = {*BROADCAST, "ScatterND", "MatMul"}
"""Operators whose operands are aligned at their last dims. A constant may have the size of a dim in which clips lie."""
SAME_DIMS = {"Concat", "ScatterElements"}


@dataclass(frozen=True)
class Place:
    """Where the clips of a batch lie in a tensor.

    Attributes:
        dim: The dim that has as many entries as there are clips, for each one of the file.
        inner: How many entries of the dim belong to a clip before the next clip's follow.
        is_stored: Whether the tensor has its shape from sizes that the file stores for one clip.
    """

    dim: int
    inner: int = 1
    is_stored: bool = False

    def repeated(self, x: Tensor, clips: int) -> Tensor:
        """Repeats a tensor that is the same for all clips, once for each."""
        if x.stride(self.dim) == 0:  # one entry, repeated: more often
            sizes = [clips * size if d == self.dim else size for d, size in enumerate(x.shape)]
            return x.narrow(self.dim, 0, 1).expand(sizes)
        apart = x.unflatten(self.dim, (-1, 1, self.inner))
        sizes = [clips if d == self.dim + 1 else size for d, size in enumerate(apart.shape)]
        return apart.expand(sizes).flatten(self.dim, self.dim + 2)

    def clip(self, x: Tensor, which: int, clips: int) -> Tensor:
        """Takes what a tensor has of one clip."""
        return (
            x.unflatten(self.dim, (-1, clips, self.inner)).select(self.dim + 1, which).flatten(self.dim, self.dim + 1)
        )

    def joined(self, clips: Sequence[Tensor]) -> Tensor:
        """Joins the tensors of all clips; ``clip`` gives each of them again."""
        apart = [x.unflatten(self.dim, (-1, self.inner)) for x in clips]
        return torch.stack(apart, self.dim + 1).flatten(self.dim, self.dim + 2)


def behind_a_view(place: Place, before: Sequence[int], after: Sequence[int]) -> list[Place]:
    """Finds the places in which clips may lie behind a view from one shape to another one, both of one clip."""
    stride = place.inner * prod(before[place.dim + 1 :])
    found = []
    for dim, size in enumerate(after):
        inner, rest = divmod(stride, prod(after[dim + 1 :]) or 1)
        if inner and not rest and size % inner == 0:
            found.append(Place(dim, inner, is_stored=True))
    return sorted(found, key=lambda p: tuple(after[: p.dim]) != tuple(before[: place.dim]))


def behind(places: Mapping[Place, int], one: Sequence[int], several: Sequence[int], clips: int) -> Place | None:
    """Gives the place of clips in a result, from its shape for one clip and for several; None where both are the same.

    Args:
        places: Those of the operands, with the size of the dim for one clip.
        one, several: The shapes.
        clips: How many there are.

    Raises:
        ValueError: It is no shape of so many clips.
    """
    other = [d for d, (a, b) in enumerate(zip(one, several, strict=True)) if a != b]
    if not other:
        return None
    if len(other) > 1 or several[other[0]] != one[other[0]] * clips:
        raise ValueError("the clips do not lie in one dim")
    size = one[other[0]]
    for place, of in places.items():
        inner = place.inner if size == of or place.inner == 1 else size if place.inner == of else 0
        if inner:
            return Place(other[0], inner)
    return Place(other[0], size)


def for_all_clips(
    operator: str, axis: int, given: Sequence[Any], places: Sequence[Place | None], clips: int
) -> list[Any]:
    """Makes the operands of an operator fit together: repeats for each clip those that the file has for one.

    Args:
        operator: The operator.
        axis: The dim along which it joins.
        given: Its operands.
        places: Where clips lie in these; None for one that is the same for all clips.
        clips: How many there are.
    """
    first = next((i for i, p in enumerate(places) if p is not None), None)
    found: list[Any] = list(given)
    if first is None or first >= len(given) or operator not in ALIGNED | SAME_DIMS:
        return found
    like, place = given[first], places[first]
    assert isinstance(like, Tensor) and place is not None
    size = like.shape[place.dim] // clips
    for i, x in enumerate(given):
        same = isinstance(x, Tensor) and (i >= len(places) or places[i] is None) and (operator != "ScatterND" or i == 0)
        if not same or not isinstance(x, Tensor):
            continue
        dim = place.dim + (x.dim() - like.dim() if operator in ALIGNED else 0)
        own = dim == axis % like.dim() if operator == "Concat" else operator == "MatMul" and dim >= x.dim() - 2
        if 0 <= dim < x.dim() and x.shape[dim] == size and not own and (size > 1 or operator not in BROADCAST):
            found[i] = Place(dim, place.inner).repeated(x, clips)
    return found
