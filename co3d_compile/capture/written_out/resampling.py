"""A linear interpolation that an exporter has written as selections and a mean of them, as one operator again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

from co3d_compile.capture.written_out.regions import Region, join_regions
from co3d_compile.ir.graph_edits import insert
from co3d_compile.ir.node_reading import rank_of, shape_of
from co3d_compile.ir.program import Program
from co3d_compile.rules import is_pointwise

aten = torch.ops.aten
SELECT = aten.index_select.default
MOVES = {SELECT, aten.permute.default, aten.transpose.int}
CLOSE = 1e-6  # for each entry: weights come from places that were computed in float32
DRAWS = 3


def join_interpolations(program: Program) -> None:
    """Rewrites ``x[i] + (x[j] - x[i]) * w`` with ``i``, ``j`` and ``w`` stored to interpolation over the last dim."""
    if not any(n.target is SELECT for n in program.graph.nodes):
        return

    def joined(region: Region) -> Node | None:
        corners, node = _corners(region), region.result
        if corners is None:
            return None
        args = (region.source, [shape_of(node)[2]], corners)
        return insert(program, node, aten.upsample_linear1d.default, *args)

    join_regions(program, lambda n: n.target in (aten.add.Tensor, aten.sub.Tensor), _may, joined)


def _may(node: Node) -> bool:
    return node.op == "call_function" and (is_pointwise(node.target) or node.target in MOVES)


def _corners(region: Region) -> bool | None:
    """Finds ``align_corners`` of the interpolation that a region computes; None if it computes none."""
    x, node = region.source, region.result
    values = x.meta["val"], node.meta["val"]
    if x.op == "get_attr" or not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):
        return None
    before, after = shape_of(x), shape_of(node)
    selects = sum(n.target is SELECT for n in region.nodes)
    if selects < 2 or rank_of(x) != 3 or before[:2] != after[:2] or before[2] < 2 or before[2] == after[2]:
        return None
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(before, generator=generator, dtype=torch.float64) for _ in range(DRAWS)]
    try:
        results = [region.run(x) for x in draws]
    except (RuntimeError, TypeError, ValueError, IndexError):  # an operator that has no float64
        return None
    for corners in (False, True):
        expected = [F.interpolate(x, size=after[2], mode="linear", align_corners=corners) for x in draws]
        off = max(float((r - e).abs().max()) for r, e in zip(results, expected, strict=True))
        if off < CLOSE * max(after[2], 8):
            return corners
    return None
