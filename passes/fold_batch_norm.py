"""Fold batch norm: its scale and offset go into the weights of the convolution before it."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node
from torch.fx.node import Argument

from co3d_compile.ir.aten_operators import BATCH_NORMS, CONVOLUTIONS
from co3d_compile.ir.frame_loop import loop_bodies
from co3d_compile.ir.graph_edits import erase_dead, insert, insert_constant, replace
from co3d_compile.ir.node_reading import operand, rank_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import delete_unused_constants

aten = torch.ops.aten


class FoldBatchNorm(Pass):
    """Rewrites, with scale = weight / sqrt(running_var + eps):

    1. ``batch_norm(conv(x, w, b))`` to ``conv(x, w * scale, (b - mean) * scale + bias)``;
    2. any other ``batch_norm(x)`` to ``x * scale + offset``.

    Computed in float64, so that folding costs no accuracy.
    """

    requires = frozenset({"canonical"})
    ensures = frozenset({"no_batch_norm"})

    def run(self, program: Program) -> bool:
        self._made: dict[tuple[Argument, ...], tuple[Node, Node]] = {}  # of norms that are called several times
        norms = [n for n in program.graph.nodes if n.target in BATCH_NORMS]
        for node in norms:
            result = self._fold(program, node)
            program.record(node, "folded into its convolution" if result.target in CONVOLUTIONS else "scale and offset")
            for user in list(node.users):
                if user.target is operator.getitem:
                    replace(user, result)
            replace(node, result)
        erase_dead(program.graph)
        for body in loop_bodies(program):
            self.run(body)
        delete_unused_constants(program.module)
        return bool(norms)

    def _fold(self, program: Program, node: Node) -> Node:
        scale, offset = self._scale(program, node)
        x = operand(node)
        if x.target in CONVOLUTIONS and len(x.users) == 1 and operand(x, 1).op == "get_attr":
            return self._into_convolution(program, node, x, scale, offset)
        shape = [-1] + [1] * (rank_of(x) - 2)
        dtype = x.meta["val"].dtype
        key = (*node.args[1:], len(shape), dtype)
        if key not in self._made:
            a = insert_constant(program, node, f"{node.name}.scale", scale.view(shape).to(dtype))
            b = insert_constant(program, node, f"{node.name}.offset", offset.view(shape).to(dtype))
            self._made[key] = a, b
        a, b = self._made[key]
        return insert(program, node, aten.add.Tensor, insert(program, node, aten.mul.Tensor, x, a), b)

    def _scale(self, program: Program, node: Node) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias, mean, variance = (
            program.constant(a).double() if isinstance(a, Node) else None for a in node.args[1:5]
        )
        assert mean is not None and variance is not None
        scale = torch.rsqrt(variance + Arguments(node).number("eps"))
        scale = scale if weight is None else scale * weight
        return scale, (0.0 if bias is None else bias) - mean * scale

    def _into_convolution(
        self, program: Program, node: Node, conv: Node, scale: torch.Tensor, offset: torch.Tensor
    ) -> Node:
        weight_node, bias_node = operand(conv, 1), Arguments(conv).optional("bias")
        weight = program.constant(weight_node)
        fused = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = offset if bias_node is None else offset + program.constant(bias_node).double() * scale
        owner, dot, _ = str(weight_node.target).rpartition(".")
        key = (weight_node, bias_node, *node.args[1:])
        if key not in self._made:
            w = insert_constant(program, node, f"{owner}{dot}fused_weight", fused.to(weight.dtype))
            b = insert_constant(program, node, f"{owner}{dot}fused_bias", bias.to(weight.dtype))
            self._made[key] = w, b
        w, b = self._made[key]
        new = insert(
            program,
            conv,
            conv.target,
            conv.args[0],
            w,
            b,
            *conv.args[3:],
            **{k: v for k, v in conv.kwargs.items() if k not in ("weight", "bias")},
        )
        program.notes.kernels[new.name] = program.notes.kernels.get(conv.name, conv.name)
        node.append(new)
        new.meta.update({k: v for k, v in conv.meta.items() if k == "nn_module_stack"})
        return new
