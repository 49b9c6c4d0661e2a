"""Where time is in what chunks of a clip are computed from: asked backwards, from the join of the chunks' results."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import torch
from torch.fx import Node

from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.capture.loops.tokens import frame_of
from co3d_compile.ir.aten_operators import BATCH_NORMS, EXACT_OVERLOADS, RESHAPES, SAME
from co3d_compile.ir.index_equation import Outside, Reads
from co3d_compile.ir.layout import PLAIN, TIME, Axis, Layout, LayoutLost
from co3d_compile.ir.node_reading import norm_dims, operand, rank_of, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments, order_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import Fact, Kind, NoExtension, facts_as
from co3d_compile.rules import is_pointwise, rule_for
from co3d_compile.rules.failures import noting

aten = torch.ops.aten
SPLIT = aten.split_with_sizes.default
CUTTING = {aten.slice.Tensor, aten.select.int, SPLIT}
SAME_PLACE = {*SAME, aten.slice.Tensor, aten.constant_pad_nd.default, aten.cat.default}
Shape = tuple[int, ...]
NOTHING = (None, None)  # lies outside of what is read, as far as anybody knows


class NoChunks(Exception):
    """What is joined is not computed entry by entry from chunks of a clip."""


@dataclass(frozen=True)
class Place:
    """Where the entries of a tensor are.

    Args:
        dim: Their dim.
        outer: What lies in that dim before them: a batch that they follow.
        inner: What lies in that dim behind them: heads, of which each entry has some.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def alone(self) -> bool:
        """Whether nothing else lies in the dim."""
        return self.outer == self.inner == 1

    def entries(self, shape: tuple[int, ...]) -> int:
        """Says how many entries a tensor of a shape has."""
        return shape[self.dim] // (self.outer * self.inner)

    def sized(self, shape: tuple[int, ...], entries: int) -> list[int]:
        """The shape with another number of entries."""
        return [*shape[: self.dim], self.outer * entries * self.inner, *shape[self.dim + 1 :]]


def places_of(cat: Node, times: TimeDims, cut: set[Node], nearest: bool) -> tuple[dict[Node, Place], set[Node]]:
    """Finds the place of entries in all that a join of pieces is computed from, and what pieces are cut from.

    Args:
        cat: The join.
        times: Of the graph.
        cut: What depends on parts of tensors.
        nearest: Whether the first tensor behind the join that is cut is a whole, whatever it is computed from.

    Raises:
        NoChunks: Some of it mixes entries in a way that is not known, or has them in two places.
    """
    found = {cat: Place(Arguments(cat).dim(cat))}
    roots: set[Node] = set()
    node, left = cat, {cat}
    while left:
        if node in left:
            left.remove(node)
            if node in roots or node not in cut:
                if not found[node].alone or not times.has_entries(node, found[node].dim, otherwise=nearest):
                    _refuse(node, found[node])
                roots.add(node)
            else:
                operands = dict(_operands(node, found[node], times))
                if any(found.setdefault(x, place) != place for x, place in operands.items()):
                    _refuse(node, found[node])
                left |= operands.keys()
                if nearest and _cuts(node, found[node]):
                    roots |= operands.keys()
        node = node.prev
    return found, roots


def cut_nodes(times: TimeDims) -> set[Node]:
    """Finds the nodes that depend on parts of tensors."""
    found: set[Node] = set()
    for node in times.program.graph.nodes:
        if node in times.timed and (node.target in CUTTING or any(x in found for x in node.all_input_nodes)):
            found.add(node)
    return found


def _cuts(node: Node, place: Place) -> bool:
    """Says whether a node is some entries of another tensor."""
    source = source_of(node)
    if source.target in (aten.slice.Tensor, SPLIT):
        return Arguments(source).dim(operand(source)) == place.dim
    found = selected(node, place)
    return found is not None and shape_of(found[0])[place.dim] > 1


