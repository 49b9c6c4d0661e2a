"""torchvision's operators on boxes, with and without its compiled part."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from co3d_compile.ir.box_operators import ALIGN, POOL
from co3d_compile.ir.node_reading import operator_name

OURS = {"torchvision.roi_align": ALIGN, "torchvision.roi_pool": POOL}


@contextmanager
def without_compiled_part() -> Iterator[None]:
    """Lets torchvision's operators on boxes be called and captured where its compiled part does not load.

    Its ``roi_align`` is then written out in Python, which is not to be captured, and its ``roi_pool`` refuses.
    """
    modules = [m for name in OURS if (m := sys.modules.get(name.replace(".", ".ops.")))]
    namespace = torch.ops.torchvision
    if not modules or hasattr(namespace, "roi_align"):
        yield
        return
    there: list[tuple[Any, str, Any]] = [(namespace, "roi_align", ALIGN), (namespace, "roi_pool", _pool_and_positions)]
    for module in modules:
        there += [(module, "_has_ops", lambda: True), (module, "_assert_has_ops", lambda: None)]
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in there]
    try:
        for owner, name, value in there:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _pool_and_positions(*args: Any) -> tuple[Tensor, None]:
    return POOL(*args), None


def use_own_operators(graph: Graph) -> None:
    """Writes this compiler's operators on boxes in the place of torchvision's compiled ones."""
    for node in graph.nodes:
        if (ours := OURS.get(operator_name(node.target))) is None:
            continue
        if ours is POOL:  # torchvision's returns the positions of the maxima, too
            for item in list(node.users):
                if item.target is operator.getitem and item.args[1] == 0:
                    item.replace_all_uses_with(node)
                    graph.erase_node(item)
            node.meta["val"] = node.meta["val"][0]
        node.target = ours
