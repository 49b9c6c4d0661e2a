"""The inputs of a network that are boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from co3d_compile.capture.known_constants import tensors_of
from co3d_compile.capture.tracer import Clip
from co3d_compile.ir.box_operators import ALIGN, BOXES, POOL
from co3d_compile.ir.graph_walks import computed_from
from co3d_compile.ir.node_reading import operand


def box_inputs(graph: Graph) -> dict[Node, bool]:
    """Finds the inputs that boxes are made of, and whether their first column is the index in the batch.

    Boxes that depend on an input with more than two dims are the network's own.
    """
    found: dict[Node, bool] = {}
    for node in [n for n in graph.nodes if n.target in (ALIGN, POOL)]:
        inputs = [n for n in computed_from(operand(node, BOXES)) if n.op == "placeholder"]
        if all(n.meta["val"].dim() == 2 for n in inputs):
            found |= {n: found.get(n, True) and n is operand(node, BOXES) for n in inputs}
    return found


def one_box(clip: Clip, rows: Sequence[bool]) -> Clip | None:
    """Cuts the example down to one box in each of the inputs that are boxes.

    None where other tensors are given than those.
    """
    if len(tensors_of(clip)) != len(rows):
        return None
    boxes = iter(rows)

    def first(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])[:1] if next(boxes) else x

    fitted: Clip = pytree.tree_map_only(Tensor, first, tuple(clip))
    return fitted