def _operands(node: Node, place: Place, times: TimeDims) -> Iterator[tuple[Node, Place]]:
    """Lists the operands that have entries, and their places."""
    moved = _move_of(node, times.program)
    for x in dict.fromkeys(read_by(node)):
        if x not in times.timed:
            continue
        if (found := selected(node, place)) is not None:
            x, to = found[0], place
        elif isinstance(x.meta["val"], torch.Tensor):
            to = moved(x, place)
        else:  # several tensors: of a recurrent layer, of a loop
            _refuse(node, place)
        shape = shape_of(x)
        if not 0 <= to.dim < len(shape) or shape[to.dim] % (to.outer * to.inner):
            _refuse(node, place)
        yield x, to


def selected(node: Node, place: Place) -> tuple[Node, int] | None:
    """Finds of which tensor a node is one entry that has its dim back, and which one; None for anything else."""
    if node.target is not aten.unsqueeze.default or not place.alone or Arguments(node).dim(node) != place.dim:
        return None
    x = operand(node)
    take = frame_of(x)
    if take is not None and take.length is None:
        return (take.root, take.start) if take.dim == place.dim else None
    if x.target in (aten.squeeze.dim, aten.squeeze.dims) and norm_dims(x.args[1], rank_of(x) + 1) == [place.dim]:
        return operand(x), 0
    return None


def read_by(node: Node) -> list[Node]:
    """The operands of which an operator reads more than the shape and the kind of numbers."""
    return [] if node.target is aten.full_like.default else source_of(node).all_input_nodes


def source_of(node: Node) -> Node:
    """The operator that computes a node: of which it is one of several results, or itself."""
    return operand(node) if node.target is operator.getitem else node


def _move_of(node: Node, program: Program) -> Callable[[Node, Place], Place]:
    """Says how the place of a result becomes that of an operand."""
    if node.target in MOVES:
        return lambda x, place: MOVES[node.target](node, x, place)
    if node.target in SAME_PLACE or source_of(node).target is SPLIT:
        return lambda x, place: place
    if source_of(node).target in BATCH_NORMS:
        return lambda x, place: place if place.dim != 1 else _refuse(node, place)
    if node.target in EXACT_OVERLOADS:
        return lambda x, place: place if place.dim < 2 else _refuse(node, place)
    if is_pointwise(node.target) or node.target is aten.expand.default:
        return lambda x, place: _aligned(node, x, place)
    return lambda x, place: _by_rule(program, node, x, place)


def _refuse(node: Node, place: Place) -> Place:
    """Raises NoChunks: nothing is known of the entries of a tensor at this place."""
    raise NoChunks(f"{node} has no entries in dim {place.dim}")


def _aligned(node: Node, x: Node, place: Place) -> Place:
    moved = replace(place, dim=place.dim - rank_of(node) + rank_of(x))
    one = node.target is aten.expand.default and place.alone  # the only entry, as often as there are entries
    if moved.dim < 0 or shape_of(x)[moved.dim] not in {shape_of(node)[place.dim], *([1] if one else [])}:
        _refuse(node, place)
    return moved


def _select(node: Node, x: Node, place: Place) -> Place:
    return replace(place, dim=place.dim + (Arguments(node).dim(x) <= place.dim))


def _unsqueeze(node: Node, x: Node, place: Place) -> Place:
    new = Arguments(node).dim(node)
    if new == place.dim:
        _refuse(node, place)
    return replace(place, dim=place.dim - (new < place.dim))


def _squeeze(node: Node, x: Node, place: Place) -> Place:
    gone = [d for d in norm_dims(node.args[1], rank_of(x)) if shape_of(x)[d] == 1]
    return replace(place, dim=[d for d in range(rank_of(x)) if d not in gone][place.dim])


def _reordered(node: Node, x: Node, place: Place) -> Place:
    order = order_of(node)
    assert order is not None
    return replace(place, dim=order[place.dim])


