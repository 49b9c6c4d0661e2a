"""Canonical forms of resampling: what takes entries at even distances is slices, and a size is one way to say it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.canonical.copy_forms import resampling
from co3d_compile.ir.aten_operators import EXACT_OVERLOADS, LINEAR, NEAREST
from co3d_compile.ir.graph_edits import Rewrite, insert, insert_constant, replace
from co3d_compile.ir.node_reading import operand, overloads, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
TIME = 2  # the dim of (N, C, T) and (N, C, T, H, W) that may be time: over space nothing is gained
_NEAREST = {o for packet in NEAREST for o in overloads(packet)}
_LINEAR = {o for packet in LINEAR for o in overloads(packet)}


def scales(node: Node) -> list[float | None]:
    """Counts the entries of the operand per entry of the result, on each resampled dim, where a factor was given."""
    n = rank_of(node) - 2
    first = 3 if node.target in _LINEAR else 2
    given = Arguments(node).given("scale_factors") if "vec" in str(node.target) else node.args[first:]
    factors: list[Any] = [*(given if isinstance(given, (list, tuple)) else ()), *[None] * n]
    return [1 / f if f is not None else None for f in factors[:n]]


def whole_factor(node: Node, axis: int) -> int | None:
    """Finds the whole number of entries of the operand per entry of the result on an axis, if there is one above one.

    A single result is no sampling: it is one of the whole clip.
    """
    old, new = shape_of(operand(node))[2 + axis], shape_of(node)[2 + axis]
    scale = scales(node)[axis]
    r = old // new
    return r if 1 < r < old and r * new == old and (scale is None or abs(scale - r) < 1e-9) else None


def down_sampling(program: Program, node: Node) -> None:
    """Takes every r-th entry of the first dim, or the mean of the two in the middle of each r; then the other dims."""
    r = whole_factor(node, 0) if rank_of(node) in (3, 5) else None
    nearest = node.target in _NEAREST
    if r is None or not (nearest or Arguments(node).given("align_corners") is False):
        resampling(program, node)
        return
    x = operand(node)
    size = shape_of(x)[TIME]
    firsts = [0] if nearest else [(r - 1) // 2] if r % 2 else [r // 2 - 1, r // 2]
    taken = [insert(program, node, aten.slice.Tensor, x, TIME, first, size, r) for first in firsts]
    new = taken[0]
    if len(taken) == 2:
        new = insert(program, node, aten.mul.Tensor, insert(program, node, aten.add.Tensor, *taken), 0.5)
    replace(node, _rest(program, node, new))


def _rest(program: Program, node: Node, x: Node) -> Node:
    """Resamples the other dims as they were to be."""
    if shape_of(x) == shape_of(node):
        return x
    packet = (NEAREST if node.target in _NEAREST else LINEAR)[rank_of(node) - 3]
    corners = [] if node.target in _NEAREST else [False]
    given = scales(node)[1:]
    if any(s is None for s in given):
        return insert(program, node, packet.vec, x, list(shape_of(node)[2:]), *corners, None)
    return insert(program, node, packet.vec, x, None, *corners, [1.0, *(1 / s for s in given if s is not None)])


def nearest_exact(program: Program, node: Node) -> None:
    """Writes ``nearest-exact`` as ``nearest``: only where it begins differs, and for whole factors up not even that."""
    x = operand(node)
    old, new = shape_of(x), shape_of(node)
    for d in range(2, rank_of(node)):
        if new[d] % old[d]:
            scale = scales(node)[d - 2]
            index = insert_constant(program, node, f"constant.{node.name}.{d}", _places(old[d], new[d], scale))
            x = insert(program, node, aten.index_select.default, x, d, index)
    alike = shape_of(x) == new
    x = x if alike else insert(program, node, NEAREST[len(new) - 3].vec, x, list(new[2:]), None)
    replace(node, x)
    if not alike:
        resampling(program, x)


def _places(old: int, new: int, scale: float | None) -> torch.Tensor:
    """Finds which entry each is, by PyTorch itself."""
    line = torch.arange(old, dtype=torch.float64).view(1, 1, old)
    how: Any = {"size": new} if scale is None else {"scale_factor": 1 / scale}
    return F.interpolate(line, mode="nearest-exact", **how).long().flatten()


RESAMPLING: dict[Target, Rewrite] = {
    **dict.fromkeys(_NEAREST | _LINEAR, down_sampling),
    **dict.fromkeys(EXACT_OVERLOADS, nearest_exact),
}
