"""Results that hang on no input, such as what a norm leaves of one number: each stream has a row of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.fx import Node

from co3d_compile.ir.graph_edits import insert, insert_constant
from co3d_compile.ir.markers import expand_batch
from co3d_compile.ir.node_reading import returned, shape_of
from co3d_compile.ir.program import Program
from co3d_compile.ir.random_runs import equal
from co3d_compile.ir.resized_graph import NotResizable
from co3d_compile.onnx_export.batch_dims import fix_batch

log = logging.getLogger(__name__)
ROUNDING = 1e-5  # of the largest number: a product rounds one row otherwise than the next


def spread_constant_outputs(program: Program, again: Callable[[int, bool], Program | None]) -> None:
    """Gives each constant output of a lowered program as many rows as there are streams, if the network does so.

    Args:
        again: Captures the network for one more clip at once.
    """
    rows = program.inputs[0].shape[0]
    constants = [n for n in _outputs(program) if n.op == "get_attr" and rows in shape_of(n)]
    if not constants:
        return
    try:
        wider = again(1, True)
    except NotResizable as why:
        log.info("which dim of a constant output is the batch is not known: %s", why)
        return
    if wider is None:  # it was captured for a single clip
        return
    shapes = [shape_of(n) for n in _outputs(wider)]
    for node, shape in zip(_outputs(program), shapes, strict=True):
        grown = [d for d, (a, b) in enumerate(zip(shape_of(node), shape, strict=False)) if (a, b) == (rows, rows + 1)]
        if node in constants and grown:
            _spread(program, node, grown[0])


def _spread(program: Program, node: Node, dim: int) -> None:
    """Repeats the first row of a constant for each stream."""
    value = program.constant(node)
    if not equal(value, value.narrow(dim, 0, 1).expand_as(value), ROUNDING):
        fix_batch(program, "a result that hangs on no input has other numbers for each clip")
        return
    output, (first, *_) = program.graph.output_node(), program.placeholders()
    row = insert_constant(program, output, f"{node.target}_row", value.narrow(dim, 0, 1).contiguous())
    output.replace_input_with(node, insert(program, output, expand_batch, row, first, dim, 0))


def _outputs(program: Program) -> list[Node]:
    """The nodes of the model's outputs; behind them are the next states."""
    return returned(program.graph)[: len(program.outputs)]