def _view(node: Node, x: Node, place: Place) -> Place:
    """Finds the place behind a view; of a chunk of one frame several dims may be that of time.

    A dim of its own is taken before one that is shared, what lies before the entries before what lies behind them; the
    first one (the batch) last, and blocks of entries before entries.
    """
    found = sorted(_views(shape_of(node), shape_of(x), place))
    if not found:
        return _refuse(node, place)
    *_, back, outer, inner = found[0]
    return Place(-back, outer, inner)


def _views(
    new: tuple[int, ...], old: tuple[int, ...], place: Place
) -> Iterator[tuple[bool, bool, bool, int, int, int, int]]:
    count = place.entries(new)
    before, behind = prod(new[: place.dim]) * place.outer, prod(new[place.dim + 1 :]) * place.inner
    for dim, size in enumerate(old):
        outer, rest = divmod(before, prod(old[:dim]))
        if rest or not outer or size % outer:
            continue
        inside = size // outer
        if inside and count % inside == 0 and prod(old[dim + 1 :]) == behind * (count // inside):
            yield False, outer > 1, dim == 0, inside, -dim, outer, 1
        elif inside and inside % count == 0 and prod(old[dim + 1 :]) * (inside // count) == behind:
            yield True, outer > 1, dim == 0, count, -dim, outer, inside // count


def _by_rule(program: Program, node: Node, x: Node, place: Place) -> Place:
    """Finds the place in an operand that becomes the result's place by the operator's rule."""
    source = source_of(node)
    rule = rule_for(source.target)
    if rule is None or (source is not node and len(source.all_input_nodes) > 1):  # first states have sizes of their own
        return _refuse(node, place)
    for dim in [place.dim, *range(rank_of(x))]:
        alone = dim == place.dim and place.alone  # it may be another number of entries there
        if dim >= rank_of(x) or not (alone or shape_of(x)[dim] == shape_of(node)[place.dim]):
            continue
        to = replace(place, dim=dim)
        alike = [y for y in source.all_input_nodes if y is x or _may_be(y, x, to)]
        facts = {y: Fact(Kind.STREAM, _layout(y, to)) for y in alike}
        with facts_as(facts), noting(program, node), suppress(LayoutLost, NoExtension):
            mixed = any(y is x and dim in {d % rank_of(x) for d in dims} for y, dims in rule.mixes(source))
            layout = rule.layout(node) if source is node else rule.layouts(source)[whole(node, 1)]
            if not mixed and layout == _layout(node, place):
                return to
    return _refuse(node, place)


def reads_of(node: Node, places: Mapping[Node, Place]) -> tuple[Reads, tuple[Outside, Outside]]:
    """Says which entries of its operand one is computed from by the operator's rule, and what it reads outside."""
    source = source_of(node)
    if node.target in RESHAPES:
        return Reads(places[node].entries(shape_of(node)) // places[x := operand(node)].entries(shape_of(x))), NOTHING
    rule = rule_for(source.target)
    facts = {y: Fact(Kind.STREAM, _layout(y, places[y])) for y in source.all_input_nodes if y in places}
    with facts_as(facts):
        try:
            reads = rule.reads(source) if rule is not None else Reads()
            return reads, rule.outside(source) if rule is not None and reads != Reads() else NOTHING
        except NoExtension as why:
            raise NoChunks(str(why)) from why


def _may_be(y: Node, x: Node, place: Place) -> bool:
    """Says whether another operand may have its entries in the same place."""
    sizes = shape_of(y)[place.dim : place.dim + 1]
    return y.op == "call_function" and sizes == shape_of(x)[place.dim : place.dim + 1]


def _layout(x: Node, place: Place) -> Layout:
    layout = Layout.plain(shape_of(x))
    axes = Axis(PLAIN, place.outer), Axis(TIME, place.entries(shape_of(x))), Axis(PLAIN, place.inner)
    return layout.replace(place.dim, axes)


MOVES: dict[object, Callable[[Node, Node, Place], Place]] = {
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.permute.default: _reordered,
    aten.transpose.int: _reordered,
    **dict.fromkeys(RESHAPES, _view),
}
