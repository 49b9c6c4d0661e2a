"""What is computed from chunks of a clip, entry by entry: the same entry of two chunks has one number.

A chunk that begins with the last frames of the one before it, a cache of them, a convolution on both: all of these
are operators on a few entries. Which of them come from which chunk is forgotten here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch.fx import Node
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from co3d_compile.capture.chunks.places import SPLIT, NoChunks, Place, reads_of, selected, source_of
from co3d_compile.capture.loops.tokens import Tokens, filling_of, is_constant
from co3d_compile.ir.aten_operators import RESHAPES, SAME, sliced
from co3d_compile.ir.index_equation import EDGE, Outside, Reads
from co3d_compile.ir.node_reading import drawn_by_chance, operand, rank_of, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments, filling_like

aten = torch.ops.aten
EACH = Reads()  # each entry is computed from the one of the same number
MOST = 200_000  # entries of all chunks


@dataclass(frozen=True)
class Filling:
    """An entry that is one number all over."""

    value: float
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Given:
    """An entry of a tensor that chunks are cut from."""

    root: Node
    index: int


@dataclass(frozen=True)
class Computed:
    """An entry that an operator computes.

    Args:
        does: The same for all operators that do the same to whatever they are given.
        reads: The numbers of the entries that it reads, for each operand that has entries.
        way: In which of its ways the operator computes it (:meth:`Reads.way`).
    """

    does: Hashable
    reads: tuple[tuple[int, ...], ...]
    way: int


Entry = Filling | Given | Computed


@dataclass(frozen=True)
class Doing:
    """How operators that do the same are written: one of them, its place, those of the operands, and what it reads."""

    node: Node
    place: Place
    operands: tuple[Node, ...]
    places: tuple[Place, ...]
    reads: Reads


class Entries:
    """The entries of tensors, by number. An entry has a greater number than those that it is computed from.

    Args:
        tokens: Of the graph.
        places: Of all tensors that are looked at.
        roots: The tensors that chunks are cut from.

    Attributes:
        all: The entries.
        place: Where each is in its tensor.
        how: How operators are written, by what they do.
        of: The entries of each tensor.
        operators: How many compute entries, and do not only choose among them.
    """

    def __init__(self, tokens: Tokens, places: Mapping[Node, Place], roots: set[Node]) -> None:
        self.tokens, self.places, self.roots = tokens, places, roots
        self.all: list[Entry] = []
        self.place: list[Place] = []
        self.how: dict[Hashable, Doing] = {}
        self.of: dict[Node, list[int]] = {}
        self.operators = 0
        self._known: dict[tuple[Entry, Place], int] = {}
        self._numbers: dict[Node, int] = {}
        self._made: dict[Hashable, int] = {}
        for node in [n for n in tokens.program.graph.nodes if n in places]:
            self.of[node] = [self._number(e, places[node]) for e in self._entries(node)]
            if len(self.all) > MOST:
                raise NoChunks("too many entries")

    def covered_by(self, node: Node) -> bool:
        """Says whether a tensor has no entry twice and is computed from all entries of what pieces are cut from."""
        found, stack = set[int](), list(self.of[node])
        if len(set(stack)) < len(stack):
            return False
        while stack:
            number = stack.pop()
            if number not in found:
                found.add(number)
                entry = self.all[number]
                stack += [e for read in entry.reads for e in read] if isinstance(entry, Computed) else []
        return all(found.issuperset(self.of[root]) for root in self.roots)

    def _number(self, entry: Entry | int, place: Place) -> int:
        if isinstance(entry, int):
            return entry
        known = self._known.setdefault((entry, place), len(self.all))
        if known == len(self.all):
            self.all.append(entry)
            self.place.append(place)
        return known

    def _entries(self, node: Node) -> Iterator[Entry | int]:
        """The entries of a tensor: those of its operand, where it only chooses among them."""
        place, count = self.places[node], self.places[node].entries(shape_of(node))
        if node in self.roots:
            yield from (Given(node, i) for i in range(count))
        elif (number := filling_like(node)) is not None:
            yield from [self._filling(node, float(number))] * count
        elif (chosen := self._chosen(node, place)) is not None:
            if len(chosen) != count:
                raise NoChunks
            yield from chosen
        elif node.target is aten.constant_pad_nd.default:
            yield from self._padded(node, count)
        else:
            yield from self._computed(node, count)

    def _filling(self, node: Node, value: float) -> Filling:
        return Filling(value, tuple(self.places[node].sized(shape_of(node), 1)), node.meta["val"].dtype)

    def _chosen(self, node: Node, place: Place) -> list[int] | None:
        """The entries that an operator takes from its operands as they are; None if it is no such operator."""
        if node.target in SAME:
            return self.of[operand(node)]
        if node.target is aten.expand.default and place.alone:
            x, count = operand(node), shape_of(node)[place.dim]
            copied = place.sized(shape_of(x), count) == list(shape_of(node))
            return self.of[x] * (count // len(self.of[x])) if copied else None
        if node.target is aten.cat.default and place.alone and Arguments(node).dim(node) == place.dim:
            return [e for x in Arguments(node).tensors("tensors") for e in self._joined(x, place)]
        if node.target is aten.slice.Tensor and sliced(node)[1] == place.dim:
            x, _, start, end, step = sliced(node)
            return self.of[x][start:end:step] if place.alone else _refuse()
        if source_of(node).target is SPLIT:
            return self._item(node, place)
        if (one := selected(node, place)) is not None:
            return [self.of[one[0]][one[1]]]
        return None

    def _joined(self, x: Node, place: Place) -> list[int]:
        """The entries of a part of what is joined; without frames in it, it must be one number all over."""
        if x in self.of:
            return self.of[x]
        value = filling_of(x, self.tokens.program)
        if value is None:
            return _refuse()
        filling = Filling(value, tuple(place.sized(shape_of(x), 1)), x.meta["val"].dtype)
        return [self._number(filling, place)] * place.entries(shape_of(x))

    def _item(self, node: Node, place: Place) -> list[int] | None:
        split, index = operand(node), whole(node, 1)
        x = operand(split)
        if Arguments(split).dim(x) != place.dim:
            return None
        if not place.alone:
            return _refuse()
        sizes = [int(part.shape[place.dim]) for part in split.meta["val"]]
        return self.of[x][sum(sizes[:index]) : sum(sizes[: index + 1])]

    def _padded(self, node: Node, count: int) -> Iterator[Entry | int]:
        """Yields the entries of a pad: a number in front and behind, and in between what it makes of each."""
        place, (x,) = self.places[node], self._timed(node)
        front, back = _time_pads(node, place)
        read = self.of[x]
        if front + len(read) + back != count:
            _refuse()
        self.operators += 1
        does, value = self._does(node), Arguments(node).given("value")
        filling = self._filling(node, float(value) if isinstance(value, (int, float)) else 0.0)
        yield from [filling] * front
        if any(other_pads(node, place)):
            yield from (filling if self._is_filled(e, filling) else Computed(does, ((e,),), 0) for e in read)
        else:
            yield from read
        yield from [filling] * back

    def _computed(self, node: Node, count: int) -> Iterator[Entry]:
        """Yields the entries of an operator that computes each from one of each operand, or from several of one."""
        timed = self._timed(node)
        reads, outside = reads_of(node, self.places)
        if reads == Reads(reads.up) and any(len(self.of[x]) * reads.up != count for x in timed):
            _refuse()
        self.operators += 1
        does = self._does(node, reads)
        for o in range(count):
            window = reads.of(o)
            yield Computed(does, tuple(tuple(self._read(x, i, outside) for i in window) for x in timed), reads.way(o))

    def _read(self, x: Node, i: int, outside: tuple[Outside, Outside]) -> int:
        """The entry that an operator reads at a place of an operand, which may be outside of it."""
        entries = self.of[x]
        if 0 <= i < len(entries):
            return entries[i]
        value = outside[i > 0]
        if value == EDGE:
            return entries[-1 if i > 0 else 0]
        return self._number(self._filling(x, value), self.places[x]) if isinstance(value, float) else _refuse()

    def _is_filled(self, number: int, filling: Filling) -> bool:
        entry = self.all[number]
        return isinstance(entry, Filling) and entry.value == filling.value

    def _timed(self, node: Node) -> list[Node]:
        """Lists the operands with entries, each as often as it is read."""
        source = source_of(node)
        found = [x for x in pytree.tree_leaves((source.args, source.kwargs)) if isinstance(x, Node) and x in self.of]
        if not found:
            raise NoChunks("it depends on no frames")
        return found

    def _does(self, node: Node, reads: Reads = EACH) -> Hashable:
        """Describes what an operator does, whatever its number of entries: literals, constants, shapes of one entry."""
        place, timed = self.places[node], self._timed(node)
        sizes = tuple(tuple(self.places[x].sized(shape_of(x), 1)) for x in timed)
        target = aten.reshape.default if node.target in RESHAPES else node.target
        key = (
            target, place, tuple(place.sized(shape_of(node), 1)) if node.target not in RESHAPES else None,
            _dtype(node), tuple(self.places[x] for x in timed), sizes, *self._literals(node, reads),
        )  # fmt: skip
        unpadded = replace(reads, pad=0)
        self.how.setdefault(key, Doing(node, place, tuple(timed), tuple(self.places[x] for x in timed), unpadded))
        return key

    def _literals(self, node: Node, reads: Reads) -> Iterator[Hashable]:
        """Describes what an operator is given beside entries."""
        place = self.places[node]
        if node.target in RESHAPES:
            yield reads.up, tuple(place.sized(shape_of(node), reads.up))
            return
        if node.target is aten.expand.default:
            return
        if node.target is aten.constant_pad_nd.default:
            yield tuple(other_pads(node, place)), Arguments(node).number("value")
            return
        source = source_of(node)
        if source is not node:
            yield source.target, node.args[1]
        given = (source.args, source.kwargs) if reads == EACH else unpadded(source, place)
        for value in pytree.tree_leaves(given):
            yield "entries" if isinstance(value, Node) and value in self.of else self._literal(value)

    def _literal(self, value: object) -> Hashable:
        """What stands for a literal or a constant: the same for all that is computed alike from parameters."""
        if not isinstance(value, Node):
            return type(value), str(value)
        if value.op != "call_function" or is_constant(value) or drawn_by_chance([value]):
            return self.tokens.constant(value)
        if value not in self._numbers:
            leaves = pytree.tree_leaves((value.args, value.kwargs))
            key = (value.target, *(self._literal(v) for v in leaves))
            self._numbers[value] = self._made.setdefault(key, len(self._made))
        return "made", self._numbers[value]


def _refuse() -> NoReturn:
    """Raises NoChunks: a tensor has entries that are computed in a way that is not followed."""
    raise NoChunks("entries are mixed")


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta["val"], "dtype", None)


def unpadded(node: Node, place: Place) -> list[Argument]:
    """Writes the arguments of an operator that slides over entries, which it is given with what lies outside of them.

    What it slides over are the last dims of its operand.
    """
    given = Arguments(node).all()
    dims = max((len(v) for v in given.values() if isinstance(v, (list, tuple))), default=0)
    axis = place.dim - rank_of(node) + dims
    for name in {"padding", "output_padding"} & given.keys():
        pads = Arguments(node).integers(name, dims)
        pads[axis if axis >= 0 else dims] = 0
        given[name] = pads
    return list(given.values())


def _time_pads(node: Node, place: Place) -> tuple[int, int]:
    """Reads what a pad puts in front of the entries, and behind them."""
    pads = Arguments(node).integers("pad")
    at = 2 * (rank_of(node) - 1 - place.dim)
    found = (pads[at], pads[at + 1]) if at < len(pads) else (0, 0)
    if (any(found) and not place.alone) or min(pads, default=0) < 0:
        _refuse()
    return found


def other_pads(node: Node, place: Place) -> list[int]:
    """Reads what a pad puts at the ends of other dims than that of the entries."""
    pads = list(Arguments(node).integers("pad"))
    at = 2 * (rank_of(node) - 1 - place.dim)
    if at < len(pads):
        pads[at : at + 2] = [0, 0]
    return pads
