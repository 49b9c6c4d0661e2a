"""What was found to be local is run as a step runs it, beside whole clips of which all the rest is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from co3d_compile.analysis.locality import Dependence, Reach
from co3d_compile.ir.resized_graph import Captures, NotResizable, in_float64
from co3d_compile.support.silence_torch import quiet

SAME = 1e-11  # of the largest number of a block, in float64
SCALES = (1.0, 30.0, 0.03, 1000.0, 0.0)
"""Of what is drawn outside of a block's reach; at 0 all of it is one number."""
DRAWS = 2
LONGER = 8  # blocks by which a step may have to be longer than the reach


class NotLocal(Exception):
    """A claim of locality does not hold. The message is the reason."""


class OddEnds(NotLocal):
    """Entries at one end are not computed as those between are; those of a result farther behind may be."""


@dataclass(frozen=True)
class Part:
    """A part of a network whose locality is claimed.

    Args:
        captures: It, at any length.
        dims: The time dim of each input.
        dtypes: Of each input.
        dim: The time dim of the result.
    """

    captures: Captures
    dims: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    dim: int

    @property
    def batch(self) -> int | None:
        """One clip at once, where it takes any number of them."""
        return 1 if self.captures.wide is not None else None

    def at(self, entries: int) -> GraphModule:
        """Captures the part at a length, for one clip."""
        return self.captures.at(entries, self.batch)

    def inputs(self, entries: int, generator: torch.Generator, scale: float = 1.0) -> list[Tensor]:
        """Draws random clips, one of each input."""
        shapes = self.captures.shapes(entries, self.batch)
        return [drawn(shape, dtype, generator, scale) for shape, dtype in zip(shapes, self.dtypes, strict=True)]


@dataclass(frozen=True)
class Proof:
    """That a part is local.

    Args:
        reach: What a block depends on.
        shortest: Entries of the shortest clip of which a block is right.
        odd: What is odd about its first and last entries.
        entries: Of the clip that showed it.
    """

    reach: Reach
    shortest: int
    odd: str | None
    entries: int


def confirm(part: Part, reach: Reach, entries: int) -> int:
    """Confirms a claim; returns how many entries a step must read to compute one block.

    Args:
        part: The part of a network.
        reach: The claim.
        entries: The length of the whole clips.

    Raises:
        NotLocal: Some block depends on what is outside of its reach.
    """
    length = run_length(part.captures, reach, reach.period)
    longest = length + LONGER * reach.period
    while entries < 2 * longest:  # else a run of them would fit in one or two places alone
        entries *= 2
    whole = in_float64(part.at(entries))
    if not _same_by_place(part, reach, whole, entries):
        raise NotLocal("its entries differ by their place in the clip")
    for tried in range(length, longest + 1, reach.period):
        if can_take(part.captures, tried) and _holds(part, reach, whole, entries, tried):
            return tried
    raise NotLocal("it depends on more than its operators say")


def confirmed(part: Part, reach: Reach, entries: int) -> tuple[Reach, int]:
    """Confirms a claim, or the one that the constants of the part make of it.

    What is divided by how many windows lie over each entry depends on that entry alone, and on where it stands: the
    divisor repeats with the hop, and is another one near the ends.

    Raises:
        NotLocal: Neither holds.
    """
    try:
        return reach, confirm(part, reach, entries)
    except NotLocal:
        other = _repeating(part, reach, entries)
        if other is None:
            raise
        return other, confirm(part, other, entries)


def _rows_of_one(part: Part, module: GraphModule, entries: int) -> Tensor:
    """Computes the entries that a part gives where all that it reads are the same, one a row."""
    clips = part.inputs(entries, torch.Generator().manual_seed(2))
    alike = [clip.narrow(dim, 0, 1).expand_as(clip).clone() for clip, dim in zip(clips, part.dims, strict=True)]
    return run(module, alike).double().movedim(part.dim, 0).flatten(1)


def _same_when_moved(part: Part, module: GraphModule, entries: int, by: int) -> Tensor:
    """Says of each entry whether it is the same in a clip that is moved by some entries, from one end to the other."""
    clips = part.inputs(entries, torch.Generator().manual_seed(2))
    moved = [clip.roll(by, dim) for clip, dim in zip(clips, part.dims, strict=True)]
    rows, later = (run(module, given).movedim(part.dim, 0).flatten(1) for given in (clips, moved))
    return rows_equal(rows, later.roll(-by, 0))


