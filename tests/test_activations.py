"""Every pointwise operator has the numbers of the network, constants of its definition included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from marks import few
from oracle import check
from small_graphs import entry, fn
from torch import Tensor

ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "mish": F.mish,
    "selu": F.selu,
    "silu": F.silu,
    "elu": lambda x: F.elu(x, 0.7),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "erf": torch.erf,
    "sine": lambda x: torch.sin(x) * torch.cos(x) + torch.atan(x),
    "roots": lambda x: x.abs().sqrt() + (x * x + 0.1).rsqrt() + (x.abs() + 1).reciprocal(),
    "exponentials": lambda x: x.clamp(-3, 3).exp() + (x.abs() + 1).log() - x.neg(),
    "whole numbers": lambda x: x.floor() + 2 * x.ceil() + 4 * x.round() + 8 * x.sign(),
    "powers": lambda x: x**3 + x.abs() ** 1.5,
    "logarithms": lambda x: x.abs().log1p() + (x.abs() + 1).log2() + (x.abs() + 1).log10() + x.clamp(max=1).expm1(),
    "squares": lambda x: torch.exp2(x.clamp(-2, 2)) + x.square() + F.celu(x, 0.7),
    "angles": lambda x: torch.acos(x.tanh()) + torch.asin(x.tanh()) + torch.acosh(x.abs() + 1) + torch.asinh(x),
    "hyperbolic": lambda x: torch.atanh(0.9 * x.tanh()) + x.tanh().cosh() + x.tanh().sinh() + x.tanh().tan(),
    "less": lambda x: 3 - x * 2 - x.clip(-0.5),
    "lengths": lambda x: torch.hypot(x, x + 1) + torch.copysign(x + 2, x),
    "distances to a table": lambda x: torch.cdist(x.mT, torch.eye(x.shape[1])).mT,
}
TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the larger": torch.maximum,
    "the smaller": torch.minimum,
    "a part of it": lambda x, y: torch.add(x, y, alpha=0.3) - torch.sub(y, x, alpha=0.2),
    "quotient": lambda x, y: x / (y.abs() + 1),
    "chosen": lambda x, y: torch.where(x > y, x, 2 * y),
    "compared": lambda x, y: (x >= y).float() + 2 * (x < y) + 4 * (x <= 0) + 8 * (y != x) + 16 * (x == y),
    "flags": lambda x, y: ((x > 0) & (y > 0) | ~(x > 1)).float(),
    "joined with flags": lambda x, y: torch.cat([x, y > 0], 1),
    "whole remainders": lambda x, y: (
        (4 * x).int() % 3 + (4 * y).long() % -5 + (4 * x).int() % ((2 * y).int().abs() + 1)
    ).float(),
    "whole sums": lambda x, y: x + (4 * y).int().sum(1, keepdim=True, dtype=torch.int32),
    "filled in": lambda x, y: x.masked_fill(y > 0, -2.0),
}
ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus of another slope": lambda x: F.softplus(x, beta=2.0, threshold=4.0),
    "logsigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.3, -1.0),
    "remainders": lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.9) + torch.div(x, 0.4, rounding_mode="floor"),
    "powers": lambda x: 2.0 ** x.clamp(-2, 2),
    "between": lambda x: torch.lerp(x, x.flip(1), 0.3) + ((x > 1) ^ (x.flip(1) < -1)),
    "arc": lambda x: torch.atan2(x, x.flip(1).abs() + 0.5) + x.trunc(),
}
"""By PyTorch's own exporter, one after the other."""


KINDS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "one operand": lambda x: [f(2 * x) for f in ONE.values()],
    "two operands": lambda x: [f(x, x.flip(1)) for f in TWO.values()],
    "elsewhere": lambda x: [f(2 * x) for f in ELSEWHERE.values()],
}


@pytest.mark.parametrize("kind", few(KINDS, "one operand", "two operands"))
def test_numbers_are_those_of_the_network(kind: str) -> None:
    facts = check(entry(kind, fn(lambda m, x: torch.cat(KINDS[kind](x), 1))))
    assert not facts.recomputed and facts.delays == (0,)
