"""The floor: what a frame would cost if time cost nothing. ``co3d bench`` measures a step against it."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.aten_operators import DIMS, ConvArgs, PoolArgs
from co3d_compile.ir.graph_edits import insert, insert_constant
from co3d_compile.ir.node_reading import where
from co3d_compile.ir.pass_manager import Pass, PassList
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import delete_unused_constants
from co3d_compile.ir.time_facts import is_stream
from co3d_compile.passes import AnnotateTime, default_passes
from co3d_compile.rules import rule_for
from co3d_compile.rules.conv import Convolution

aten = torch.ops.aten
MEANS = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


class OneTap(Pass):
    """Cuts each kernel over time to its middle tap, so that nothing is remembered:

    ``conv3d(x, w, padding=[1, 1, 1])`` to ``conv3d(x, w[:, :, 1:2], padding=[0, 1, 1])``, pools likewise.

    All work over space stays: where a kernel strides over time, a mean of as many entries keeps those in between from
    being left out. The results mean nothing; no streaming form of the network that keeps its work over space can be
    faster, except by better kernels.
    """

    requires = frozenset({"time"})
    ensures = frozenset({"canonical"})
    breaks = frozenset({"time"})

    def run(self, program: Program) -> bool:
        cut = False
        for node in list(program.graph.nodes):
            if node.op == "call_function" and is_stream(node):
                if isinstance(rule_for(node.target), Convolution):
                    cut |= _cut_convolution(program, node)
                elif node.target in DIMS:
                    cut |= _cut_pool(node)
        delete_unused_constants(program.module)
        return cut


def _cut_convolution(program: Program, node: Node) -> bool:
    conv = ConvArgs.of(node)
    axis = conv.axis
    if axis is None or conv.kernel[axis] == 1:
        return False
    _check_length(node, conv.x, axis, len(conv.kernel), conv.stride[axis])
    weight = program.constant(conv.weight).narrow(2 + axis, conv.kernel[axis] // 2, 1).contiguous()
    conv.weight = insert_constant(program, node, f"{str(conv.weight.target).replace('.', '_')}_one_tap", weight)
    if conv.stride[axis] > 1:
        step = [conv.stride[axis] if i == axis else 1 for i in range(len(conv.kernel))]
        conv.x = insert(program, node, MEANS[len(step)], conv.x, step, step, 0, True)
    conv.stride[axis], conv.padding[axis], conv.dilation[axis] = 1, 0, 1
    conv.write(node)
    return True


def _cut_pool(node: Node) -> bool:
    pool = PoolArgs.of(node)
    axis = pool.axis
    if axis is None or pool.kernel[axis] == 1:
        return False
    _check_length(node, pool.x, axis, len(pool.kernel), pool.stride[axis])
    even = pool.x.meta["val"].shape[axis - len(pool.kernel)] % pool.stride[axis] == 0
    pool.kernel[axis], pool.padding[axis], pool.dilation[axis] = pool.stride[axis] if even else 1, 0, 1
    pool.write(node)
    return True


def _check_length(node: Node, x: Node, axis: int, axes: int, stride: int) -> None:
    """Refuses a kernel that gives other entries once it is cut: what follows was captured with as many as before."""
    before, after = x.meta["val"].shape[axis - axes], node.meta["val"].shape[axis - axes]
    if after != (before - 1) // stride + 1:
        raise UnsupportedError(
            "The floor of a kernel over time that shortens the clip is not known.",
            **where(node),
            hint="Measure without the floor.",
        )


def floor_passes() -> PassList:
    """Makes the pipeline that compiles a network's floor."""
    return default_passes().after("annotate_time", OneTap()).after("one_tap", AnnotateTime())
