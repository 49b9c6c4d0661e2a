"""Where time is in what a window gives, where its operators do not say it: in a longer clip that dim is longer."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.fx import Node

from co3d_compile.ir.node_reading import returned, shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.resized_graph import NotResizable

log = logging.getLogger(__name__)


def find_output_times(program: Program, again: Callable[[int, bool], Program | None]) -> None:
    """Finds the time dim of each output of a lowered program of which nothing is known; of several dims, the first.

    What cannot be captured for a longer clip stays without one, and so does what has more clips then.

    Args:
        program: Its outputs have their shapes in the clip.
        again: Captures the network for clips so many times as long.
    """
    if not any(spec.lost for spec in program.outputs):
        return
    try:
        longer = again(2, False)
    except NotResizable as why:
        log.info("where time is in the outputs is not known: %s", why)
        return
    assert longer is not None
    here, there = _outputs(program), _outputs(longer)
    for spec, step, clip in zip(program.outputs, here, there, strict=True):
        short, long = spec.lost or (), shape_of(clip)
        grown = [d for d, (a, b) in enumerate(zip(short, long, strict=False)) if a != b]
        dim = next((d for d in grown if d or short[0] != program.inputs[0].shape[0]), None)
        if dim is not None:
            spec.time_dim, spec.pulse = dim, shape_of(step)[dim]


def _outputs(program: Program) -> list[Node]:
    """The nodes of the model's outputs; behind them are the next states."""
    return returned(program.graph)[: len(program.outputs)]
