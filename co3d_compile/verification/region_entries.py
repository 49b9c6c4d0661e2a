"""What is local in time beside a clip of the captured length: it may be something else inside of a long clip.

The long clip that a file is compared with has the inside of a region as a file has it. ``x.tril()`` over (C, T) is zero
there, and ``where(arange(T) < 10, f(x), g(x))`` is g, of which a clip of eight frames has nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from co3d_compile.contract.model_contract import LocalRegion
from co3d_compile.verification.long_values import Stream

SAME = 1e-6  # of the largest number, in float64
ASKED = 8  # entries that are changed one by one where a clip is shorter than what an entry reads


def wrong_inside(spec: LocalRegion, short: GraphModule, long: GraphModule, given: Sequence[Stream]) -> str:
    """Says what is wrong about a region inside of a long clip; empty where it is right, or cannot be looked at.

    Args:
        spec: What the file says of it.
        short: It, for a clip of the captured length, in float64.
        long: It, for the long clip, in float64.
        given: What it reads on the long clip, all of which is finite.
    """
    places = [v.claim.place for v in given]
    dims = [place.dim for place in places if place is not None and place.alone]
    sizes = {place.size for place in places if place is not None}
    counts = {v.count for v in given}
    if len(dims) != len(given) or len(sizes) != 1 or len(counts) != 1:
        return ""
    (size,), (count,) = sizes, counts
    at = (count - size) // 2 // spec.period * spec.period
    if at <= 0 or at + size >= count or size < spec.period:
        return ""
    beside = _Beside(spec, short, long, [v.value for v in given], dims, range(at, at + size))
    if beside.constant():
        return "it does not depend on its input inside of a long clip, and does in a clip of the captured length"
    if not beside.shown():
        return "inside of a long clip it computes something else than in a clip of the captured length"
    return ""


class _Beside:
    """A region on a long clip, and on a clip of the captured length that is a part of it."""

    def __init__(
        self,
        spec: LocalRegion,
        short: GraphModule,
        long: GraphModule,
        clips: Sequence[Tensor],
        dims: Sequence[int],
        inside: range,
    ) -> None:
        self.spec, self.short, self.long, self.dims, self.inside = spec, short, long, dims, inside
        self.clips = [x.double() if x.is_floating_point() else x for x in clips]
        self.whole = self._rows(long, self.clips)
        self.own = self._cut(self.clips)
        self.alone = self._rows(short, self.own)
        self.begun = self._begun(self.whole)

    def _rows(self, part: GraphModule, clips: Sequence[Tensor]) -> Tensor:
        """Computes the entries of a clip, one a row."""
        return part(*clips).double().movedim(self.spec.time_dim, 0).flatten(1)

    def _cut(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Cuts the clip of the captured length out of long ones."""
        return [x.narrow(dim, self.inside.start, len(self.inside)) for x, dim in zip(clips, self.dims, strict=True)]

    def _begun(self, rows: Tensor) -> Tensor:
        """The entries of a long clip that those of the shorter one are."""
        return rows[self.inside.start : self.inside.start + len(self.alone)]

    def _others(self, around: bool) -> list[list[Tensor]]:
        """Puts the entries of the long clip into another order; ``around``: but those of the shorter one."""
        found = []
        for moved in ([x.roll(1, d) for x, d in self._timed()], [x.flip(d) for x, d in self._timed()]):
            if around:
                for x, own in zip(self._cut(moved), self.own, strict=True):
                    x.copy_(own)
            found.append(moved)
        return found

    def _timed(self) -> zip[tuple[Tensor, int]]:
        return zip(self.clips, self.dims, strict=True)

    def constant(self) -> bool:
        """Says whether no entry inside of the long clip changes with what is read, and one of the shorter clip does."""
        others = self._others(around=False)
        if any(bool((~_same(self._begun(self._rows(self.long, x)), self.begun)).any()) for x in others):
            return False
        return any(bool((~_same(self._rows(self.short, self._cut(x)), self.alone)).any()) for x in others)

    def shown(self) -> bool:
        """Says whether a block that reads nothing beyond the shorter clip is the same there, if there is one.

        Else whether some block depends on the entries that the same block of the long clip depends on.
        """
        others = [self._begun(self._rows(self.long, x)) for x in self._others(around=True)]
        told = self._blocks(torch.stack([_same(x, self.begun) for x in others]).all(0))
        if told.any():
            return bool((told & self._blocks(_same(self.begun, self.alone))).any())
        alike = torch.ones(len(self.alone), dtype=torch.bool)
        for entry in {*range(0, len(self.inside), max(1, len(self.inside) // ASKED)), len(self.inside) - 1}:
            changed = self._changed(entry)
            there = _same(self._begun(self._rows(self.long, changed)), self.begun)
            alike &= there == _same(self._rows(self.short, self._cut(changed)), self.alone)
        return bool(self._blocks(alike).any())

    def _blocks(self, rows: Tensor) -> Tensor:
        """Says of each block what is true of all of its rows."""
        period = self.spec.period
        return rows[: len(rows) // period * period].view(-1, period).all(1)

    def _changed(self, entry: int) -> list[Tensor]:
        """Puts another entry in the place of one."""
        found = []
        for x, dim in self._timed():
            x = x.clone()
            x.select(dim, self.inside.start + entry).copy_(x.select(dim, 0))
            found.append(x)
        return found


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Says of each row whether it is the same."""
    finite = b[b.isfinite()].abs()
    limit = SAME * float(finite.max()) if finite.numel() else 0.0
    return ((a == b) | ((a - b).abs() <= limit) | (a.isnan() & b.isnan())).all(1)
