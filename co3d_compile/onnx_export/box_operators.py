"""From operators on boxes to ONNX operators, which take any number of boxes, and none."""

from __future__ import annotations

import onnx_ir as ir
from torch.fx import Node

from co3d_compile.ir.box_operators import ALIGN, BOXES, POOL
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.onnx_export.emitter import Emitter, translates


@translates(ALIGN)
def _align(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    index, corners = e.outputs(2, "Split", operand(node, BOXES), [1, 4], axis=1)
    index = e.op("Cast", e.op("Squeeze", index, [1]), to=7)
    return e.op(
        "RoiAlign",
        operand(node),
        corners,
        index,
        output_height=given.integer("height"),
        output_width=given.integer("width"),
        sampling_ratio=max(0, given.integer("samples")),
        spatial_scale=given.number("scale"),
        coordinate_transformation_mode="half_pixel" if given.given("aligned") else "output_half_pixel",
    )


@translates(POOL)
def _pool(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    bins = [given.integer("height"), given.integer("width")]
    scale = given.number("scale")
    return e.op("MaxRoiPool", operand(node), operand(node, BOXES), pooled_shape=bins, spatial_scale=scale)
