"""The copies of a loop's body, and what each of them reads: of itself, of an earlier copy, of frames, or of neither."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from torch.fx import Node

from co3d_compile.capture.loops.tokens import Numbers, Run, Take, Tokens, alike, frame_of, leaves
from co3d_compile.ir.graph_walks import reached

ROTATIONS = 3  # of a run: where its copies may begin
FARTHEST = 16  # copies back that a copy may read


@dataclass(frozen=True)
class Inner:
    """An operand of the same copy: what operator ``at`` of the body computes."""

    at: int


@dataclass(frozen=True)
class Earlier:
    """An operand that operator ``at`` of the body has computed ``lag`` copies before."""

    at: int
    lag: int


@dataclass(frozen=True)
class Outer:
    """An operand that is the same for all copies, and what stands for it."""

    node: Node = field(compare=False)
    key: Hashable


@dataclass(frozen=True)
class Frames:
    """An operand that walks: for each copy it is taken out of the same tensor, at an index further on."""

    root: Node
    dim: int
    length: int | None
    own: int = field(compare=False)  # the index in the copy that this was read off


Edge = Inner | Earlier | Outer | Frames
Place = tuple[int, int]  # an operator of the body, and which of its operands (-1: its own index)


@dataclass(frozen=True)
class Walk:
    """Entries of a tensor along which copies walk.

    Args:
        root: The tensor.
        dim: The dim of which entries are taken.
        start: The first index that the first copy takes.
        step: From a copy's first index to the next one's.
        length: How many entries a copy takes; None: a single one, without the dim.
    """

    root: Node
    dim: int
    start: int
    step: int
    length: int | None

    @property
    def entries(self) -> int:
        """How many entries a copy takes."""
        return self.length or 1

    def moved(self, turns: int) -> Walk:
        """The same walk, begun so many turns later."""
        return replace(self, start=self.start + turns * self.step)


@dataclass
class Copies:
    """A loop as it was captured.

    Args:
        turns: For each turn the operators of its copy, by their place in the body. In the last ones some may be
            missing: what nobody reads is not captured.
        edges: The operands of each operator of the body, in the order in which it reads them.
        walks: The walks of operands and of operators.
        invariant: The operators of the body that do the same in each turn.
        starts: What the first turns read in place of an earlier one's values: by operator and distance.
    """

    turns: list[dict[int, Node]]
    edges: list[list[Edge]]
    walks: dict[Place, Walk]
    invariant: set[int]
    starts: dict[tuple[int, int], Node]

    def __post_init__(self) -> None:
        self.body = self.turns[0]  # stands for all: nothing is missing in it

    def walk_of(self, at: int) -> Walk | None:
        """The walk that an operator of the body is."""
        return self.walks.get((at, -1))

    def remembers(self, at: int) -> bool:
        """Says whether an operator of the body reads an earlier turn's value, itself or by others of its turn.

        What does not, and is handed on, is a piece of a turn that the next one reads: the copies begin elsewhere.
        """
        within = reached([at], lambda place: [edge.at for edge in self.edges[place] if isinstance(edge, Inner)])
        return any(isinstance(edge, Earlier) for place in within for edge in self.edges[place])

    def recurrent(self) -> list[int]:
        """Finds the operators of the body that depend on what they have computed in an earlier turn."""
        return [at for at in self.body if at in reached(self._read(at), self._read)]

    def _read(self, at: int) -> list[int]:
        return [edge.at for edge in self.edges[at] if isinstance(edge, (Inner, Earlier))]

    def core(self) -> Copies | None:
        """Cuts out the loop of what a turn hands on to itself, without what only reads that; None where that is all.

        ``hs.append(cell(x, hs[-1])); out.append(torch.stack(hs[-3:]).mean(0))`` is a loop of cells, whose first turn is
        as the others. Their means are not.
        """
        own = self.recurrent()
        kept = reached(own, self._read)
        if not own or len(kept) == len(self.body):
            return None
        edges = [operands if at in kept else [] for at, operands in enumerate(self.edges)]
        lags = {(e.at, e.lag) for operands in edges for e in operands if isinstance(e, Earlier)}
        return Copies(
            [{at: node for at, node in turn.items() if at in kept} for turn in self.turns],
            edges,
            {place: walk for place, walk in self.walks.items() if place[0] in kept},
            self.invariant & kept.keys(),
            {(at, lag): node for (at, lag), node in self.starts.items() if any(a == at and lag <= b for a, b in lags)},
        )


@dataclass
class _Signature:
    """What a copy reads, and the indices at which it takes frames."""

    edges: list[list[Edge]]
    indices: dict[Place, int]


def copies_of(tokens: Tokens, run: Run) -> Iterator[Copies]:
    """Yields the loops that a run of tokens may be, one for each place where copies may begin."""
    for first in _rotations(tokens, run):
        count = (run.stop - first) // run.period
        if count > 1:
            found = _Reading(tokens, first, run.period, count).copies()
            if found is not None:
                yield found


def _rotations(tokens: Tokens, run: Run) -> list[int]:
    """Finds where the first copy may begin: where least is handed on to the next one, and that is read least often.

    Once counted with the frames that copies take, once without: each copy can take those that it needs. Where the run
    begins is one more: as many values may be handed on in the middle of a copy, some of them made of frames.
    """
    size = run.stop - run.start
    middle = max(1, size // run.period // 2) * run.period
    found: dict[int, None] = {}
    for with_frames in (True, False):
        values, reads = _crossing(tokens, run, with_frames)
        ways = [(values[middle + r], reads[middle + r], -((size - r) // run.period), r) for r in range(run.period)
                if middle + r <= size]  # fmt: skip
        found.update(dict.fromkeys(run.start + r for *_, r in sorted(ways)[:ROTATIONS]))
    return [*found, *({run.start} - found.keys())]


def _crossing(tokens: Tokens, run: Run, with_frames: bool) -> tuple[Numbers, Numbers]:
    """Counts for each place of a run the values from before it that are read behind it, and how often."""
    size = run.stop - run.start
    values, reads = [0] * (size + 1), [0] * (size + 1)
    for i, node in enumerate(tokens.nodes[run.start : run.stop]):
        frame = node in tokens.takes and tokens.place.get(node.all_input_nodes[0], -1) < run.start
        if frame and not with_frames:
            continue
        places = [tokens.place.get(user, run.stop) - run.start for user in node.users]
        places = [place for place in places if place < size]
        for counted, ends in ((values, [max(places, default=i)]), (reads, places)):
            counted[i + 1] += len(ends)
            for end in ends:
                counted[end + 1] -= 1
    return np.cumsum(values), np.cumsum(reads)


class _Reading:
    """The reading of copies that lie one behind the other, from an operator on."""

    def __init__(self, tokens: Tokens, first: int, period: int, count: int) -> None:
        self.tokens, self.first, self.period, self.count = tokens, first, period, count

    def copies(self) -> Copies | None:
        """Lists the copies that do the same as each other, if there are two at least."""
        signatures = [self._signature(t) for t in range(self.count)]
        alike = [
            (signatures[t].edges, self._moved(signatures[t - 1], signatures[t]))
            for t in range(1, self.count)
        ]  # fmt: skip
        begin, stop = _longest(alike)
        edges, moved = alike[begin]
        if any(step < 0 for step in moved.values()):
            return None  # it runs backwards
        first, last = begin, stop  # alike[t] is of copy t + 1
        if not _begins(signatures[first].edges, edges):
            first += 1
        else:
            lags = max((e.lag for operands in edges for e in operands if isinstance(e, Earlier)), default=1)
            while first > max(0, begin - lags + 1) and alike[first - 1][1] == moved:
                if not _begins(signatures[first - 1].edges, edges):
                    break
                first -= 1
        if last - first < 1:
            return None
        return self._joined(edges, moved, first, last)

    def _signature(self, t: int) -> _Signature:
        base = self.first + t * self.period
        nodes = self.tokens.nodes[base : base + self.period]
        result = _Signature([], {})
        for at, node in enumerate(nodes):
            own = self.tokens.takes.get(node)
            if own is not None:
                result.indices[at, -1] = own.start
            edges = []
            for k, x in enumerate(leaves(node)):
                edge = self._edge(x, base)
                if isinstance(edge, Frames):
                    result.indices[at, k] = edge.own
                edges.append(edge)
            result.edges.append(edges)
        return result

    def _edge(self, x: Node, base: int) -> Edge:
        place = self.tokens.place.get(x, -1)
        if place >= base:
            return Inner(place - base)
        if place >= self.first:
            lag = (base - place + self.period - 1) // self.period
            if lag <= FARTHEST:
                return Earlier(place - base + lag * self.period, lag)
        take = self.tokens.frames.get(x)
        if take is not None and place < self.first:
            return Frames(take.root, take.dim, take.length, take.start)
        return Outer(x, self.tokens.constant(x))

    def _moved(self, before: _Signature, after: _Signature) -> dict[Place, int]:
        """Measures how far each index has moved from one copy to the next."""
        return {
            place: index - before.indices[place] for place, index in after.indices.items() if place in before.indices
        }

    def _joined(self, edges: list[list[Edge]], moved: dict[Place, int], first: int, last: int) -> Copies | None:
        """Takes copies ``first`` to ``last``; None if they cannot be turns of a loop."""
        turns = [
            dict(enumerate(self.tokens.nodes[base : base + self.period]))
            for base in range(self.first + first * self.period, self.first + (last + 1) * self.period, self.period)
        ]
        edges = [list(operands) for operands in edges]
        body = turns[0]
        for (at, k), step in moved.items():
            if k >= 0 and step == 0:  # the same frame in each copy
                x = leaves(body[at])[k]
                edges[at][k] = Outer(x, x)
        invariant = _invariant(edges, moved)
        walks: dict[Place, Walk] = {}
        for (at, k), step in moved.items():
            if step == 0:
                continue
            node = body[at] if k < 0 else leaves(body[at])[k]
            take = frame_of(node)
            if take is None or (k < 0 and not all(_is_outer(e, invariant) for e in edges[at])):
                return None
            walks[at, k] = Walk(take.root, take.dim, take.start, step, take.length)
        found = Copies(turns, edges, walks, invariant, {})
        if not _find_starts(self.tokens, found):
            return None
        _walk_behind(found)
        return found


def _walk_behind(copies: Copies) -> None:
    """Makes a walk of its own of frames that an earlier copy has taken, if the first copies read such frames too."""
    for of in {at for at, _ in copies.starts}:
        walk = copies.walk_of(of)
        starts = {lag: node for (at, lag), node in copies.starts.items() if at == of}
        if walk is None or any(not _is_at(node, walk.moved(-lag)) for lag, node in starts.items()):
            continue
        for at, operands in enumerate(copies.edges):
            for k, edge in enumerate(operands):
                if isinstance(edge, Earlier) and edge.at == of:
                    copies.walks[at, k] = behind = walk.moved(-edge.lag)
                    operands[k] = Frames(walk.root, walk.dim, walk.length, behind.start)
        for lag in starts:
            del copies.starts[of, lag]


def _is_at(node: Node, walk: Walk) -> bool:
    """Says whether a node is what a walk takes first."""
    return frame_of(node) == Take(walk.root, walk.dim, walk.start, walk.length)


def _begins(first: list[list[Edge]], edges: list[list[Edge]]) -> bool:
    """Says whether a copy reads what all read, but for values of copies before it."""
    return all(
        a == b or isinstance(b, Earlier)
        for own, others in zip(first, edges, strict=True)
        for a, b in zip(own, others, strict=True)
    )


def _longest(items: list[tuple[list[list[Edge]], dict[Place, int]]]) -> tuple[int, int]:
    """Finds where the longest run of equal items begins and stops."""
    best, at = (0, 1), 0
    for _, group in groupby(items):
        count = len(list(group))
        if count > best[1] - best[0] or at == 0:
            best = (at, at + count)
        at += count
    return best


def _is_outer(edge: Edge, invariant: set[int]) -> bool:
    return isinstance(edge, Outer) or (isinstance(edge, Inner) and edge.at in invariant)


def _invariant(edges: list[list[Edge]], moved: dict[Place, int]) -> set[int]:
    """Finds the operators that compute the same in each copy."""
    found: set[int] = set()
    for at, operands in enumerate(edges):
        if not moved.get((at, -1)) and all(_is_outer(e, found) for e in operands):
            found.add(at)
    return found


def _find_starts(tokens: Tokens, copies: Copies) -> bool:
    """Notes what the first turns read in place of an earlier one's values; False if they disagree."""
    for t, turn in enumerate(copies.turns):
        for at, operands in enumerate(copies.edges):
            for k, edge in enumerate(operands):
                if not isinstance(edge, Earlier) or edge.lag <= t:
                    continue
                key, node = (edge.at, edge.lag - t), leaves(turn[at])[k]
                known = copies.starts.setdefault(key, node)
                if tokens.constant(known) != tokens.constant(node):
                    return False
                if not alike(node, copies.body[edge.at]):
                    return False
    return True
