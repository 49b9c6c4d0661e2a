"""The stateful primitive, and the few markers that the passes put between operators.

``history`` is the only thing that remembers. Everything else selects among entries that are there: a delay is a
history whose newest entries are cut off, a window is a history cut to the newest T entries, a continual convolution
is a convolution without temporal padding on its history. The pass ``lower`` gives the markers a body, and
``thread_states`` turns what is left of memory into explicit inputs and outputs; none of them is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node, has_side_effect

from co3d_compile.ir.index_equation import Outside
from co3d_compile.ir.node_reading import operand, whole


def history(x: Tensor, n: int) -> Tensor:
    """The last ``n`` entries of ``x`` before this step, then its new ones, on the time dim."""
    raise RuntimeError("co3d.history is a marker: the pass thread_states replaces it")


def take(x: Tensor, start: int, length: int, step: int = 1) -> Tensor:
    """Takes ``length`` entries of ``x`` on the time dim from ``start``, every ``step``-th one."""
    raise RuntimeError("co3d.take is a marker: the pass lower replaces it")


def shift(x: Tensor, p: int) -> Tensor:
    """Gives ``x`` with its entries renumbered: ``y[n] = x[n - p]``; what is left of a pad or a crop. Moves no data."""
    raise RuntimeError("co3d.shift is a marker: the pass lower replaces it")


def hold(x: Tensor, begun: bool) -> Tensor:
    """Holds ``x`` until its reader can use it: once its copies at the edge are known, and if ``begun``, no sooner than
    the first frame."""
    raise RuntimeError("co3d.hold is a marker: the pass continual replaces it")


def outside(x: Tensor, front: float | str | None, back: float | str | None, lead: int = 0, tail: int = 0) -> Tensor:
    """Gives ``x`` what its reader finds before its first entry and behind its last one (``boundary="exact"``).

    A number, ``"edge"`` for the nearest entry, or None where nothing is read. The first ``lead`` and
    the last ``tail`` entries count as outside too.
    """
    raise RuntimeError("co3d.outside is a marker: the pass lower replaces it")


def window(x: Tensor, length: int, newest: int | None = None) -> Tensor:
    """Takes the entries of ``x`` as one clip.

    From here on, time is an ordinary dim of a tensor made anew at every step.

    ``newest`` is the delay of the newest entry that it reads, once windows whose results meet are aligned.
    """
    raise RuntimeError("co3d.window is a marker: the pass lower replaces it")


def region(inputs: Sequence[Tensor], name: str, before: int, after: int, period: int, dim: int) -> Tensor:
    """Computes what a part of the clip graph, which is local in time, does: ``period`` entries at once.

    It reads ``before`` entries in front of these and ``after`` behind them. Time is dim ``dim`` of the result. The
    program has the part under its name.
    """
    raise RuntimeError("co3d.region is a marker: the pass lower replaces it")


def opening(x: Tensor, dim: int, n: int) -> Tensor:
    """Takes the first ``n`` entries of a stream.

    What is computed of them is right in the one step where they are there.
    """
    return x.narrow(dim, 0, n)


def blocks(x: Tensor, k: int) -> Tensor:
    """Makes ``k`` entries of ``x`` one: a view that splits time gives each block a row."""
    return x


def unblocked(x: Tensor) -> Tensor:
    """Makes each place in the dim of time of ``x`` an entry: rows of blocks are frames again."""
    return x


def kept(x: Tensor, dim: int, selected: bool, names: Sequence[str]) -> Tensor:
    """Keeps the first entry of a stream for ever; time is dim ``dim`` of ``x``.

    The captured ``x[:, :, 0]`` (``selected``) or ``x[:, :, :1]`` of these names reads it.
    """
    return x.select(dim, 0) if selected else x.narrow(dim, 0, 1)


def begin(x: Tensor, first: Tensor, dim: int, opened: int = 0) -> Tensor:
    """Begins a stream with the entries ``first``; those of ``x`` come behind them.

    ``opened`` is the step, from 0, in which ``first`` is right.
    """
    raise RuntimeError("co3d.begin is a marker: the pass lower replaces it")


def previous(x: Tensor, initial: float = 0.0) -> Tensor:
    """The value that ``x`` had one step ago, ``initial`` in the first one: a history of one step."""
    raise RuntimeError("co3d.previous is a marker: the pass thread_states replaces it")


def fifo(x: Tensor, n: int, initial: float = 0.0) -> Tensor:
    """A ``history`` of small entries kept in one tensor: ``x`` is (batch, entries, features), entries on dim 1.

    The ``n`` entries before the first step are all ``initial``.
    """
    raise RuntimeError("co3d.fifo is a marker: the pass thread_states replaces it")


def carry(reads: Any, shape: Any, of_ends: bool = False, initial: float = 0.0, memory: int | None = None) -> Tensor:
    """A state of a recurrent layer, (batch, *shape); ``store`` gives it its next value.

    Args:
        reads: What it is made of: for each turn of a step the entries that the turn reads.
        shape: Of one stream.
        of_ends: Whether it keeps the last entry of a stream behind its end: no entry depends on it that is within it.
        initial: Its value at the start.
        memory: Turns after which nothing is left of a value; None: it never forgets.
    """
    raise RuntimeError("co3d.carry is a marker: the pass thread_states replaces it")


def counter(like: Tensor) -> Tensor:
    """Counts the entries of the stream before this step, (batch, 1) of int64; ``store`` gives it its next value."""
    raise RuntimeError("co3d.counter is a marker: the pass thread_states replaces it")


@has_side_effect
def store(state: Tensor, value: Tensor) -> Tensor:
    """Makes ``value`` what ``state``, a carry or a counter, has in the next step.

    Nothing in the graph reads it, so it counts as impure: FX does not take it for dead code.
    """
    raise RuntimeError("co3d.store is a marker: the pass thread_states replaces it")


def expand_batch(x: Tensor, like: Tensor, x_dim: int, like_dim: int) -> Tensor:
    """Expands the dim ``x_dim`` of ``x``, of size one, to the size of ``like``'s dim ``like_dim``."""
    shape = list(x.shape)
    shape[x_dim] = like.shape[like_dim]
    return x.expand(shape)


def settled(x: Tensor, stream: Tensor, steps: int) -> Tensor:
    """Gives ``x``, which is ``stream`` from a step on.

    What it is in the first ``steps`` steps is of the start alone.
    """
    return x


MARKERS = (history, take, shift, outside, window)


@dataclass(frozen=True)
class OutsideArgs:
    """The arguments of a marker ``outside``."""

    node: Node
    x: Node
    front: Outside
    back: Outside
    lead: int
    tail: int

    @staticmethod
    def of(node: Node) -> OutsideArgs:
        x, front, back, lead, tail = node.args
        return OutsideArgs(node, x, front, back, lead, tail)  # type: ignore[arg-type]


def chain(x: Node, *markers: Any) -> list[Node]:
    """Lists a tensor, what it is a marker of, what that is a marker of, and so on: the last one is no such marker."""
    found = [x]
    while found[-1].target in markers:
        found.append(operand(found[-1]))
    return found


def undelayed(x: Node) -> tuple[Node, int]:
    """Finds the tensor that a delay, ``take(history(x, n), …)``, reads, and its ``n``.

    Any other tensor itself, and 0.
    """
    if x.target is take and operand(x).target is history:
        return operand(operand(x)), whole(operand(x), 1)
    return x, 0
