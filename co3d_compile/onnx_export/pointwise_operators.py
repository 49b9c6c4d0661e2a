"""From pointwise ATen operators to ONNX operators: each element of the result is computed by itself."""

from __future__ import annotations

from math import log

import onnx_ir as ir
import torch
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.onnx_export.emitter import DTYPES, TABLE, Emitter, declared, translates

aten = torch.ops.aten

TABLE.update(
    {
        aten.relu.default: declared("Relu"),
        aten.sigmoid.default: declared("Sigmoid"),
        aten.tanh.default: declared("Tanh"),
        aten.exp.default: declared("Exp"),
        aten.log.default: declared("Log"),
        aten.sqrt.default: declared("Sqrt"),
        aten.neg.default: declared("Neg"),
        aten.abs.default: declared("Abs"),
        aten.erf.default: declared("Erf"),
        aten.reciprocal.default: declared("Reciprocal"),
        aten.floor.default: declared("Floor"),
        aten.sin.default: declared("Sin"),
        aten.cos.default: declared("Cos"),
        aten.hardswish.default: declared("HardSwish"),
        aten.mish.default: declared("Mish"),
        aten.ceil.default: declared("Ceil"),
        aten.round.default: declared("Round"),
        aten.sign.default: declared("Sign"),
        aten.atan.default: declared("Atan"),
        aten.acos.default: declared("Acos"),
        aten.acosh.default: declared("Acosh"),
        aten.asin.default: declared("Asin"),
        aten.asinh.default: declared("Asinh"),
        aten.atanh.default: declared("Atanh"),
        aten.cosh.default: declared("Cosh"),
        aten.sinh.default: declared("Sinh"),
        aten.tan.default: declared("Tan"),
        aten.isnan.default: declared("IsNaN"),
        aten.selu.default: declared("Selu"),
        aten.gelu.default: declared("Gelu", approximate="approximate"),
        aten.hardsigmoid.default: declared("HardSigmoid", alpha=1 / 6, beta=0.5),
        aten.leaky_relu.default: declared("LeakyRelu", alpha="negative_slope"),
        aten.elu.default: declared("Elu", alpha="alpha", only={"scale": 1, "input_scale": 1}),
        aten.celu.default: declared("Celu", alpha="alpha"),
        aten.log10.default: lambda e, node: e.op("Div", e.op("Log", operand(node)), e.scalar(log(10), node)),
        aten.log2.default: lambda e, node: e.op("Div", e.op("Log", operand(node)), e.scalar(log(2), node)),
        aten.log1p.default: lambda e, node: e.op("Log", e.op("Add", operand(node), e.scalar(1, node))),
        aten.exp2.default: lambda e, node: e.op("Pow", e.scalar(2, node), operand(node)),
        aten.expm1.default: lambda e, node: e.op("Sub", e.op("Exp", operand(node)), e.scalar(1, node)),
        aten.square.default: lambda e, node: e.op("Mul", operand(node), operand(node)),
        aten.rsqrt.default: lambda e, node: e.op("Reciprocal", e.op("Sqrt", operand(node))),
        aten.silu.default: lambda e, node: e.op("Mul", operand(node), e.op("Sigmoid", operand(node))),
        aten.rsub.Scalar: lambda e, node: e.op("Sub", e.scalar(node.args[1], node), operand(node)),
        aten._to_copy.default: lambda e, node: e.op("Cast", operand(node), to=int(DTYPES[node.meta["val"].dtype])),
        aten.softplus.default: declared("Softplus", only={"beta": 1, "threshold": 20}),
    }
)
# Two operands in the dtype of the result.
BINARY: dict[Target, str] = {
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.div.Tensor: "Div",
    aten.div.Scalar: "Div",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
    aten.pow.Tensor_Scalar: "Pow",
    aten.pow.Tensor_Tensor: "Pow",
    aten.bmm.default: "MatMul",
    aten.mm.default: "MatMul",
    aten._prelu_kernel.default: "PRelu",
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
    aten.logical_xor.default: "Xor",
}
# The same, where the result is true or false.
OF_FLAGS: dict[Target, str] = {
    aten.mul.Scalar: "And",
    aten.mul.Tensor: "And",
    aten.bitwise_and.Tensor: "And",
    aten.bitwise_or.Tensor: "Or",
}
COMPARE = {"ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less", "eq": "Equal", "ne": "Equal"}
# The arguments that are the bounds of what is clipped, or the bounds themselves.
BOUNDS: dict[Target, tuple[str | float, str | float]] = {
    aten.clamp.default: ("min", "max"),
    aten.clip.default: ("min", "max"),
    aten.clamp_min.default: ("min", "max"),
    aten.clamp_max.default: ("min", "max"),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.relu6.default: (0.0, 6.0),
}


