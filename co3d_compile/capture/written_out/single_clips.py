"""Networks for a single clip whose frames are rows: the clip has its dim back where something is done along them."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.node import Argument

from co3d_compile.capture.loops.time_dims import TimeDims
from co3d_compile.ir.graph_edits import insert, replace
from co3d_compile.ir.node_reading import operands, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
PAD = aten.constant_pad_nd.default
ALONG_A_DIM = {  # the second argument
    aten.cat.default,
    aten.cummax.default,
    aten.cumprod.default,
    aten.cumsum.default,
    aten.index_select.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.softmax.int,
}


def give_rows_a_clip(program: Program) -> None:
    """Rewrites ``x[1:]``, of the rows of one clip, to ``x[None][:, 1:][0]``, where time is a dim by itself."""
    if program.inputs[0].shape[:1] != (1,):
        return
    found = [node for node in program.graph.nodes if _is_along_rows(node)]
    if not found:
        return
    times = TimeDims(program)
    along = [node for node in found if times.has_entries(operands(node)[0], 0, otherwise=True)]
    times.forget()
    for node in along:
        x, *rest = node.args
        rest = rest if node.target is PAD else [1, *rest[1:]]
        result = insert(program, node, node.target, _as_clips(program, node, x), *rest, **node.kwargs)
        replace(node, insert(program, node, aten.squeeze.dim, result, 0))


def _is_along_rows(node: Node) -> bool:
    """Says whether an operator does something along the first dim, which counts other things than clips."""
    if node.target not in {*ALONG_A_DIM, PAD}:
        return False
    x = operands(node)[0]
    if node.target is PAD:
        pads = Arguments(node).integers("pad")
        return len(pads) == 2 * rank_of(x) and pads[-2:] != [0, 0]
    alike = node.target is not aten.cat.default or len({rank_of(part) for part in operands(node)}) == 1
    return Arguments(node).dim(x) == 0 and shape_of(x)[0] > 1 and alike


def _as_clips(program: Program, node: Node, x: Argument) -> Argument:
    """Puts a dim of one in front of an operand, or of several."""
    if isinstance(x, Node):
        return insert(program, node, aten.unsqueeze.default, x, 0)
    assert isinstance(x, (list, tuple))
    return [_as_clips(program, node, each) for each in x]
