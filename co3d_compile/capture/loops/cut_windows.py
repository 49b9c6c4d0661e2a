"""Windows of a tensor that Python cuts out one by one, and joins: those at its ends may be filled up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from co3d_compile.capture.loops.tokens import Take, filling_of, taken, uncut
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
FEWEST = 3  # windows that are all of a clip


@dataclass(frozen=True)
class Window:
    """Entries of a tensor from ``start`` on, which may be negative: ``fill`` stands where the tensor has none."""

    root: Node
    dim: int
    start: int
    width: int
    fill: float | None = None


def unfold(program: Program, node: Node) -> None:
    """Writes a concatenation of all windows of a tensor as ``unfold``, of a pad where the outer ones are filled up."""
    parts, joined = Arguments(node).tensors("tensors"), Arguments(node).dim(node)
    made = all(p.target is aten.unsqueeze.default and Arguments(p).dim(p) == joined for p in parts)
    windows = _windows(program, [operand(part) if made else part for part in parts])
    if len(windows) < FEWEST:
        return
    x, dim, width, step = windows[0].root, windows[0].dim, windows[0].width, windows[1].start - windows[0].start
    front, last = -windows[0].start, windows[-1].start + width
    behind = max(0, last - shape_of(x)[dim])
    fills = {w.fill for w in windows if w.fill is not None}
    walk = [(x, dim, i * step - front, width) for i in range(len(windows))]
    left = shape_of(x)[dim] + front + behind - len(windows) * step
    if [(w.root, w.dim, w.start, w.width) for w in windows] != walk or front < 0 or step < 1 or left >= width:
        return
    if len(fills) > 1 or (not made and joined == dim and step == width):
        return
    if walk[-1][2] + front < width:
        return  # all have an entry in common: the taps of a kernel, as many of them in a longer clip
    if fills:
        pads = [0, 0] * (rank_of(x) - 1 - dim) + [front, behind]
        x = insert(program, node, aten.constant_pad_nd.default, x, pads, fills.pop())
    found = insert(program, node, aten.unfold.default, x, dim, width, step)  # their number in dim, their entries last
    order = [d if d != dim else rank_of(x) for d in range(rank_of(x))]
    order.insert(joined, dim)
    apart = insert(program, node, aten.permute.default, found, order)
    copied = insert(program, node, aten.clone.default, apart, memory_format=torch.contiguous_format)  # views follow it
    replace(node, copied if made else insert(program, node, aten.reshape.default, copied, [*shape_of(node)]))


def _windows(program: Program, parts: Sequence[Node]) -> list[Window]:
    """Finds the window that each of some tensors is; none where one of them is no window."""
    found: list[Window] = []
    for part in parts:
        window = _window(program, part)
        if window is None:
            return []
        found.append(window)
    return found


def _window(program: Program, node: Node) -> Window | None:
    """Finds the window that a tensor is: a slice, or one at an end of its tensor, filled up by a pad or constants."""
    if node.target is aten.constant_pad_nd.default:
        pads, value = Arguments(node).integers("pad"), Arguments(node).number("value")
        padded = {i // 2 for i, pad in enumerate(pads) if pad}
        if not padded:
            return _window(program, operand(node))
        at = padded.pop()
        if padded or min(pads) < 0:
            return None
        return _filled(operand(node), rank_of(node) - 1 - at, pads[2 * at], pads[2 * at + 1], float(value))
    if node.target is aten.cat.default:
        return _beside_constants(program, node)
    take = taken(node)
    return None if take is None or take.length is None else Window(take.root, take.dim, take.start, take.length)


def _beside_constants(program: Program, node: Node) -> Window | None:
    """Finds the window that a concatenation of a slice with constants of one number is."""
    parts, dim = Arguments(node).tensors("tensors"), Arguments(node).dim(node)
    fills = [filling_of(part, program) for part in parts]
    own = [i for i, fill in enumerate(fills) if fill is None]
    values = {fill for fill in fills if fill is not None}
    if len(own) != 1 or len(values) != 1:
        return None
    front, back = (sum(shape_of(part)[dim] for part in some) for some in (parts[: own[0]], parts[own[0] + 1 :]))
    return _filled(parts[own[0]], dim, front, back, values.pop())


def _filled(x: Node, dim: int, front: int, back: int, fill: float) -> Window | None:
    """Finds the window that a slice with something in front of it and behind it is, if its tensor ends there."""
    take = taken(x) or Take(uncut(x), dim, 0, shape_of(x)[dim])
    ends = take.length is not None and take.start + take.length == shape_of(take.root)[take.dim]
    if take.length is None or take.dim != dim or (front and take.start) or (back and not ends):
        return None
    return Window(take.root, dim, take.start - front, front + take.length + back, fill)
