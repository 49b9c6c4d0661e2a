"""Boxes cut out of the features of a frame."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.box_operators import ALIGN, BOXES, POOL
from co3d_compile.ir.layout import Layout, LayoutLost
from co3d_compile.ir.node_reading import operand, shape_of, where
from co3d_compile.ir.time_facts import STATIC, Fact, Kind, combine, fact_of, known
from co3d_compile.rules.base import Rule, register


@register(ALIGN, POOL)
class Boxes(Rule):
    """``roi_align`` and ``roi_pool``: a row of the result for each box. Boxes stand where the batch does."""

    def layout(self, node: Node) -> Layout:
        x, boxes = known(operand(node)), operand(node, BOXES)
        if fact_of(boxes).kind is Kind.STATIC:
            raise LayoutLost
        if x.time is not None and x.time.size > 1:
            raise UnsupportedError(
                "Boxes are cut out of several frames at once: which of them a box belongs to is not known.",
                **where(node),
                hint="Pool over time first, as detection heads do.",
            )
        return Layout((known(boxes).dims[0], x.dims[1], *Layout.plain(shape_of(node)[2:]).dims))

    def flow(self, node: Node) -> Fact:
        x, boxes = fact_of(operand(node)), fact_of(operand(node, BOXES))
        if boxes is not STATIC:
            boxes = replace(boxes, delay=boxes.delay + x.crop, cut=boxes.cut + x.crop)
        return combine([x, boxes], self.layout(node))
