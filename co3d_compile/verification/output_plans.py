"""How each output is computed on the long clip, and so which entries or which clip a streamed result is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.ir.time_facts import Kind
from co3d_compile.verification.resized_arguments import SCATTERS
from co3d_compile.verification.time_claims import Claim, claim_of, is_recurrent, is_single, is_window

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
        """Frames of the first input from the clip's start to that entry."""
        return self.newest * self.claim.spacing * self.claim.rate


@dataclass(frozen=True)
class Plan:
    """How an output is computed: ``sort`` is "static", "stream", "entries" or "window"."""

    sort: str
    claim: Claim
    name: str
    reads: tuple[Read, ...] = ()

    def starts(self, seen: int, delay: int) -> list[Fraction]:
        """Where in the stream the clip starts whose result has this delay after ``seen`` frames.

        The delay is that of the newest entry read, the smallest over what is read. At several rates there may be
        more than one answer.
        """
        found = []
        for read in self.reads:
            rate = read.claim.rate
            start = (seen / rate - 1 - delay) * rate - read.frames
            newest = [(start + r.frames) / r.claim.rate for r in self.reads]
            late = [seen / r.claim.rate - 1 - n for r, n in zip(self.reads, newest, strict=True)]
            if all(n.denominator == 1 for n in newest) and min(late) == delay and start not in found:
                found.append(start)
        return found


@dataclass(frozen=True)
class Wanted:
    """A result that is to be compared: entries of a streaming output, or the clips that may give it."""

    output: int
    step: int
    entries: tuple[int, ...] = ()
    starts: tuple[Fraction, ...] = ()


def sort_of(n: Node, sorts: dict[Node, str], claims: dict[str, Claim], timed: set[str]) -> str:
    """How a node is computed on the long clip; ``timed`` are the inputs with a time dim."""
    if n.op == "placeholder":
        return "stream" if n.name in timed else "static"
    own = {sorts[a] for a in n.all_input_nodes}
    claim = claim_of(n, claims)
    if n.op != "call_function" or own <= {"static"}:
        return "static"
    if n.target is operator.getitem:
        after = is_recurrent(n.args[0]) and n.args[1] != 0  # type: ignore[arg-type]
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
    """How an output is computed."""
    sort = sorts[node]
    reads: set[Read] = set()
    stack, seen = [node] if sort == "window" else [], set()
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        source: Any = n.args[0]
        if n.target is operator.getitem and (is_recurrent(source) or source.target is aten.unbind.int):
            x = source.args[0]
            if sorts[x] == "stream":
                claim = claim_of(x, claims)
                index = claim.length - 1 if is_recurrent(source) else int(n.args[1])  # type: ignore[arg-type]
                reads.add(Read(x.name, claim, index, index))
                continue
        for a in n.all_input_nodes:
            if sorts[a] in ("stream", "entries"):
                reads.add(_read(n, a, claims))
            elif sorts[a] == "window":
                stack.append(a)
    return Plan(sort, claim_of(node, claims), node.name, tuple(reads))


def _read(n: Node, x: Node, claims: dict[str, Claim]) -> Read:
    claim = claim_of(x, claims)
    if n.target in SCATTERS and x is n.args[0]:
        left = _left(n, claim)
        return Read(x.name, claim, left[0], left[-1]) if left else Read(x.name, claim, 0, 0)
    if n.target is not aten.select.int or claim.place is None or claim_of(n, claims).kind is not Kind.STREAM:
        return Read(x.name, claim, 0, claim.length - 1)
    size = claim.place.size
    index = int(n.args[2]) % size  # type: ignore[arg-type]
    index = index if index != size - 1 else claim.length - 1
    return Read(x.name, claim, index, index)


def _left(n: Node, claim: Claim) -> list[int]:
    """The entries of a tensor that are still read when a slice of it has been written over."""
    every = list(range(claim.length))
    rank = n.meta["val"].dim()
    dim = (n.args[2] if len(n.args) > 2 else 0) % rank
    if claim.place is None or claim.place.dim != dim or claim.length != claim.place.size:
        return every
    rest: Any = n.args[3:]
    gone = every[rest[0]] if n.target is aten.select_scatter.default else every[slice(*rest[:3])]
    return [i for i in every if i not in (gone if isinstance(gone, list) else [gone])]


def wanted_at(
    output: int, plan: Plan, step: int, pulse: int, delay: int, entries: range, recurrent: bool
) -> Wanted | None:
    """Which entries of a stream, or which clip, a result is; None where nothing stands before the first frame.

    Args:
        output: Its number.
        plan: How the reference computes it.
        step: The step that gives it.
        pulse: Frames of the first input per step.
        delay: Entries by which the newest one lags behind.
        entries: Which entries, counted back from the newest one of the step.
        recurrent: Whether the reference begins with the stream.
    """
    if plan.sort == "static":
        return Wanted(output, step)
    if plan.sort == "window":
        starts = tuple(plan.starts((step + 1) * pulse, delay))
        return None if recurrent and any(s < 0 for s in starts) else Wanted(output, step, (), starts)
    newest = (step + 1) * int(pulse / plan.claim.rate) - 1 - delay
    found = tuple(newest - back for back in reversed(entries))
    return None if recurrent and found[0] < 0 else Wanted(output, step, found)