@translates(*BINARY, *OF_FLAGS)
def _binary(e: Emitter, node: Node) -> ir.Value | None:
    flags = node.meta["val"].dtype is torch.bool
    name = OF_FLAGS.get(node.target) if flags else None
    name = name or BINARY.get(node.target)
    return None if name is None else e.op(name, *e.pair(node))


@translates(aten.where.self)
def _where(e: Emitter, node: Node) -> ir.Value:
    return _chosen(e, node, e.typed(node.args[0], torch.bool), *e.pair(node, 1))


@translates(aten.masked_fill.Scalar)
def _masked_fill(e: Emitter, node: Node) -> ir.Value:
    return _chosen(e, node, e.typed(node.args[1], torch.bool), e.scalar(node.args[2], node), operand(node))


def _chosen(e: Emitter, node: Node, flag: ir.Value, a: ir.Value | Node, b: ir.Value | Node) -> ir.Value:
    """Writes ``a`` where a flag is set, else ``b``; ONNX Runtime has no choice between flags."""
    if node.meta["val"].dtype is not torch.bool:
        return e.op("Where", flag, a, b)
    return e.op("Or", e.op("And", flag, a), e.op("And", e.op("Not", flag), b))


@translates(aten.logical_not.default, aten.bitwise_not.default)
def _not(e: Emitter, node: Node) -> ir.Value | None:
    flags = node.meta["val"].dtype is torch.bool
    return e.op("Not", e.typed(operand(node), torch.bool)) if flags else None


@translates(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(e: Emitter, node: Node) -> ir.Value | None:
    if node.meta["val"].dtype is torch.bool:
        return None
    a, b = e.pair(node)
    alpha = Arguments(node).number("alpha")
    if alpha != 1:
        b = e.op("Mul", b, e.scalar(alpha, node))
    return e.op("Add" if "add" in str(node.target) else "Sub", a, b)


@translates(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(e: Emitter, node: Node) -> ir.Value | None:
    return None if node.meta["val"].dtype.is_floating_point else e.op("Mod", *e.pair(node))


@translates(*(getattr(getattr(aten, name), kind) for name in COMPARE for kind in ("Scalar", "Tensor")))
def _compare(e: Emitter, node: Node) -> ir.Value:
    operands = node.args[:2]
    dtype = torch.result_type(*(x.meta["val"] if isinstance(x, Node) else x for x in operands))  # type: ignore
    values = [e.typed(x, dtype) for x in operands]
    name = str(node.target).split(".")[1]
    if dtype is torch.bool and name not in ("eq", "ne"):
        values = [e.op("Cast", v, to=int(DTYPES[torch.int32])) for v in values]
    result = e.op(COMPARE[name], *values)
    return e.op("Not", result) if name == "ne" else result


@translates(*BOUNDS)
def _clamp(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    bounds = [given.given(b) if isinstance(b, str) else b for b in BOUNDS[node.target]]
    if None in bounds and node.meta["val"].dtype is torch.int64:  # of a Clip with one bound OpenVINO makes 0
        (bound,) = (b for b in bounds if b is not None)
        return e.op("Min" if bounds[0] is None else "Max", operand(node), e.scalar(bound, node))
    return e.op("Clip", operand(node), *(None if b is None else e.scalar(b, node) for b in bounds))
