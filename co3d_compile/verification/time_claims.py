"""What the reference takes from the compiler: where time is in each tensor, and which operators are windows.

The facts are those of the pass annotate_time, under the names of the captured graph. None of its rewriting is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from co3d_compile.contract.model_contract import LocalRegion
from co3d_compile.ir.aten_operators import RESHAPES
from co3d_compile.ir.frame_loop import FrameLoop
from co3d_compile.ir.graph_edits import erase_unused
from co3d_compile.ir.layout import TIME, Layout, LayoutLost, Place
from co3d_compile.ir.markers import blocks, chain, kept, region, unblocked
from co3d_compile.ir.node_reading import operand, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments as Given
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY, STATIC, Kind
from co3d_compile.passes import default_passes

aten = torch.ops.aten
# What stands for the value of a node on the long clip, or for one of its arguments.
Value: TypeAlias = Any
Arguments: TypeAlias = Sequence[Value]
Named: TypeAlias = Mapping[str, Value]
RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_")
MOVES = {*RESHAPES, aten.slice.Tensor}
ACCUMULATIONS = {
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
}


class NoReference(Exception):
    """The model cannot be run on a long clip. The message is the reason."""


@dataclass(frozen=True)
class Claim:
    """What the compiler says of a tensor: where time is in it, and how far its entries are apart.

    ``crop`` entries are left out in front of a clip, or ``filled`` ones are put there.
    Of one that is ``kept`` for a reader: that this reads the first entry of the stream for ever.
    """

    kind: Kind
    layout: Layout | None = None
    length: int = 1
    rate: Fraction = Fraction(1)
    spacing: int = 1
    gate: str | None = None
    crop: int = 0
    filled: int = 0
    kept: bool = False

    @property
    def place(self) -> Place | None:
        return self.layout.time if self.layout is not None else None

    @property
    def places(self) -> int:
        """How many places of a dim each entry has, side by side."""
        return self.place.inner if self.place is not None and self.place.outer == 1 else 1

    @property
    def single(self) -> bool:
        """A streaming tensor that is one entry of each clip, without a dim for time: one result per position."""
        place = self.place
        one = place is not None and place.size == 1 and self.length == 1 and not place.alone
        return one and self.kind is not Kind.START

    @property
    def one(self) -> bool:
        """A single entry of each clip, with a dim of its own for time."""
        return self.place is not None and self.place.alone and (self.place.size, self.length) == (1, 1)

    def entries(self, x: Tensor) -> int:
        """Counts the entries of a tensor."""
        place = self.place
        return x.shape[place.dim] // (place.outer * place.inner) if place is not None else 1

    def cut(self, x: Tensor, start: int, length: int) -> Tensor:
        """Cuts some entries out of a tensor."""
        place = self.place
        if place is None:
            raise NoReference("nothing is known of where time is")
        if place.alone:
            return x.narrow(place.dim, start, length)
        apart = x.unflatten(place.dim, (place.outer, -1, place.inner))
        return apart.narrow(place.dim + 1, start, length).flatten(place.dim, place.dim + 2)


NOTHING = Claim(Kind.STATIC)


def claims_of(program: Program, regions: Sequence[LocalRegion] = ()) -> dict[str, Claim]:
    """Finds what the compiler says of the nodes of a captured graph, which is not changed.

    Args:
        program: As captured.
        regions: What the file says is local in time.
    """
    copied = program.copied()
    nodes = {n.name: n for n in copied.graph.nodes}
    for part in regions:
        _call_region(copied, nodes, part)
    passes = default_passes()
    for step in passes[: passes.position("annotate_time") + 1]:
        step.run(copied)
    found = {n.name: _claim(n) for n in copied.graph.nodes}
    claims: dict[str, Claim] = {}
    gates: set[str] = set()
    for captured, name in copied.places().items():  # behind a gate comes what was left out: a dropout is no gate itself
        claims[captured] = replace(found[name], gate=None) if name in gates else found[name]
        gates |= {name} if found[name].gate is not None else set()
    for folded, captured in copied.notes.kernels.items():  # a convolution into which its batch norm is folded
        if folded in found:
            claims.setdefault(captured, found[folded])
    program.notes.split_views, program.notes.goes_on = copied.notes.split_views, copied.notes.goes_on
    program.notes.remembers = copied.notes.remembers
    _add_moves(program, claims)
    return claims | _regrouped(copied)


def _add_moves(program: Program, claims: dict[str, Claim]) -> None:
    """Adds the claims on views and slices that the passes have rewritten with what reads them.

    Time is where they put it.
    """
    for node in program.graph.nodes:
        if node.name in claims or node.target not in MOVES:
            continue
        of = claims.get(operand(node).name, NOTHING)
        if of.kind is Kind.STREAM and of.layout is not None:
            with suppress(LayoutLost):
                layout = of.layout.view(shape_of(node)) if node.target in RESHAPES else _part(of.layout, node)
                claims[node.name] = replace(of, layout=layout, length=of.length - _left_out(of.layout, layout))


def _left_out(layout: Layout, part: Layout) -> int:
    """Counts the entries of a tensor that a slice of it, or a view, has not."""
    whole, left = layout.time, part.time
    return whole.size - left.size if whole is not None and left is not None else 0


def _part(layout: Layout, node: Node) -> Layout:
    """Finds the layout of a slice, if it takes whole entries.

    Raises:
        LayoutLost: It takes parts of them.
    """
    dim, place = Given(node).dim(operand(node)), layout.time
    if place is None or place.dim != dim:
        return layout.sized(shape_of(node), [dim])
    if place.outer != 1 or shape_of(node)[dim] % place.inner:
        raise LayoutLost
    return layout.resize(TIME, shape_of(node)[dim] // place.inner)


def _regrouped(program: Program) -> dict[str, Claim]:
    """Lists the claims on operands whose entries are regrouped for one reader, by the names of both."""
    claims = {}
    for node in program.graph.nodes:
        readers = [r for r in node.users if r.target not in (blocks, unblocked)]
        if node.target in (blocks, unblocked) and readers:
            *_, x = chain(node, blocks, unblocked)
            for reader in readers:
                pairs = ((a, b) for a in program.names_of(x) for b in program.names_of(reader))
                claims.update({f"{a}>{b}": _claim(node) for a, b in pairs})
        if node.target is kept:
            pairs = ((a, b) for a in node.args[3] for reader in node.users for b in program.names_of(reader))
            claims.update({f"{a}>{b}": replace(_claim(node), kept=True) for a, b in pairs})
    return claims


def _call_region(program: Program, nodes: dict[str, Node], part: LocalRegion) -> None:
    """Puts one operator in place of what is local in time."""
    old = nodes[part.result]
    reach = part.before, part.after, part.period
    with program.graph.inserting_before(old):
        new = program.graph.call_function(region, ([nodes[n] for n in part.inputs], part.result, *reach, part.time_dim))
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    nodes[part.result] = new
    erase_unused(old)


def _claim(node: Node) -> Claim:
    fact = node.meta.get(KEY, STATIC)
    filled = max(0, fact.filled - fact.cut)
    return Claim(fact.kind, fact.layout, fact.length, fact.rate, fact.spacing, fact.own.gate, fact.crop, filled)


def claim_of(n: Node, claims: dict[str, Claim]) -> Claim:
    """Reads the claim on a node; on an operator with several outputs that on the first."""
    if n.name in claims:
        return claims[n.name]
    first = [u for u in n.users if u.target is operator.getitem and u.args[1] == 0]
    return claims.get(first[0].name, NOTHING) if first else NOTHING


def claim_for(x: Node, reader: Node, claims: dict[str, Claim]) -> Claim:
    """Reads the claim on an operand as its entries are regrouped for one reader."""
    return claims.get(f"{x.name}>{reader.name}", claim_of(x, claims))


def integer(argument: Argument) -> int:
    """Checks an argument that is a whole number, and gives it back."""
    assert isinstance(argument, int)
    return argument


def is_recurrent(n: Node) -> bool:
    """Says whether it is a recurrent layer."""
    return str(n.target).startswith(RECURRENT)


def runs_over_time(n: Node, claims: dict[str, Claim]) -> bool:
    """Says whether time is the sequence of a recurrent layer, and not among its rows."""
    x, batch_first = operand(n), n.args[8]
    place = claim_for(x, n, claims).place
    return place is not None and place.alone and place.dim == (1 if batch_first else 0)


def remembers_all(n: Node, claims: dict[str, Claim]) -> bool:
    """Says whether a streaming operator depends on all that ever came: a recurrent layer, a sum or maximum so far.

    Or on the first that came.
    """
    if any(is_kept(a, n, claims) for a in n.all_input_nodes):
        return True
    if isinstance(n.target, FrameLoop):
        return n.target.memory is None and claim_of(n, claims).kind is Kind.STREAM
    if is_recurrent(n):
        return claim_of(n, claims).kind is Kind.STREAM and runs_over_time(n, claims)
    if n.target not in ACCUMULATIONS:
        return False
    x, dim = operand(n), whole(n, 1)
    place = claim_of(x, claims).place
    return claim_of(n, claims).kind is Kind.STREAM and place is not None and dim % x.meta["val"].dim() == place.dim


def is_kept(x: Node, reader: Node, claims: dict[str, Claim]) -> bool:
    """Says whether a reader reads a first entry for ever."""
    return claims.get(f"{x.name}>{reader.name}", NOTHING).kept


def is_single(n: Node, claims: dict[str, Claim]) -> bool:
    """Says whether an operator on single entries of the stream loses the dim of time: one result per entry."""
    streams = [c for a in n.all_input_nodes if (c := claim_of(a, claims)).kind is Kind.STREAM]
    return claim_of(n, claims).single and all(c.length == 1 for c in streams)


def is_window(n: Node, claims: dict[str, Claim]) -> bool:
    """Says whether an operator on a stream gives one result per position of the clip."""
    claim = claim_of(n, claims)
    return claim.kind is Kind.WINDOW or (claim.single and claim.gate is None and not is_single(n, claims))
