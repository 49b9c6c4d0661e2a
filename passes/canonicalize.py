"""Canonicalize: fewer kinds of operators, none without effect, constants computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from co3d_compile.canonical_forms import GATHERS, REWRITES
from co3d_compile.graph import insert_constant, replace
from co3d_compile.manager import Pass
from co3d_compile.program import Program, delete_unused_constants
from co3d_compile.rules.base import argument

aten = torch.ops.aten

SAME = {
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
# What the tracer noted about a tensor beside a cast, and assertions of the model: they compute nothing.
CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
# Constants in the shape of another tensor: the position of their value among the arguments, or the value.
LIKE: dict[Any, Any] = {
    aten.full_like.default: 1,
    aten.zeros_like.default: "0",
    aten.ones_like.default: "1",
    aten.empty_like.default: "0",
    aten.new_zeros.default: "0",
    aten.new_ones.default: "1",
    aten.new_full.default: 2,
    aten.new_empty.default: "0",
}


class Canonicalize(Pass):
    """Rewrites the captured graph into a smaller language:

    1. what does nothing in inference (clone, dropout, assertions, …) goes;
    2. a pool over a whole axis is a mean or a maximum: ``avg_pool3d(x, [16, 7, 7])`` to ``mean(x, [2, 3, 4])``;
    3. ``slice_scatter``, ``select_scatter`` are slices and ``cat``; ``split`` is slices;
    4. gathering by evenly spaced constant indices is a slice;
    5. what does not depend on the input is computed.
    """

    ensures = frozenset({"canonical"})

    def run(self, program: Program) -> bool:
        before = len(program.graph.nodes)
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in SAME or _same_dtype(node):
                replace(node, node.args[0])
            elif node.target in CHECKS:
                program.graph.erase_node(node)
            elif node.target in VIEWS:  # the copies that made views possible are gone
                node.target = aten.reshape.default
            elif node.target in REWRITES:
                REWRITES[node.target](program, node)
        program.graph.eliminate_dead_code()
        self._fold(program)
        for node in list(program.graph.nodes):
            if node.target in GATHERS:
                GATHERS[node.target](program, node)
        program.graph.eliminate_dead_code()
        delete_unused_constants(program.module)
        return len(program.graph.nodes) != before

    def _fold(self, program: Program) -> None:
        """Computes every node that does not depend on an input."""
        values: dict[Node, Any] = {}
        learned: set[Node] = set()
        for node in program.graph.nodes:
            if node.op == "get_attr":
                values[node] = program.constant(node)
                if node.meta.get("parameter", False):
                    learned.add(node)
            elif node.target in LIKE:
                values[node] = _like(node)
            elif node.target is aten.empty.memory_format:  # to be written over: what it holds must not matter
                values[node] = torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
                if not learned.isdisjoint(node.all_input_nodes):
                    learned.add(node)
        for node in list(program.graph.nodes):
            if node not in values or not isinstance(values[node], torch.Tensor):
                continue
            value = values[node]
            if node.op == "call_function" and any(user not in values for user in node.users):
                constant = insert_constant(program, node, f"constant.{node.name}", value.contiguous().clone())
                constant.meta["filling"] = _uniform(value) and node not in learned
                constant.meta["fill"] = _fill(value)
                constant.meta["alike"] = _alike(value)
                constant.meta["progression"] = progression(value) if node not in learned else None
                constant.meta["band"] = band(value)
                constant.meta["zero"] = _uniform(value, 0.0)
                node.replace_all_uses_with(constant)
            elif node.op == "get_attr":
                node.meta["zero"] = _uniform(value, 0.0)
                node.meta["band"] = band(value)
                node.meta["filling"] = _uniform(value) and node not in learned
                node.meta["fill"] = _fill(value)
        program.graph.eliminate_dead_code()


def _like(node: Node) -> torch.Tensor:
    """A constant in the shape of another tensor."""
    value = node.meta["val"]
    index = LIKE[node.target]
    fill: Any = node.args[index] if isinstance(index, int) else float(index)
    return torch.full(tuple(value.shape), fill, dtype=value.dtype)


def progression(value: torch.Tensor) -> tuple[int, float, float] | None:
    """Dim, first value and step of a constant that counts along one dim: it counts on beyond the clip."""
    long = [d for d, s in enumerate(value.shape) if s > 1]
    if len(long) != 1 or value.numel() < 3 or value.dtype == torch.bool:
        return None
    line = value.flatten().double()
    steps = line[1:] - line[:-1]
    even = bool((steps - steps[0]).abs().max() <= 1e-9) and float(steps[0]) != 0
    return (long[0], float(line[0]), float(steps[0])) if even else None


def band(mask: torch.Tensor) -> tuple[int, int] | None:
    """The least and largest distance into the past that an attention mask allows, if it is a band of such."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.numel() != mask.shape[-1] ** 2 or mask.shape[-1] < 3:
        return None
    square = mask.reshape(mask.shape[-2:])
    allowed = square if mask.dtype == torch.bool else square == 0
    if mask.dtype != torch.bool and not bool((allowed | (square == -torch.inf)).all()):
        return None
    n = square.shape[0]
    diagonals = [torch.diagonal(allowed, -back) for back in range(1 - n, n)]
    inside = [back for back, line in zip(range(1 - n, n), diagonals, strict=True) if bool(line.all())]
    even = all(bool(line.all()) or not bool(line.any()) for line in diagonals)
    if not even or not inside or inside != list(range(inside[0], inside[-1] + 1)):
        return None
    return (inside[0], inside[-1]) if inside[0] > 1 - n and inside[-1] < n - 1 else None


def _fill(value: torch.Tensor) -> float | None:
    """The one number that a constant consists of."""
    return float(value.flatten()[0]) if value.numel() and _uniform(value) else None


def _alike(value: torch.Tensor) -> frozenset[int]:
    """The dims along which a constant stays the same."""
    return frozenset(d for d in range(value.dim()) if bool((value == value.narrow(d, 0, 1)).all()))


def _uniform(value: torch.Tensor, wanted: float | None = None) -> bool:
    if value.numel() == 0:
        return True
    first = value.flatten()[0]
    return bool((value == first).all()) and (wanted is None or float(first) == wanted)


def _same_dtype(node: Node) -> bool:
    if node.target not in (aten._to_copy.default, aten.to.dtype, aten.expand.default, aten.slice.Tensor):
        return False
    old, new = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return old.dtype == new.dtype and old.shape == new.shape and argument(node, 4, "step", 1) == 1
