"""Limit delay: with ``max_delay``, some convolutions and pools over time read less of the future, or none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from co3d_compile.analysis.annotation import annotate
from co3d_compile.analysis.delay_budget import DelayBudget
from co3d_compile.analysis.delay_model import DelayModel
from co3d_compile.analysis.kernel_future import Change, FutureKernel, future_kernels
from co3d_compile.canonical.limited_forms import limited
from co3d_compile.ir.found_parts import Limited
from co3d_compile.ir.graph_edits import erase_dead, insert, insert_constant, replace
from co3d_compile.ir.node_reading import module_path, operator_name
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import delete_unused_constants


class LimitDelay(Pass):
    """Rewrites as few of what slides over time as ``max_delay`` needs, those first whose future weighs least:

    1. ``conv3d(x, w, padding=[1, 1, 1])`` to ``conv3d(pad(x, front=1), w[:, :, :2], padding=[0, 1, 1])`` with
       ``delay_by="drop"``: the taps of the future are left out; with ``"fold"`` they are added to the last one left;
    2. to ``conv3d(pad(x, front=2), w, padding=[0, 1, 1])`` with ``"shift"``: the whole kernel stands in the past, its
       weights are the same.

    It looks at the delays of a copy that it annotates. What it writes is another clip network; all passes behind it
    take it for the model's own, and the report names what was changed.
    """

    requires = frozenset({"canonical"})

    def run(self, program: Program) -> bool:
        budget, by = program.options.max_delay, program.options.delay_by
        if budget is None:
            return False
        copy = program.copied()
        annotate(copy)
        nodes = {n.name: n for n in program.graph.nodes}  # the copy may have more, for starts of their own
        kernels = {kernel.node: kernel for kernel in future_kernels(copy) if kernel.node.name in nodes}
        search = DelayBudget(DelayModel(copy, kernels), budget, by)
        left = search.left()
        changes = search.changes(left)
        for node in sorted(left, key=list(copy.graph.nodes).index):
            self._limit(program, nodes[node.name], kernels[node], left[node], changes[node])
        erase_dead(program.graph)
        delete_unused_constants(program.module)
        return bool(left)

    def _limit(self, program: Program, node: Node, kernel: FutureKernel, left: int, change: Change) -> None:
        by, dim = program.options.delay_by, kernel.time_dim
        program.notes.limited.append(
            Limited(
                node=program.captured_name(node),
                operator=operator_name(node.target),
                module_path=module_path(node),
                time_dim=dim,
                later=change.later,
                dropped=change.dropped,
                future=left,
                share=round(kernel.share(left), 6),
            )
        )
        program.record(node, "reads less of the future")

        def make(target: Callable[..., Tensor], *args: Argument) -> Node:
            return made(program, node, target, *args)

        replace(node, limited(node, dim, change.later, change.dropped, by == "fold", make))


def made(program: Program, before: Node, target: Callable[..., Tensor], *args: Argument) -> Node:
    """Puts an operator in front of a node; one on constants is computed."""
    constants: list[Node] = []
    torch.fx.map_arg(args, constants.append)
    if any(n.op != "get_attr" for n in constants):
        return insert(program, before, target, *args)
    with torch.no_grad():
        value = target(*torch.fx.map_arg(args, program.constant))
    return insert_constant(program, before, str(constants[0].target), value.contiguous().clone())
