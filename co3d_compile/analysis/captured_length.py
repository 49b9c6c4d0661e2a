"""Whether a clip of the captured length shows what is inside of a long one.

``x.tril()`` over (C, T) is zero inside of a long clip, and ``where(arange(T) < 10, f(x), g(x))`` is g: a clip of eight
frames is neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from co3d_compile.analysis.locality import Dependence, Reach, dependences
from co3d_compile.analysis.locality_proof import NotLocal, Part, can_take, rows_equal, run
from co3d_compile.ir.resized_graph import in_float64

FAR = 2  # clips that lie on either side of what is inside
AGAIN = 8  # draws after which what has not changed is taken for constant


def check_shown(part: Part, found: Sequence[Dependence], reach: Reach) -> None:
    """Checks that a clip of the captured length has a block that is computed as those inside of a long clip are.

    Args:
        part: What was confirmed.
        found: What the entries of a long clip depend on.
        reach: Of a block.

    Raises:
        NotLocal: It has none, or what is inside of a long clip is constant, and it is not.
    """
    beside = _Beside(part, reach)
    blocks = beside.short // reach.period
    if not blocks:
        raise NotLocal("a clip is shorter than the period of its entries")
    if not beside.moves_inside() and beside.moves():
        raise NotLocal("inside of a long clip it is constant")
    told, same = beside.compared(beside.margin)
    if told.any():
        shown = bool((told & same).any())
    else:  # a clip is shorter than what an entry reads
        ends = [beside.compared(at) for at in (0, 2 * beside.margin)]
        shown = all(bool((told & same).any()) for told, same in ends if told.any())
        shown = shown and _same_reach(part, found, reach, beside.short)
    if not shown:
        raise NotLocal("inside of a long clip it is computed otherwise than in a clip as it was captured")


class _Beside:
    """A part on clips of the captured length, and on long ones that have them inside."""

    def __init__(self, part: Part, reach: Reach) -> None:
        self.part, self.period = part, reach.period
        self.short = part.captures.sizes[0].entries
        least = -(-max(reach.before, reach.after, FAR * self.short) // reach.period)
        margins = (m * reach.period for m in range(least, least + 256))
        margin = next((m for m in margins if can_take(part.captures, self.short + 2 * m)), None)
        if margin is None:
            raise NotLocal("it takes no clips that are longer by whole blocks")
        self.margin, self.long = margin, self.short + 2 * margin
        self.draws = torch.Generator().manual_seed(4)
        self.modules = {n: in_float64(part.at(n)) for n in (self.short, self.long)}

    def rows(self, clips: Sequence[Tensor]) -> Tensor:
        """Computes the entries of clips, one a row."""
        entries = clips[0].shape[self.part.dims[0]]
        return run(self.modules[entries], clips).movedim(self.part.dim, 0).flatten(1)

    def drawn(self, entries: int) -> list[Tensor]:
        """Draws clips."""
        return self.part.inputs(entries, self.draws)

    def moves_inside(self) -> bool:
        """Says whether what is inside of long clips depends on what it reads."""
        inside = slice(self.margin, self.margin + max(self.short, self.period))
        first = self.rows(self.drawn(self.long))[inside]
        return any(not torch.equal(self.rows(self.drawn(self.long))[inside], first) for _ in range(AGAIN))

    def moves(self) -> bool:
        """Says whether a clip of the captured length depends on what it reads."""
        return not torch.equal(self.rows(self.drawn(self.short)), self.rows(self.drawn(self.short)))

    def compared(self, at: int) -> tuple[Tensor, Tensor]:
        """Compares the blocks of a clip with those of long ones that have it from an entry on.

        Returns which of them depend on nothing else in the long ones, and which of them are the same there.
        """
        own = self.drawn(self.short)
        alone = self.rows(own)
        one, other = (self._around(own, at)[at : at + len(alone)] for _ in range(2))
        whole = len(alone) // self.period * self.period
        told, same = (rows_equal(one, x)[:whole].view(-1, self.period).all(1) for x in (other, alone))
        return told, same

    def _around(self, own: Sequence[Tensor], at: int) -> Tensor:
        """Computes the entries of a long clip that has another one inside, of which the rest is drawn."""
        clips = self.drawn(self.long)
        for clip, x, dim in zip(clips, own, self.part.dims, strict=True):
            clip.narrow(dim, at, self.short).copy_(x)
        return self.rows(clips)


def _same_reach(part: Part, found: Sequence[Dependence], reach: Reach, short: int) -> bool:
    """Says whether some block depends on what those inside of a long clip do, as far as the clip has it."""
    middle = found[0].rows // 2
    inside = [[d.all_distances()[middle + i] for i in range(reach.period)] for d in found]
    clips = part.inputs(short, torch.Generator().manual_seed(0))
    own = [d.all_distances() for d in dependences(in_float64(part.at(short)), clips, part.dims, part.dim)]
    rows, phase = len(own[0]), middle % reach.period

    def usual(n: int) -> bool:
        i = (n - phase) % reach.period
        return all(
            set(ours[n]) == {r for r in theirs[i] if 0 <= n + r < short}
            for ours, theirs in zip(own, inside, strict=True)
        )

    return any(all(map(usual, range(m, m + reach.period))) for m in range(0, rows - reach.period + 1, reach.period))