def _same_by_place(part: Part, reach: Reach, whole: GraphModule, entries: int) -> bool:
    """Says whether blocks in the middle of a clip are the same, wherever they begin.

    The blocks that :func:`_holds` looks at may all be even ones.
    """
    same, period = _same_when_moved(part, whole, entries, reach.period), reach.period
    first, last = max(len(same) // 4, reach.before + period), min(3 * len(same) // 4, len(same) - reach.after - period)
    return bool(same[first:last].all())


def _repeating(part: Part, reach: Reach, entries: int) -> Reach | None:
    """Finds the reach of a part whose entries differ by their place in a period, and at the ends; else None."""
    try:
        module = in_float64(part.at(entries))
        rows = _rows_of_one(part, module, entries)
    except (NotResizable, RuntimeError, IndexError, ValueError, TypeError):
        return None
    count, near = len(rows), SAME * _largest(rows)
    for period in range(reach.period, count // 4 + 1, reach.period):
        later, earlier = rows[period:], rows[:-period]
        same = ((later == earlier) | ((later - earlier).abs() <= near)).all(1).tolist()
        first, last = count // 4, 3 * count // 4 - period
        if all(same[first:last]):
            front = next((n + 1 for n in reversed(range(first)) if not same[n]), 0)
            stop = next((n for n in range(last, count - period) if not same[n]), count - period)
            after = max(reach.after, count - period - stop)
            found = Reach(max(reach.before, front), after + (count - after) % period, period)
            return found if found != reach else None
    return None


def odd_entries(part: Part, found: Sequence[Dependence], period: int, entries: int) -> str | None:
    """Says what is odd about entries that are not what those between are, though the clip has all that these read.

    They are no edge that a stream never reads, as padding is: a weight of the last frame, a mask over the first one.
    Nor is what depends on no frame at all, such as a class token in front, unless it is one number, as padding is.
    """
    whole, distances = in_float64(part.at(entries)), [d.all_distances() for d in found]
    rows, middle = found[0].rows, found[0].rows // 2
    alike = _rows_of_one(part, whole, entries)
    by = max(1, rows // 4 // period) * period  # from entry to entry so far one comes from each end into the middle
    inwards = {step: _same_when_moved(part, whole, entries, step) for step in (by, -by)}
    near = [[r for d in distances for r in d[middle + i]] for i in range(period)]
    for n in range(rows):
        i, step = (n - middle) % period, by if n < middle else -by
        first, last = (n + edge(near[i]) if near[i] else -1 for edge in (min, max))
        inside = first >= 0 and last < rows
        moves = inside and first + step >= 0 and last + step < rows
        if (inside and not equal(alike[n], alike[middle + i])) or (moves and not inwards[step][n]):
            return "some of its entries are computed otherwise, by their place in the clip"
    own = [n for n in range(rows) if not any(d[n] for d in distances)]
    learned = run(whole, part.inputs(entries, torch.Generator().manual_seed(3))).movedim(part.dim, 0)[own].flatten(1)
    alike_throughout = equal(learned, learned[:, :1].expand_as(learned))
    return None if alike_throughout else "some of its entries are the network's own, whatever the frames are"


def run_length(captures: Captures, reach: Reach, block: int) -> int:
    """Finds the least number of entries at which a block has its reach, and which the graph can take.

    Raises:
        NotLocal: There is none.
    """
    front = -(-reach.before // reach.period) * reach.period
    for more in range(0, 256 * reach.period, reach.period):
        if can_take(captures, front + more + block + reach.after):
            return front + more + block + reach.after
    raise NotLocal("it takes no clips as short as its reach")


def can_take(captures: Captures, entries: int) -> bool:
    try:
        captures.at(entries)
        captures.shapes(entries)
    except NotResizable:
        return False
    return True


def _holds(part: Part, reach: Reach, whole: GraphModule, entries: int, length: int) -> bool:
    """Says whether blocks of whole clips are what a step computes of their reach, whatever is outside of it.

    Looked at are the first block of which that can be told, the last one, and one between: what counts from an end of
    the clip is not the same in all of them.
    """
    try:
        step = in_float64(part.at(length))
    except NotResizable:
        return False
    generator = torch.Generator().manual_seed(0)
    front = length - reach.period - reach.after
    first, last = -(-front // reach.period), (entries - length + front) // reach.period
    for _ in range(DRAWS):
        for m in sorted({first, (first + last) // 2, last}):
            start = m * reach.period - front
            near = part.inputs(length, generator)
            try:
                wanted = _block(run(step, near), part.dim, front, reach.period)
                for scale in SCALES:
                    clips = part.inputs(entries, generator, scale)
                    for clip, own, dim in zip(clips, near, part.dims, strict=True):
                        clip.narrow(dim, start + front - reach.before, reach.before + reach.period + reach.after).copy_(
                            own.narrow(dim, front - reach.before, reach.before + reach.period + reach.after)
                        )
                    got = _block(run(whole, clips), part.dim, m * reach.period, reach.period)
                    if not equal(got, wanted):
                        return False
            except (RuntimeError, IndexError, ValueError, TypeError):  # an operator refuses such a length
                return False
    return True


def confirm_ends(part: Part, reach: Reach, entries: int, length: int) -> None:
    """Confirms that the first and the last entries are those of a short clip that begins, or ends, where they do.

    Behind the reach of the first ones a step has nothing yet, in front of that of the last ones nothing any more.

    Raises:
        NotLocal: They read beyond their reach.
    """
    if reach.period > 1:
        raise OddEnds("blocks of several entries have no exact ends yet")
    whole, step = in_float64(part.at(entries)), in_float64(part.at(length))
    generator = torch.Generator().manual_seed(1)
    clips = part.inputs(entries, generator)
    wanted = run(whole, clips)
    for i in range(length - 1 - reach.after):
        come = min(length, i + reach.after + 1)
        got = run(step, _partly(part, clips, range(come), length, 0, generator))
        _check_end(got.select(part.dim, i), wanted.select(part.dim, i))
    for i in range(1, reach.after + 1):
        left = min(length, i + reach.before)
        near = _partly(part, clips, range(entries - left, entries), length, length - left, generator)
        got = run(step, near)
        rows = got.shape[part.dim] - i, wanted.shape[part.dim] - i
        _check_end(got.select(part.dim, rows[0]), wanted.select(part.dim, rows[1]))


def _partly(
    part: Part, clips: Sequence[Tensor], kept: range, length: int, at: int, generator: torch.Generator
) -> list[Tensor]:
    """Makes short clips that have some entries of long ones, and else anything."""
    short = part.inputs(length, generator, 3.0)
    for x, clip, dim in zip(short, clips, part.dims, strict=True):
        x.narrow(dim, at, len(kept)).copy_(clip.narrow(dim, kept.start, len(kept)))
    return short


def _check_end(got: Tensor, wanted: Tensor) -> None:
    if not equal(got, wanted):
        raise OddEnds("at the ends of a clip it reads beyond its reach")


def _block(result: Tensor, dim: int, start: int, period: int) -> Tensor:
    return result.narrow(dim, start, period)


def run(module: GraphModule, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad(), quiet():
        result: Tensor = module(*[x.double() if x.is_floating_point() else x for x in inputs])
    return result


def equal(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0.0, atol=SAME * _largest(b) + 1e-300, equal_nan=True)


def rows_equal(a: Tensor, b: Tensor) -> Tensor:
    """Says of each row whether it is the same, beside the largest number of all."""
    same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    if a.is_floating_point():
        same = same | ((a - b).abs() <= SAME * _largest(b) + 1e-300)
    return same.all(1)


def _largest(x: Tensor) -> float:
    """Finds the largest absolute value of those that are finite: scores that are masked out are minus infinity."""
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def drawn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draws random numbers; integers of all that their kind can be, if that is few."""
    if dtype.is_floating_point:
        x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return x * scale if scale else torch.full_like(x, float(x.flatten()[0]))
    high = 2 if dtype is torch.bool else min(torch.iinfo(dtype).max, 255) + 1
    x = torch.randint(0, high, tuple(shape), generator=generator)
    return (x if scale else torch.full_like(x, int(x.flatten()[0]))).to(dtype)
