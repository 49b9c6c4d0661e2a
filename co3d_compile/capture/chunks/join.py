"""Clips that are computed chunk by chunk, as the same operators on the whole clip.

A causal network is often run on a few frames at a time, with caches of the last frames in front of each convolution.
Written out, its graph has each operator once for each chunk. What the chunks compute, entry by entry, is what the
operator computes on the whole clip.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, partial
from itertools import combinations, count, pairwise

import torch
from torch import Tensor
from torch.fx import Interpreter, Node, map_arg
from torch.fx.node import Argument, Target

from co3d_compile.capture.chunks.entries import EACH, Computed, Entries, Filling, Given, other_pads, unpadded
from co3d_compile.capture.chunks.places import NoChunks, Place, cut_nodes, places_of, source_of
from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import Tokens
from co3d_compile.ir.aten_operators import RESHAPES
from co3d_compile.ir.graph_edits import erase_unused, insert
from co3d_compile.ir.index_equation import Reads
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal, random_clips

log = logging.getLogger(__name__)
aten = torch.ops.aten
SURE = 3  # chunks: fewer are joined where they are a whole
PIECES = 4  # that one operator may read, beside a start of its own
LESS = 0.6  # of the operators, at most
SAME = 3e-5  # of the largest number: the same sums in another order


def join_chunks(program: Program) -> None:
    """Writes ``cat([f(x[:1]), f(cat([x[:1], x[1:5]])), …])`` over time as f on all of x, where it is the same.

    So are pieces of a batch, into which time may be folded. Each join is asked of the tensors that its pieces are cut
    from. Then those that are left go back to the inputs, the last one first: caches are in between.

    The numbers stay the same, and are compared.
    """
    times, tokens = TimeDims(program), cache(partial(Tokens, program))
    try:
        for nearest in (True, False):
            cut = cut_nodes(times)
            joins = [n for n in program.graph.nodes if n in cut and n.target is aten.cat.default]
            for cat in joins if nearest else reversed(joins):
                if not cat._erased and _may_join(cat) and _joined(program, cat, times, tokens, cut, nearest):
                    cut = cut_nodes(times)
                    tokens.cache_clear()
    finally:
        times.forget()


def _may_join(cat: Node) -> bool:
    """Says whether a concatenation may be one of chunks: few of them are computed by the same operator."""
    pieces = Arguments(cat).tensors("tensors")
    return len(pieces) >= SURE or (len(pieces) > 1 and len({x.target for x in pieces}) == 1)


def _joined(
    program: Program, cat: Node, times: TimeDims, tokens: Callable[[], Tokens], cut: set[Node], nearest: bool
) -> bool:
    """Puts operators on the whole clip in place of those on chunks; whether they do the same."""
    last = cat.prev
    try:
        places, roots = places_of(cat, times, cut, nearest)
        entries = Entries(tokens(), places, roots)
        few = nearest or len(Arguments(cat).tensors("tensors")) < SURE
        if few and not entries.covered_by(cat):
            raise NoChunks("it is no whole")
        new = _Writer(program, cat, entries).written()
    except (NoChunks, RuntimeError, ValueError, TypeError, IndexError) as why:
        log.debug("%s joins no chunks: %s", cat, why)
        while cat.prev is not last:  # what was written before it turned out
            program.graph.erase_node(cat.prev)
        return False
    if not _alike(program, cat, new):
        erase_unused(new)
        return False
    first = last.next
    cat.replace_all_uses_with(new)
    erase_unused(cat)
    program.record(new, "chunks of a clip")
    times.look_again(first)
    return True


class _Kept(Interpreter):
    """A run of a graph that keeps some values."""

    def __init__(self, program: Program, *nodes: Node) -> None:
        super().__init__(program.module)
        self.nodes = nodes
        self.kept: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> object:
        """Keeps the value of a node."""
        value = super().run_node(n)
        if n in self.nodes and isinstance(value, Tensor):
            self.kept[n] = value
        return value


def _alike(program: Program, a: Node, b: Node) -> bool:
    """Says whether two nodes have the same values for random clips."""
    run = _Kept(program, a, b)
    with torch.no_grad():
        run.run(*random_clips(program))
    return equal(run.kept[a], run.kept[b], SAME)


class _Layer:
    """What one operator on the whole clip computes.

    Args:
        does: What the operator does.
        reads: Which entries of its operands each of its results is computed from.
        operands: How many have entries.

    Attributes:
        lines: For each operand the entries that it has, in order.
        at: The place of each entry in the result.
    """

    def __init__(self, does: Hashable, reads: Reads, operands: int) -> None:
        self.does, self.reads = does, reads
        self.lines: list[list[int]] = [[] for _ in range(operands)]
        self.at: dict[int, int] = {}
        self.node: Node | None = None
        self.open = False
        self._next = 0

    def takes(self, number: int, entry: Computed) -> bool:
        """Adds an entry to the results, if it can be the next one on the operands, made longer by what it reads."""
        reads, known = self.reads, len(self.lines[0])
        for u in count(self._next):
            window = reads.of(u)
            if window.start > known or (not self.at and window.start > 0):
                return False
            if window.start < 0 or reads.way(u) != entry.way:
                continue
            if any(line[window.start :] != list(read)[: known - window.start] for line, read in self._read(entry)):
                return False
            for line, read in self._read(entry):
                line += read[known - window.start :]
            self.at[number], self._next = u, u + 1
            return True
        return False

    def _read(self, entry: Computed) -> Iterator[tuple[list[int], tuple[int, ...]]]:
        return zip(self.lines, entry.reads, strict=True)


class _Writer:
    """Writes the operators on the whole clip that compute what chunks are joined to."""

    def __init__(self, program: Program, cat: Node, entries: Entries) -> None:
        self.program, self.cat, self.entries = program, cat, entries
        self.layer: dict[int, _Layer] = {}
        self.made: dict[tuple[int, ...], Node] = {}

    def written(self) -> Node:
        """Computes the whole of what is joined.

        Raises:
            NoChunks: It is no stream, or nearly as many operators are needed as for the chunks.
        """
        wanted = self.entries.of[self.cat]
        layers = list[_Layer]()
        for layer in self._layers(wanted):
            layers.append(layer)
            if len(layers) > LESS * self.entries.operators:
                raise NoChunks("as many operators")
        if not self.entries.operators:
            raise NoChunks("nothing is computed")
        for layer in reversed(layers):  # from the first one on: a network may be deeper than Python's stack
            self._node(layer)
        return self._sequence(wanted)

    # --- which entries are computed together

    def _layers(self, wanted: Sequence[int]) -> Iterator[_Layer]:
        """Finds the layers, from the last one to the first one: each is found when all that reads it is known."""
        heap: list[int] = []
        asked: dict[Hashable, list[set[int]]] = {}
        self._ask(wanted, asked, heap)
        while heap:
            last = -heapq.heappop(heap)
            entry = self.entries.all[last]
            if last in self.layer or not isinstance(entry, Computed):
                continue
            for layer in self._chains(entry.does, self._together(last, asked[entry.does])):
                yield layer
                for read in layer.lines:
                    self._ask(read, asked, heap)

    def _ask(self, numbers: Sequence[int], asked: dict[Hashable, list[set[int]]], heap: list[int]) -> None:
        """Notes that some entries are needed one behind the other."""
        wanted: dict[Hashable, set[int]] = {}
        for n in set(numbers):
            entry = self.entries.all[n]
            if isinstance(entry, Computed) and n not in self.layer:
                wanted.setdefault(entry.does, set()).add(n)
                heapq.heappush(heap, -n)
        for does, new in wanted.items():
            groups = asked.setdefault(does, [])
            for known in [g for g in groups if g & new]:
                groups.remove(known)
                new |= known
            groups.append(new)

    def _together(self, last: int, groups: list[set[int]]) -> list[int]:
        """Entries that are computed by one operator: none of them from another one; in the order of time.

        They are asked for together, or some of them are earlier than all that are asked for elsewhere.
        """
        own = next(g for g in groups if last in g)
        groups.remove(own)
        found, before, least = list[int](), set[int](), min(min(g) for g in [own, *groups])
        for e in sorted(own, reverse=True):
            if e not in before:
                found.append(e)
                self._add_before(e, before, least)
        if len(found) < len(own):
            raise NoChunks("it is computed from itself")
        for others in sorted(groups, key=max, reverse=True):
            if max(others) < found[-1] and not others & before:
                groups.remove(others)
                found += sorted(others, reverse=True)
                for e in others:
                    self._add_before(e, before, least)
        return found[::-1]

    def _add_before(self, number: int, before: set[int], least: int) -> None:
        """Adds what an entry is computed from."""
        stack = [number]
        while stack:
            entry = self.entries.all[stack.pop()]
            if isinstance(entry, Computed):
                for read in entry.reads:
                    new = [e for e in read if e >= least and e not in before]
                    before.update(new)
                    stack += new

    def _chains(self, does: Hashable, together: list[int]) -> Iterator[_Layer]:
        """Yields the entries as results of as few operators as there must be."""
        how = self.entries.how[does]
        layer = _Layer(does, how.reads, len(how.operands))
        for number in together:
            entry = self.entries.all[number]
            assert isinstance(entry, Computed)
            if not layer.takes(number, entry):
                if not layer.at:
                    raise NoChunks("it is computed from nothing")
                yield layer
                layer = _Layer(does, how.reads, len(how.operands))
                layer.takes(number, entry)
            self.layer[number] = layer
        yield layer

    # --- the operators

    def _sequence(self, numbers: Sequence[int]) -> Node:
        """Makes a tensor with these entries."""
        key = tuple(numbers)
        if key not in self.made:
            self.made[key] = self._pieced(numbers)
        return self.made[key]

    def _pieced(self, numbers: Sequence[int]) -> Node:
        place = self.entries.place[numbers[0]]
        if any(self.entries.place[n] != place for n in numbers):
            raise NoChunks("entries are in several dims")
        known = [i for i, n in enumerate(numbers) if not isinstance(self.entries.all[n], Filling)]
        front, end = (known[0], known[-1] + 1) if known else (0, 0)
        runs = list(_runs([self._source(n) for n in numbers[front:end]]))
        if any(a[0][0] is b[0][0] and a[0][1] > b[0][1] for a, b in combinations(runs, 2)):
            raise NoChunks("a later entry comes first")
        pieces = [self._piece(run, place) for run in runs]
        if not 0 < len(pieces) <= PIECES or (not place.alone and (len(pieces) > 1 or end - front < len(numbers))):
            raise NoChunks("entries lie apart")
        whole = pieces[0] if len(pieces) == 1 else self._insert(aten.cat.default, pieces, place.dim)
        return self._padded(whole, numbers[:front], numbers[end:], place.dim)

    def _padded(self, whole: Node, front: Sequence[int], back: Sequence[int], dim: int) -> Node:
        values = {f.value for n in (*front, *back) if isinstance(f := self.entries.all[n], Filling)}
        if not values:
            return whole
        if len(values) > 1:
            raise NoChunks("several numbers stand outside")
        pads = [0, 0] * (len(shape_of(whole)) - 1 - dim) + [len(front), len(back)]
        return self._insert(aten.constant_pad_nd.default, whole, pads, values.pop())

    def _source(self, number: int) -> tuple[Node, int]:
        """Finds the tensor that an entry is in, and which one it is."""
        entry = self.entries.all[number]
        if isinstance(entry, Given):
            return entry.root, entry.index
        if not isinstance(entry, Computed):
            raise NoChunks("numbers stand between entries")
        return self._node(self.layer[number]), self.layer[number].at[number]

    def _piece(self, run: list[tuple[Node, int]], place: Place) -> Node:
        node, first = run[0]
        if first == 0 and len(run) == place.entries(shape_of(node)):
            return node
        if not place.alone:
            raise NoChunks("entries lie apart")
        return self._insert(aten.slice.Tensor, node, place.dim, first, first + len(run))

    def _node(self, layer: _Layer) -> Node:
        if layer.node is None:
            if layer.open:
                raise NoChunks("it is computed from itself")
            layer.open = True
            layer.node = self._operator(layer)
        return layer.node

    def _operator(self, layer: _Layer) -> Node:
        how = self.entries.how[layer.does]
        operands = iter([self._sequence(line) for line in layer.lines])
        node, timed, source = how.node, set(how.operands), source_of(how.node)
        sizes = how.place.sized(shape_of(node), len(layer.lines[0]) * how.reads.up)
        if node.target in RESHAPES:
            return self._like(node, aten.reshape.default, next(operands), sizes)
        if node.target is aten.expand.default:
            return self._like(node, node.target, next(operands), sizes)
        if node.target is aten.constant_pad_nd.default:
            pads = other_pads(node, how.place)
            return self._like(node, node.target, next(operands), pads, Arguments(node).given("value"))
        given = (source.args, source.kwargs) if how.reads == EACH else (unpadded(source, how.place), {})
        args, kwargs = map_arg(given, lambda v: next(operands) if v in timed else v)
        if source is not node:
            return self._like(node, node.target, self._like(source, source.target, *args, **kwargs), node.args[1])
        return self._like(node, node.target, *args, **kwargs)

    def _insert(self, target: Target, *args: Argument) -> Node:
        return insert(self.program, self.cat, target, *args)

    def _like(self, node: Node, target: Target, *args: Argument, **kwargs: Argument) -> Node:
        new = insert(self.program, self.cat, target, *args, **kwargs)
        new.meta = {**node.meta, "val": new.meta["val"]}
        return new


def _runs(sources: list[tuple[Node, int]]) -> Iterator[list[tuple[Node, int]]]:
    """Entries of one tensor that follow each other."""
    apart = (i + 1 for i, (a, b) in enumerate(pairwise(sources)) if a[0] is not b[0] or a[1] + 1 != b[1])
    for start, end in pairwise([*([0] if sources else []), *apart, len(sources)]):
        yield sources[start:end]
