"""Norms between two views, which are norms of groups of channels, and the scales and shifts behind norms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.capture.written_out.regions import Constants, without_effect
from co3d_compile.ir.aten_operators import RESHAPES
from co3d_compile.ir.graph_edits import insert, insert_constant, replace
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.program import Program

aten = torch.ops.aten
AFFINE: dict[Target, int] = {aten.group_norm.default: 2, aten.instance_norm.default: 1, aten.layer_norm.default: 2}
"""Where a norm takes its scale; its shift is the next argument."""


def join_group_norms(program: Program) -> None:
    """Rewrites ``view(norm(view(x)))`` to ``group_norm(x)``, and takes ``* scale + shift`` behind a norm into it."""
    constants = Constants(program)
    for node in list(program.graph.nodes):
        if node.target in RESHAPES:
            _group(program, node, constants)
    for node in list(program.graph.nodes):
        if node.target in AFFINE:
            _take_in(program, node, constants, aten.mul.Tensor, 0)
            _take_in(program, node, constants, aten.add.Tensor, 1)


def _group(program: Program, node: Node, constants: Constants) -> None:
    """Joins the norm in front of a view, if one behind which it stands split the channels into groups."""
    norm = without_effect(operand(node))
    if norm.target not in (aten.instance_norm.default, aten.layer_norm.default) or len(norm.users) > 1:
        return
    inner = without_effect(operand(norm))
    if inner.target not in RESHAPES or len(inner.users) > 1:
        return
    x, shape, apart = operand(inner), shape_of(node), shape_of(inner)
    if shape_of(x) != shape or min(len(shape), len(apart)) < 3 or apart[0] != shape[0] or shape[1] % apart[1]:
        return
    values, affine = Arguments(norm), _affine(norm, constants)
    over_all = norm.target is aten.instance_norm.default or len(values.integers("normalized_shape")) == len(apart) - 2
    if affine is None or not over_all or values.given("use_input_stats") is False:
        return
    if norm.target is aten.layer_norm.default and any(v is not None for v in affine):
        return
    each = shape[1] // apart[1]
    vectors = [
        None if v is None else insert_constant(program, node, f"{node.name}_affine", v.repeat_interleave(each).float())
        for v in affine
    ]
    new = insert(program, node, aten.group_norm.default, x, apart[1], *vectors, values.number("eps"), False)
    replace(node, new)


def _affine(norm: Node, constants: Constants) -> list[Tensor | None] | None:
    """Finds the scale and shift of a norm, None where they change nothing.

    None for both where they are no constants.
    """
    found: list[Tensor | None] = []
    for name, neutral in (("weight", 1.0), ("bias", 0.0)):
        given = Arguments(norm).optional(name)
        value = constants.value(given) if given is not None else None
        if given is not None and value is None:
            return None
        found.append(None if value is None or bool((value == neutral).all()) else value)
    return found


def _take_in(program: Program, norm: Node, constants: Constants, operator: object, which: int) -> None:
    """Takes the constant with which the only reader of a norm scales or shifts it into the norm."""
    user = next(iter(norm.users), None)
    if user is None or user.target is not operator or len(norm.users) > 1 or user.kwargs:
        return
    other = user.args[1] if user.args[0] is norm else user.args[0]
    value, affine = constants.value(other) if isinstance(other, Node) else None, _affine(norm, constants)
    if value is None or affine is None or affine[which] is not None or (which == 0 and affine[1] is not None):
        return
    vector = _vector(norm, value)
    if vector is None or shape_of(user) != shape_of(norm):
        return
    at = AFFINE[norm.target]
    args = [*norm.args, *[None] * (at + 2 - len(norm.args))]
    with_scale = Arguments(norm).optional("weight") is not None
    args[at + which] = insert_constant(program, norm, f"{norm.name}_affine", vector.to(norm.meta["val"].dtype))
    if which == 1 and not with_scale and norm.target is not aten.layer_norm.default:
        args[at] = insert_constant(program, norm, f"{norm.name}_affine", torch.ones_like(vector).float())
    norm.args = tuple(args)
    replace(user, norm)


def _vector(norm: Node, value: Tensor) -> Tensor | None:
    """Gives a constant the shape in which a norm takes its scale and shift, if it can be told so."""
    shape = shape_of(norm)
    whole = value.reshape([1] * (len(shape) - value.dim()) + list(value.shape))
    if norm.target is aten.layer_norm.default:
        over = Arguments(norm).integers("normalized_shape")
        inner = whole.reshape(whole.shape[-len(over) :]) if _only(whole, range(-len(over), 0)) else None
        return None if inner is None else inner.expand(over).contiguous()
    return whole.reshape(-1).expand(shape[1]).contiguous() if _only(whole, [1]) else None


def _only(value: Tensor, dims: Iterable[int]) -> bool:
    """Says whether a tensor has several entries along these dims at most."""
    kept = {d % value.dim() for d in dims}
    return all(size == 1 or d in kept for d, size in enumerate(value.shape))
