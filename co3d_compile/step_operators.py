"""The operators that lowering writes for several families: sums, reductions over entries, transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from co3d_compile.builder import Builder

aten = torch.ops.aten

TRANSPOSED = [aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input]


class StepOperators(Builder):
    """Operators on entries: time is not among their dims."""

    def stacked(self, refs: Sequence[Any]) -> Node:
        """Entries as (batch, entries, features)."""
        raise NotImplementedError

    def sum(self, parts: Sequence[Node]) -> Node:
        """The sum of tensors."""
        total = parts[0]
        for part in parts[1:]:
            total = self.call(aten.add.Tensor, total, part)
        return total

    def minus(self, x: Node, y: Node) -> Node:
        """The difference of tensors."""
        return self.call(aten.sub.Tensor, x, y)

    def stack(self, parts: Sequence[Node]) -> Node:
        """Tensors along a new first dim."""
        rows = [self.call(aten.unsqueeze.default, p, 0) for p in parts]
        return rows[0] if len(rows) == 1 else self.call(aten.cat.default, rows, 0)

    def reduce_entries(self, refs: Sequence[Any], kind: str) -> Node:
        """Mean, sum, maximum or minimum over entries."""
        if len(refs) == 1:
            return self.resolve(refs[0])
        if len(refs) > 4:
            rows = self.stacked(refs)
            target = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "amax": aten.amax.default}.get(
                kind, aten.amin.default
            )
            reduced = self.call(target, rows, [1], False)
            return self.call(aten.reshape.default, reduced, [-1, *self.sizes(self.resolve(refs[-1]))[1:]])
        nodes = [self.resolve(r) for r in refs]
        if kind in ("mean", "sum"):
            total = self.sum(nodes)
            return self.call(aten.mul.Tensor, total, 1.0 / len(nodes)) if kind == "mean" else total
        total = nodes[0]
        for node in nodes[1:]:
            total = self.call(aten.maximum.default if kind == "amax" else aten.minimum.default, total, node)
        return total

    def transposed(self, x: Node, tap: Node, geometry: list[list[int]], groups: int) -> Node:
        """One tap of a transposed convolution, over space alone."""
        stride, padding, output_padding, dilation = geometry
        if stride:
            return self.call(
                TRANSPOSED[len(stride) - 1], x, tap, None, stride, padding, output_padding, groups, dilation
            )
        one = [self.call(aten.unsqueeze.default, t, 2) for t in (x, tap)]
        return self.call(aten.squeeze.dim, self.call(TRANSPOSED[0], *one, None, [1], [0], [0], groups, [1]), 2)

    def zeros_like(self, x: Node) -> Node:
        """Zeros in the shape of one entry."""
        value = torch.zeros([1, *self.sizes(x)[1:]], dtype=x.meta["val"].dtype)
        return self.with_batch_of(self.constant(f"zeros_{'x'.join(map(str, value.shape[1:]))}", value), x)

    def add_bias(self, x: Node, bias: Node | None, space: int) -> Node:
        """Adds a bias per channel."""
        if bias is None:
            return x
        return self.call(aten.add.Tensor, x, self.call(aten.reshape.default, bias, [-1] + [1] * space))

    def with_dims(self, node: Node, x: Node, dims: list[int], keep: bool) -> Node:
        """A reduction over other dims of one entry."""
        if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim):
            return self.call(node.target, x, node.args[1], dims, keep)
        if node.target in (aten.var.correction, aten.std.correction):
            return self.call(node.target, x, dims, correction=node.kwargs.get("correction", 1), keepdim=keep)
        if isinstance(node.args[1], int):
            return self.call(node.target, x, dims[0], keep)
        return self.call(node.target, x, dims, keep, *node.args[3:], **node.kwargs)
