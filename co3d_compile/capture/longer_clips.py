"""What is assumed of longer clips is looked up in one: a clip of one length does not say it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import gcd

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.capture.far_places import FarPlaces, TimeDims
from co3d_compile.capture.written_out.regions import Constants
from co3d_compile.contract.model_contract import FIXED_LENGTH
from co3d_compile.errors import UsageError
from co3d_compile.ir.aten_operators import SAME, part_taken
from co3d_compile.ir.constant_facts import band, progression
from co3d_compile.ir.found_parts import StreamedCrop
from co3d_compile.ir.frame_loop import is_loop, loop_of
from co3d_compile.ir.graph_walks import reached
from co3d_compile.ir.node_reading import operand, operands, shape_of, where, whole
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import NotResizable

aten = torch.ops.aten
AS_FAR = "counts and loops go on as in a clip up to frame {}; from there on that is assumed"
NOT_FAR = "that counts and loops go on as in a clip is assumed: the network could not be run on longer ones"
MOST = 3  # times as long as the clip: the network is run on it


def note_loop_starts(program: Program) -> None:
    """Notes the numbers that loops over frames start from, and never forget, which may be others for a longer clip."""
    known = Constants(program)
    for node in [n for n in program.graph.nodes if is_loop(n) and loop_of(n).memory is None]:
        _, starts, _ = loop_of(node).parts([n for n in node.args if isinstance(n, Node)])
        own = [n for n in starts if program.learned.isdisjoint(str(x.target) for x in reached([n], operands))]
        values = [value for n in own if (value := known.value(n)) is not None and bool(value.any())]
        if values:
            program.notes.loop_starts[node.name] = tuple(values)


def refuted(
    program: Program, again: Callable[[int, bool], Program | None], far: Callable[[TimeDims], FarPlaces | None]
) -> frozenset[str]:
    """Finds the captured nodes of an annotated program of which a longer clip shows something else than was assumed.

    A view of 8 frames as (2, 4) may be two blocks of four, or two halves of any clip. Numbers that count frames may be
    ``arange(T)``, or ``arange(T) / T``, which are other numbers for the same frames of a longer clip. So may be what a
    loop starts from. What goes on in a clip twice as long may end far out, and what remembers all frames may change.

    Args:
        program: What was assumed of it is noted.
        again: Captures the network for clips so many times as long.
        far: Looks at what the network does far out, by the time dims of its inputs.

    Raises:
        UsageError: ``window`` has no meaning for a slice or selection of frames.
    """
    views, constants, crops = program.notes.split_views, program.notes.goes_on, program.notes.crops
    starts, remembers = program.notes.loop_starts, program.notes.remembers
    places = far(tuple(i.time_dim for i in program.inputs)) if constants or remembers else None
    if constants or program.notes.loops:
        program.notes.far_out = AS_FAR.format(f"{places.frames:,}") if places is not None else NOT_FAR
    if places is not None:
        changed = {name for name, (_, value) in constants.items() if not places.lasts(value)}
        changed |= set() if places.unchanged else remembers & set(program.notes.captured)
        if changed - program.refuted:
            return frozenset(changed) - program.refuted
    if not (views or constants or crops or starts):
        return frozenset()
    if inside := frozenset(name for name, (dims, _) in constants.items() if not dims) - program.refuted:
        return inside  # of a window, of which they are places
    try:
        longer = again(2, False)
    except NotResizable as why:
        _say(program, str(why))
        return frozenset()
    there = {n.name: n for n in longer.graph.nodes} if longer is not None else {}
    for name, crop in crops.items():
        _check_crop(program, there.get(name), crop)
    wrong = {name for name, shape in views.items() if name not in there or shape_of(there[name])[1:] != shape[1:]}
    known = Constants(longer, wide=False, shapes=True) if longer is not None else None
    for name, (dims, value) in constants.items():
        found = known.value(there[name]) if known is not None and name in there else None
        if found is None or not _goes_on(value, found, dims):
            wrong.add(name)
    others = longer.notes.loop_starts if longer is not None else {}
    wrong |= {name for name, values in starts.items() if not _alike(values, others.get(name, ()))}
    return frozenset(wrong) - program.refuted


def _alike(starts: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Says whether a loop starts from the same numbers."""
    return len(starts) == len(others) and all(map(torch.equal, starts, others))


