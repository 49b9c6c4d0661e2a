"""From pointwise ATen operators to ONNX operators: each element of the result is computed by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from co3d_compile.ir.node_reading import argument, operand
from co3d_compile.onnx_export.emitter import translates

if TYPE_CHECKING:
    import onnx_ir as ir

    from co3d_compile.onnx_export.emitter import Emitter

aten = torch.ops.aten

UNARY = {
    aten.relu.default: "Relu",
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.sqrt.default: "Sqrt",
    aten.neg.default: "Neg",
    aten.abs.default: "Abs",
    aten.erf.default: "Erf",
    aten.reciprocal.default: "Reciprocal",
    aten.floor.default: "Floor",
    aten.sin.default: "Sin",
    aten.cos.default: "Cos",
    aten.hardswish.default: "HardSwish",
    aten.mish.default: "Mish",
    aten.ceil.default: "Ceil",
    aten.round.default: "Round",
    aten.sign.default: "Sign",
    aten.atan.default: "Atan",
    aten.isnan.default: "IsNaN",
    aten.selu.default: "Selu",
}
BINARY = {
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.div.Tensor: "Div",
    aten.div.Scalar: "Div",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
    aten.pow.Tensor_Scalar: "Pow",
    aten.pow.Tensor_Tensor: "Pow",
    aten.matmul.default: "MatMul",
    aten.bmm.default: "MatMul",
    aten.mm.default: "MatMul",
    aten._prelu_kernel.default: "PRelu",
}
LOGICAL = {
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
    aten.logical_xor.default: "Xor",
    aten.bitwise_and.Tensor: "And",
    aten.bitwise_or.Tensor: "Or",
}
COMPARE = {"ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less", "eq": "Equal", "ne": "Equal"}


@translates(*UNARY)
def _unary(e: Emitter, node: Node) -> ir.Value:
    return e.op(UNARY[node.target], e.value(node.args[0]))  # type: ignore[index]


@translates(*BINARY)
def _binary(e: Emitter, node: Node) -> ir.Value:
    a, b = e.pair(node)
    name = BINARY[node.target]  # type: ignore[index]
    return e.op("And" if name == "Mul" and node.meta["val"].dtype is torch.bool else name, a, b)


@translates(*LOGICAL)
def _logical(e: Emitter, node: Node) -> ir.Value | None:
    if "bitwise" in str(node.target) and node.meta["val"].dtype is not torch.bool:
        return None
    a, b = e.pair(node)
    return e.op(LOGICAL[node.target], a, b)  # type: ignore[index]


@translates(aten.logical_not.default, aten.bitwise_not.default)
def _not(e: Emitter, node: Node) -> ir.Value | None:
    if node.meta["val"].dtype is not torch.bool:
        return None
    return e.op("Not", e.cast(operand(node), torch.bool))


@translates(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(e: Emitter, node: Node) -> ir.Value | None:
    if node.meta["val"].dtype is torch.bool:
        return None
    a, b = e.pair(node)
    alpha = argument(node, 2, "alpha", 1)
    if alpha != 1:
        b = e.op("Mul", b, e.scalar(alpha, node))
    return e.op("Add" if "add" in str(node.target) else "Sub", a, b)


@translates(*(getattr(getattr(aten, name), kind) for name in COMPARE for kind in ("Scalar", "Tensor")))
def _compare(e: Emitter, node: Node) -> ir.Value:
    a, b = node.args[:2]
    dtype = torch.result_type(*(x.meta["val"] if isinstance(x, Node) else x for x in (a, b)))  # type: ignore
    values = [e.cast(x, dtype) if isinstance(x, Node) else e.number(x, dtype) for x in (a, b)]
    name = str(node.target).split(".")[1]
    if dtype is torch.bool and name not in ("eq", "ne"):
        values = [e.op("Cast", v, to=int(e.dtype(torch.int32))) for v in values]
    result = e.op(COMPARE[name], *values)
    return e.op("Not", result) if name == "ne" else result


@translates(aten.where.self)
def _where(e: Emitter, node: Node) -> ir.Value:
    condition, *branches = (operand(node, i) for i in range(3))
    return e.op("Where", e.cast(condition, torch.bool), *(e.cast(x, node.meta["val"].dtype) for x in branches))


@translates(aten.masked_fill.Scalar)
def _masked_fill(e: Emitter, node: Node) -> ir.Value:
    x, mask, number = node.args
    return e.op("Where", e.value(mask), e.scalar(number, node), e.value(x))


@translates(aten.softplus.default)
def _softplus(e: Emitter, node: Node) -> ir.Value | None:
    if argument(node, 1, "beta", 1) != 1 or argument(node, 2, "threshold", 20) != 20:
        return None
    return e.op("Softplus", e.value(node.args[0]))


@translates(aten.rsub.Scalar)
def _rsub(e: Emitter, node: Node) -> ir.Value:
    return e.op("Sub", e.scalar(node.args[1], node), e.value(node.args[0]))


@translates(aten.rsqrt.default)
def _rsqrt(e: Emitter, node: Node) -> ir.Value:
    return e.op("Reciprocal", e.op("Sqrt", e.value(node.args[0])))


@translates(aten.silu.default)
def _silu(e: Emitter, node: Node) -> ir.Value:
    x = e.value(node.args[0])
    return e.op("Mul", x, e.op("Sigmoid", x))


@translates(aten.gelu.default)
def _gelu(e: Emitter, node: Node) -> ir.Value:
    return e.op("Gelu", e.value(node.args[0]), approximate=node.kwargs.get("approximate", "none"))


@translates(aten.hardsigmoid.default)
def _hardsigmoid(e: Emitter, node: Node) -> ir.Value:
    return e.op("HardSigmoid", e.value(node.args[0]), alpha=1 / 6, beta=0.5)


@translates(aten.leaky_relu.default)
def _leaky_relu(e: Emitter, node: Node) -> ir.Value:
    return e.op("LeakyRelu", e.value(node.args[0]), alpha=float(argument(node, 1, "negative_slope", 0.01)))


@translates(aten.elu.default)
def _elu(e: Emitter, node: Node) -> ir.Value | None:
    if argument(node, 2, "scale", 1) != 1 or argument(node, 3, "input_scale", 1) != 1:
        return None
    return e.op("Elu", e.value(node.args[0]), alpha=float(argument(node, 1, "alpha", 1.0)))


@translates(
    aten.clamp.default, aten.hardtanh.default, aten.relu6.default, aten.clamp_min.default, aten.clamp_max.default
)
def _clamp(e: Emitter, node: Node) -> ir.Value:
    defaults = {aten.hardtanh.default: (-1.0, 1.0), aten.relu6.default: (0.0, 6.0)}.get(node.target, (None, None))  # type: ignore
    low, high = argument(node, 1, "min", defaults[0]), argument(node, 2, "max", defaults[1])
    if node.target is aten.clamp_max.default:
        low, high = None, node.args[1]
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    bounds = [e.scalar(v, node) if v is not None else None for v in (low, high)]
    return e.op("Clip", e.value(node.args[0]), *bounds)


@translates(aten._to_copy.default)
def _cast(e: Emitter, node: Node) -> ir.Value:
    return e.op("Cast", e.value(node.args[0]), to=int(e.dtype(node.meta["val"].dtype)))
