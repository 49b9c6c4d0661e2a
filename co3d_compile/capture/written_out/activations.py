"""Activations that are written out in smaller operators, as one operator again: found by the numbers they compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.capture.written_out.regions import Region, computes_floats, join_regions
from co3d_compile.ir.graph_edits import insert
from co3d_compile.ir.node_reading import shape_of
from co3d_compile.ir.program import Program

aten = torch.ops.aten
Activation = tuple[Callable[..., Tensor], dict[str, str]]
ACTIVATIONS: list[Activation] = [
    (aten.sigmoid.default, {}),
    (aten.silu.default, {}),
    (aten.gelu.default, {}),
    (aten.gelu.default, {"approximate": "tanh"}),
    (aten.hardsigmoid.default, {}),
    (aten.hardswish.default, {}),
    (aten.softplus.default, {}),
    (aten.mish.default, {}),
]
"""What is looked for: functions of one number, without settings that could be any number."""

FAR = torch.tensor([-60.0, -30.0, -16.0, 16.0, 30.0, 60.0], dtype=torch.float64)
POINTS = torch.cat([torch.linspace(-8, 8, 161, dtype=torch.float64), FAR])
SAME = 1e-6  # of a number, or of 1: constants such as the root of 2 were rounded to float32


def join_activations(program: Program) -> None:
    """Rewrites ``x * 0.5 * (1 + erf(x / sqrt(2)))`` to ``gelu(x)``, and so the other activations of the table."""
    known = [target(POINTS, **settings) for target, settings in ACTIVATIONS]

    def joined(region: Region) -> Node | None:
        same = region.source.meta["val"].dtype == region.result.meta["val"].dtype
        if len(region.nodes) > 1 and same and _is_of_numbers(region):
            values = region.run(POINTS)
            for (target, settings), expected in zip(ACTIVATIONS, known, strict=True):
                if torch.allclose(values, expected, rtol=SAME, atol=SAME):
                    return insert(program, region.result, target, region.source, **settings)
        return None

    join_regions(program, computes_floats, computes_floats, joined)


def _is_of_numbers(region: Region) -> bool:
    """Says whether it computes each number by itself, with single numbers for constants."""
    same = shape_of(region.source) == shape_of(region.result)
    return same and all(v.numel() == 1 for v in region.values.values())
