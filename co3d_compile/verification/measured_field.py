"""How large the receptive field is at least: where frames of a long clip are NaN, so is what depends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from math import ceil

from co3d_compile.verification.needed_entries import NotCovered
from co3d_compile.verification.output_plans import Plan
from co3d_compile.verification.time_claims import NOTHING, Claim


class MeasuredField:
    """The receptive field, from the entries that are finite of what the results are read from.

    Args:
        plans: How the results are computed.
        claims: Where time is.
        unit: Frames after which entries are alike; None where all are, as in a dense model.
    """

    def __init__(self, plans: Sequence[Plan], claims: Mapping[str, Claim], unit: int | None) -> None:
        self.plans, self.claims, self.unit = plans, claims, unit

    def more(self, name: str, count: int, inside: range, claimed: int) -> int:
        """Counts the entries on both sides of some that are needed to say whether the field is larger than claimed.

        Args:
            name: Of the tensor.
            count: How many entries there are.
            inside: The frames that are not NaN.
            claimed: The receptive field that the file claims.
        """
        claim, every, beyond = self._repeats(name)
        finite = ceil((len(inside) + 2 + beyond - claimed) / claim.rate)  # so many are, if it is as claimed
        return every + max(0, finite - count)

    def fields(self, finite: Mapping[str, Mapping[int, bool]], inside: range, claimed: int | None) -> list[int]:
        """Lists lower bounds of the receptive field.

        Entries between the last NaN before and the first behind a run of finite ones repeat every ``unit`` frames.

        Args:
            finite: Of each tensor whether its entries are finite, by their index.
            inside: The frames that are not NaN.
            claimed: The receptive field that the file claims, where not all entries were computed.

        Raises:
            NotCovered: There are too few entries to say that it is not larger than is claimed.
        """
        found = []
        for name, flags in finite.items():
            claim, every, beyond = self._repeats(name)
            there = sorted(flags)
            if not there or there[-1] - there[0] >= len(there):
                continue
            for phase in range(every):
                own = [flags[at] for at in there[phase::every]]
                run = _longest(own)
                field = len(inside) + 2 - (len(run) + 1) * every * claim.rate + beyond
                if run and run.start > 0 and run.stop < len(own):
                    found.append(int(field))
                elif run and claimed is not None and field > claimed:
                    raise NotCovered
        return found

    def _repeats(self, name: str) -> tuple[Claim, int, Fraction]:
        """Finds after how many entries those of a tensor are alike, and the frames that a window of them adds."""
        claim = self.claims.get(name, NOTHING)
        every = 1 if self.unit is None else int(max(self.unit / claim.rate, Fraction(1)))
        # A window has so many entries of each of the places that repeat; up-sampled ones differ by place.
        reads = [r for p in self.plans for r in p.reads if r.name == name]
        spans = [(r.newest - r.oldest + 1) * r.claim.rate // claim.rate for r in reads]
        repeats = max((int(span) // every - 1 for span in spans), default=0)
        return claim, every, max(repeats, 0) * every * claim.spacing * claim.rate


def _longest(flags: Sequence[bool]) -> range:
    """Finds the indices of the longest run of true flags."""
    longest = range(0)
    for flag, group in groupby(range(len(flags)), flags.__getitem__):
        run = list(group)
        if flag and len(run) > len(longest):
            longest = range(run[0], run[-1] + 1)
    return longest
