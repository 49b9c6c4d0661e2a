"""What is assumed of longer clips is looked up in one: a clip of one length does not say it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from co3d_compile.capture.operator_regions import Constants
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import NotResizable


def refuted(program: Program, again: Callable[[int, bool], Program | None]) -> frozenset[str]:
    """Returns the captured nodes of an annotated program of which a longer clip shows something else than was assumed.

    A view of 8 frames as (2, 4) may be two blocks of four, or two halves of any clip. Numbers that count frames may be
    ``arange(T)``, or ``arange(T) / T``, which are other numbers for the same frames of a longer clip.

    Args:
        program: What was assumed of it is noted.
        again: Captures the network for clips so many times as long.
    """
    views, constants = program.notes.split_views, program.notes.goes_on
    if not views and not constants:
        return frozenset()
    try:
        longer = again(2, False)
    except NotResizable as why:
        _say(program, str(why))
        return frozenset()
    there = {n.name: n for n in longer.graph.nodes} if longer is not None else {}
    wrong = {name for name, shape in views.items() if name not in there or shape_of(there[name])[1:] != shape[1:]}
    known = Constants(longer, wide=False, shapes=True) if longer is not None else None
    for name, (dims, value) in constants.items():
        found = known.value(there[name]) if known is not None and name in there else None
        if found is None or not _goes_on(value, found, dims):
            wrong.add(name)
    return frozenset(wrong) - program.refuted


def _say(program: Program, why: str) -> None:
    if program.notes.split_views:
        program.notes.warnings.append(
            f"A view splits time into blocks of frames; that they are as long in a longer clip is assumed: {why}."
        )
    usual = all(_is_usual(value, *dims) for dims, value in program.notes.goes_on.values())
    if not usual:
        program.notes.warnings.append(
            f"A constant counts the frames; that it has the same numbers for them in a longer clip is assumed: {why}."
        )


def _is_usual(value: Tensor, dim: int, *others: int) -> bool:
    """Says whether numbers count from 0 or 1 by ones, as no share of a clip does; masks are as long as they are."""
    if others:
        return True
    first, second = value.select(dim, 0), value.select(dim, 1)
    return bool(((second - first) == 1).all()) and bool(((first == 0) | (first == 1)).all())


def _goes_on(value: Tensor, longer: Tensor, dims: tuple[int, ...]) -> bool:
    """Says whether the same numbers stand in front; along other dims, of which there may be more, they are the same."""
    if longer.dim() != value.dim() or any(longer.shape[d] < value.shape[d] for d in dims):
        return False
    grown = {d % value.dim() for d in dims}
    front = longer
    for d in range(value.dim()):
        if d in grown:
            front = front.narrow(d, 0, value.shape[d])
        elif front.shape[d] != value.shape[d] and bool((front == front.narrow(d, 0, 1)).all()):
            front, value = front.narrow(d, 0, 1), value.narrow(d, 0, 1)
    return front.shape == value.shape and torch.allclose(front.double(), value.double(), rtol=1e-6, atol=1e-9)
