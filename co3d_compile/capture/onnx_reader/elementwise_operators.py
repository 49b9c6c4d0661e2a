"""Operators on each element: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, Result, Value, reads, torch_dtype

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
WITH_ALPHA: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "Celu": (F.celu, 1.0),
    "Elu": (F.elu, 1.0),
    "LeakyRelu": (F.leaky_relu, 0.01),
    "Swish": (lambda x, alpha: F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x), 1.0),
    "ThresholdedRelu": (lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), 1.0),
}
"""Activations with a parameter ``alpha``, and what it is where the file does not say."""
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
    "Mean": torch.add,
}


def _old_broadcast(call: NodeCall, x: Tensor, y: Tensor) -> Tensor:
    """Aligns ``y`` as operator sets before 7 do: its first dim is the dim ``axis`` of ``x``."""
    if call.opset >= 7 or not call.has("axis"):
        return y
    return y.reshape([*y.shape, *[1] * (x.dim() - call.integer("axis", 0) - y.dim())])


def _enter_tables() -> None:
    for name, unary in UNARY.items():
        reads(name)(lambda call, x, function=unary: function(x))
    for name, (activation, default) in WITH_ALPHA.items():
        reads(name)(lambda call, x, function=activation, default=default: function(x, call.number("alpha", default)))
    for name, binary in BINARY.items():
        reads(name)(lambda call, x, y, function=binary: function(x, _old_broadcast(call, x, y)))
    for name, pairwise in VARIADIC.items():
        reads(name)(lambda call, *xs, function=pairwise: _folded(call, function, xs))


def _folded(call: NodeCall, function: Callable[[Tensor, Tensor], Tensor], xs: tuple[Tensor, ...]) -> Tensor:
    total = reduce(function, xs)
    return total / len(xs) if call.node.op_type == "Mean" else total


_enter_tables()


@reads("Div")
def divide(call: NodeCall, x: Tensor, y: Tensor) -> Tensor:
    """Divides; whole numbers towards zero."""
    y = _old_broadcast(call, x, y)
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@reads("Mod")
def modulo(call: NodeCall, x: Tensor, y: Tensor) -> Tensor:
    """Gives what is left of a division: with the sign of the divisor, or with ``fmod`` of the dividend."""
    return torch.fmod(x, y) if call.integer("fmod", 0) else torch.remainder(x, y)


@reads("Pow")
def power(call: NodeCall, x: Tensor, y: Tensor) -> Tensor:
    """Raises to a power. The result has the dtype of the base."""
    return torch.pow(x, _old_broadcast(call, x, y).to(x.dtype) if x.is_floating_point() else y).to(x.dtype)


@reads("BitShift")
def bit_shift(call: NodeCall, x: Tensor, y: Tensor) -> Tensor:
    """Shifts bits to the left or to the right."""
    if call.text("direction", "") == "LEFT":
        return torch.bitwise_left_shift(x, y)
    return torch.bitwise_right_shift(x, y)


@reads("IsInf")
def is_infinite(call: NodeCall, x: Tensor) -> Tensor:
    """Finds infinities, of both signs or of one."""
    positive, negative = call.integer("detect_positive", 1), call.integer("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    return (
        (x == float("inf")) if positive else (x == -float("inf")) if negative else torch.zeros_like(x, dtype=torch.bool)
    )


@reads("Where")
def where(call: NodeCall, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Chooses element by element."""
    return torch.where(condition, x, y)


@reads("Clip")
def clip(call: NodeCall, x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    """Limits to a range; before operator set 11 the limits are attributes."""
    if call.opset < 11:
        low = call.number("min", 0.0) if call.has("min") else None
        high = call.number("max", 0.0) if call.has("max") else None
        return x if low is None and high is None else torch.clamp(x, low, high)
    if least is not None:
        x = torch.maximum(x, least)
    return torch.minimum(x, most) if most is not None else x


@reads("Cast", "CastLike")
def cast(call: NodeCall, x: Tensor, like: Tensor | None = None) -> Tensor:
    """Converts to another dtype."""
    return x.to(torch_dtype(call.integer("to", 1)) if like is None else like.dtype)


@reads("Selu")
def selu(call: NodeCall, x: Tensor) -> Tensor:
    """Computes the scaled exponential linear unit."""
    alpha = call.number("alpha", 1.6732631921768188)
    gamma = call.number("gamma", 1.0507010221481323)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


@reads("HardSigmoid")
def hard_sigmoid(call: NodeCall, x: Tensor) -> Tensor:
    """Computes a sigmoid of three straight pieces."""
    return torch.clamp(x * call.number("alpha", 0.2) + call.number("beta", 0.5), 0.0, 1.0)


@reads("Shrink")
def shrink(call: NodeCall, x: Tensor) -> Tensor:
    """Moves numbers towards zero, and those near it onto zero."""
    bias, lambd = call.number("bias", 0.0), call.number("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


@reads("Gelu")
def gelu(call: NodeCall, x: Tensor) -> Tensor:
    """Computes the Gaussian error linear unit."""
    return F.gelu(x, approximate=call.text("approximate", "none"))


@reads("Dropout", host=(1, 2))
def dropout(call: NodeCall, x: Tensor, ratio: Value = None, training: Value = None) -> Result:
    """Passes its input on: a clip model drops nothing. The second output says what was kept."""
    if isinstance(training, np.ndarray) and bool(training.reshape(-1)[0]):
        raise call.refuse("is in training mode", "Export the model in eval mode.")
    return (x, torch.ones_like(x, dtype=torch.bool)) if len(call.node.outputs) > 1 else x


@reads("Softmax", "LogSoftmax", "Hardmax")
def softmax(call: NodeCall, x: Tensor) -> Tensor:
    """Computes a softmax over one dim; before operator set 13 over all dims from ``axis`` on, as one."""
    axis = call.integer("axis", -1 if call.opset >= 13 else 1)
    flat = x
    if call.opset < 13 and axis % max(x.dim(), 1) != x.dim() - 1:
        flat, axis = x.flatten(axis % x.dim()), -1
    if call.node.op_type == "Hardmax":
        best = flat.argmax(axis, keepdim=True)
        result = torch.zeros_like(flat).scatter(axis, best, 1.0)
    else:
        result = (torch.softmax if call.node.op_type == "Softmax" else torch.log_softmax)(flat, axis)
    return result.reshape(x.shape) if flat is not x else result