def _check_crop(program: Program, node: Node | None, crop: tuple[int, int, int]) -> None:
    """Checks that a slice leaves out as many entries at either end of a longer clip, as it does of a window.

    What it begins with is counted from the front, and so is a selection, unless it is the last entry.

    Raises:
        UsageError: It does not.
    """
    part = part_taken(node) if node is not None else None
    if node is None or part is None:
        return
    x, dim, start, end = part
    more = shape_of(x)[dim] - crop[2]
    selected = node.target is aten.select.int
    moved = start - crop[0], end - crop[1]
    usual = [(0, 0), (more, more)] if selected and crop[1] == crop[2] else [(0, 0)] if selected else [(0, more)]
    if more > 0 and moved not in usual:
        raise UsageError(
            f"window={program.options.window} has no meaning for frames that are taken by their number.",
            **where(node),
            hint="Compile for a clip of that length instead.",
        )


def fix_length(program: Program, again: Callable[[int, bool], Program | None]) -> None:
    """Lets streams with exact ends be as long as the clip alone, where a slice leaves out other entries of longer ones.

    ``x[:, :, -2:]`` begins where only the end of a stream tells, and ``x[:, :, :4]`` ends before the stream does.
    """
    crops = program.notes.streamed_crops
    if not crops:
        return
    spec, multiple = program.inputs[0], program.step.length_multiple
    factor = multiple // gcd(int(spec.shape[spec.time_dim or 0]), multiple)  # a stream may have so many clips more
    moved, asked = list(crops), False
    try:
        for times in (1 + factor, 1 + 2 * factor):  # behind strides, clips of even and of odd lengths may differ
            if moved:
                there = _longer(program, again, times)
                moved, asked = [n for n in moved if _counts_otherwise(there.get(n), crops[n])], True
    except NotResizable as why:
        moved = moved if asked else [name for name in moved if crops[name].from_end]
        if not asked and not moved and any(crop.from_end is None for crop in crops.values()):
            said = "That slices over time leave out as many entries at the ends of a longer clip is assumed"
            program.notes.warnings.append(f"{said}: {why}.")
    if moved:
        program.step.length_multiple = FIXED_LENGTH
        program.notes.warnings.append(
            f"Ends are exact in streams as long as the clip alone: {crops[moved[0]].where} takes frames by their "
            "number, or counts them from the end, which no stream knows before it ends. Leave that out of the network "
            "and take these entries of its results; the last one alone streams as x[:, :, -1]."
        )


def _longer(program: Program, again: Callable[[int, bool], Program | None], times: int) -> dict[str, Node]:
    """Finds the captured nodes of a longer clip by their names.

    Raises:
        NotResizable: It cannot be captured, or has others.
    """
    if times > MOST:
        raise NotResizable(f"only clips {times} times as long would show it")
    longer = again(times, False)
    if longer is None or set(longer.notes.captured) != set(program.notes.captured):
        raise NotResizable("a longer clip has other operators")
    return {n.name: n for n in longer.graph.nodes}


def _counts_otherwise(node: Node | None, crop: StreamedCrop) -> bool:
    """Says whether a slice leaves out other numbers of entries in a longer clip; a list of indices is as long there."""
    while node is not None and node.target in SAME:  # a copy, whose name was given to what it copies
        node = operand(node)
    part = None if node is None else _part_of_split(node) or part_taken(node)
    if part is None:
        return True
    x, dim, start, end = part
    return (start, shape_of(x)[dim] - end) != (crop.start, crop.entries - crop.end)


def _part_of_split(node: Node) -> tuple[Node, int, int, int] | None:
    """Does what ``part_taken`` does, of a part of a ``split``."""
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, Node) or split.target is not aten.split_with_sizes.default:
        return None
    x, at, values = operand(split), whole(node, 1), Arguments(split)
    sizes = values.integers("split_sizes")
    before = sum(sizes[:at])
    return x, values.dim(x), before, before + sizes[at]


def _say(program: Program, why: str) -> None:
    if program.notes.split_views:
        program.notes.warnings.append(
            f"A view splits time into blocks of frames; that they are as long in a longer clip is assumed: {why}."
        )
    if program.notes.crops:
        program.notes.warnings.append(
            f"That slices over time leave out as many entries of a window as of a clip is assumed: {why}."
        )
    if program.notes.loop_starts:
        program.notes.warnings.append(
            f"A loop over frames starts from numbers that are not zero; that a longer clip has them is assumed: {why}."
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
    """Says whether the same numbers stand in front, and those behind them go on as they do.

    Along other dims, of which there may be more, they are the same.
    """
    if (progression if len(dims) == 1 else band)(longer) is None:
        return False
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
