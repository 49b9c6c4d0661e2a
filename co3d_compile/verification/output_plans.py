"""How each output is computed on the long clip, and so which entries or which clip a streamed result is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch.fx import Node

from co3d_compile.ir.time_facts import Kind
from co3d_compile.verification.resized_arguments import SCATTERS
from co3d_compile.verification.time_claims import (
    Claim,
    claim_for,
    claim_of,
    integer,
    is_kept,
    is_recurrent,
    is_single,
    is_window,
    runs_over_time,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """A streaming tensor that a window reads, and the oldest and newest of the clip's entries that it reads there."""

    name: str
    claim: Claim
    oldest: int
    newest: int

    @property
    def frames(self) -> Fraction:
        """Frames of the first input from the clip's start to that entry; what was put there and left out has none."""
        return (self.newest - min(self.claim.filled, self.oldest)) * self.claim.spacing * self.claim.rate


@dataclass(frozen=True)
class Plan:
    """How an output is computed: ``sort`` is "static", "stream", "entries" or "window"."""

    sort: str
    claim: Claim
    name: str
    reads: tuple[Read, ...] = ()

    @property
    def streams(self) -> bool:
        """Says whether the long clip has the output's entries one by one."""
        return self.sort in ("stream", "entries")

    @property
    def first_for_ever(self) -> bool:
        """Says whether it is what the first frame of a stream says for ever, an entry like the other."""
        return self.sort == "static" and self.claim.kind is Kind.STREAM

    def timed(self, has_time: bool) -> bool:
        """Says whether a streaming output has entries. A list of single frames has none, and may have time."""
        return has_time and not self.claim.single

    def late(self, delay: int, has_time: bool) -> int:
        """Counts the entries of the reference's tensor by which an output is late, from what the file says.

        An output without time is as late as the entry that it was cut from: entry 0 of ``x[:, :, 12:]`` is frame 12.
        """
        if not self.streams:
            return delay
        return delay // self.claim.places if self.timed(has_time) else delay + self.claim.crop

    def starts(self, seen: int, delay: int) -> list[Fraction]:
        """Finds where in the stream the clip starts whose result has this delay after ``seen`` frames.

        The delay is that of the newest entry read, or of what this one was sliced from, the smallest over what is
        read. At several rates there may be more than one answer.
        """
        found = []
        for read in self.reads:
            rate = read.claim.rate
            start = (seen / rate - 1 - delay - read.claim.crop) * rate - read.frames
            newest = [(start + r.frames) / r.claim.rate for r in self.reads]
            delays = [seen / r.claim.rate - 1 - n - r.claim.crop for r, n in zip(self.reads, newest, strict=True)]
            if all(n.denominator == 1 for n in newest) and min(delays) == delay and start not in found:
                found.append(start)
        return found


@dataclass(frozen=True)
class ResultIndex:
    """What one result of a step is: entries of a streaming output, or the result of a clip with one of these starts.

    Of what the first frame of the stream says for ever it is so many entries that are the same (``kept``).
    """

    output: int
    step: int
    entries: tuple[int, ...] = ()
    starts: tuple[Fraction, ...] = ()
    kept: int = 1


def sort_of(n: Node, sorts: dict[Node, str], claims: dict[str, Claim], timed: set[str]) -> str:
    """Says how a node is computed on the long clip; ``timed`` are the inputs with a time dim."""
    if n.op == "placeholder":
        return "stream" if n.name in timed else "static"
    own = {"static" if is_kept(a, n, claims) else sorts[a] for a in n.all_input_nodes}
    claim = claim_of(n, claims)
    constant = n.name in claims and claim.kind is Kind.STATIC  # it hangs on the clip's shape alone
    if n.op != "call_function" or own <= {"static"} or claim.kind is Kind.START or constant:
        return "static"
    if n.target is operator.getitem:
        source, item = n.args
        after = isinstance(source, Node) and is_recurrent(source) and runs_over_time(source, claims) and item != 0
        return "window" if after else own.pop()
    if "window" in own or claim.kind is Kind.WINDOW:
        return "window"
    alone = claim.place is not None and claim.place.alone
    if "entries" in own:
        return "stream" if ("stream" in own and alone) or claim.one else "entries"
    if claim.gate is not None or is_single(n, claims):
        return "stream" if alone else "entries"
    return "window" if is_window(n, claims) else "stream"


def plan_of(node: Node, sorts: dict[Node, str], claims: dict[str, Claim]) -> Plan:
    """Plans how an output is computed."""
    reads: set[Read] = set()
    stack, seen = [node] if sorts[node] == "window" else [], set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        single = _single_read(n, sorts, claims)
        if single is not None:
            reads.add(single)
            continue
        reads |= {_read(n, a, claims) for a in n.all_input_nodes if sorts[a] in ("stream", "entries")}
        stack += [a for a in n.all_input_nodes if sorts[a] == "window"]
    return Plan(sorts[node], claim_of(node, claims), node.name, tuple(reads))


def _single_read(n: Node, sorts: dict[Node, str], claims: dict[str, Claim]) -> Read | None:
    """Finds the one entry that the last state of a recurrent layer reads of a stream."""
    source = n.args[0]
    if n.target is not operator.getitem or not isinstance(source, Node) or not is_recurrent(source):
        return None
    x = source.args[0]
    if not isinstance(x, Node) or sorts[x] != "stream":
        return None
    claim = claim_for(x, source, claims)
    return Read(x.name, claim, claim.length - 1, claim.length - 1)


def _read(n: Node, x: Node, claims: dict[str, Claim]) -> Read:
    """Finds what an operator of a window reads of a stream."""
    claim = claim_for(x, n, claims)
    if n.target in SCATTERS and x is n.args[0]:
        left = _not_written(n, claim) or [0]
        return Read(x.name, claim, left[0], left[-1])
    if n.target is not aten.select.int or claim.place is None or claim_of(n, claims).kind is not Kind.STREAM:
        return Read(x.name, claim, 0, claim.length - 1)
    index, newest = integer(n.args[2]) % claim.place.size, claim.place.size - 1
    index = index if index != newest else claim.length - 1
    return Read(x.name, claim, index, index)


def _not_written(n: Node, claim: Claim) -> list[int]:
    """Finds the entries of a tensor that are still read when a slice of it has been written over."""
    every = list(range(claim.length))
    dim, *rest = n.args[2:] or (0,)
    if claim.place is None or claim.place.dim != integer(dim) % n.meta["val"].dim() or claim.length != claim.place.size:
        return every
    indices = [integer(i) if i is not None else None for i in rest[:3]]
    written = every[slice(*indices)] if n.target is not aten.select_scatter.default else [every[indices[0] or 0]]
    return [i for i in every if i not in written]
