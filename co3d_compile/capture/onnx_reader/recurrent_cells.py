"""Recurrent cells of ONNX that PyTorch's own layers cannot express, frame by frame.

The file names their activations, ties or limits gates, shows the cell to them through peepholes, or has a GRU that
resets its state before the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall

Activation: TypeAlias = "Callable[[Tensor], Tensor]"
State: TypeAlias = "tuple[Tensor, ...]"
"""The hidden state, and of an LSTM the cell behind it."""

PLAIN: dict[str, Activation] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softsign": F.softsign, "softplus": F.softplus,
}  # fmt: skip
SCALED: dict[str, tuple[float, Callable[[Tensor, float], Tensor]]] = {
    "leakyrelu": (0.01, F.leaky_relu),
    "thresholdedrelu": (1.0, lambda x, a: torch.where(x > a, x, torch.zeros_like(x))),
    "elu": (1.0, F.elu),
}
"""Activations with one number, and what it is where the file gives none."""
SHIFTED: dict[str, tuple[float, float, Callable[[Tensor, float, float], Tensor]]] = {
    "affine": (1.0, 0.0, lambda x, a, b: a * x + b),
    "scaledtanh": (1.0, 1.0, lambda x, a, b: a * torch.tanh(b * x)),
    "hardsigmoid": (0.2, 0.5, lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0)),
}
"""Activations with two numbers."""
USUAL = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


def activation_names(call: NodeCall, directions: int) -> list[str]:
    """Reads the activations of all directions, in lower case; the standard's where the file names none."""
    return [name.lower() for name in call.texts("activations")] or USUAL[call.node.op_type] * directions


def _activations(call: NodeCall, directions: int) -> list[Activation]:
    """Makes the functions. Their numbers stand in two lists, and each takes the next ones that it needs."""
    alphas, betas = iter(call.numbers("activation_alpha")), iter(call.numbers("activation_beta"))
    return [_activation(call, name, alphas, betas) for name in activation_names(call, directions)]


def _activation(call: NodeCall, name: str, alphas: Iterator[float], betas: Iterator[float]) -> Activation:
    if name in PLAIN:
        return PLAIN[name]
    if name in SCALED:
        usual, scaled = SCALED[name]
        alpha = next(alphas, usual)
        return lambda x: scaled(x, alpha)
    if name not in SHIFTED:
        raise call.refuse(f"has the activation {name}")
    first, second, shifted = SHIFTED[name]
    a, b = next(alphas, first), next(betas, second)
    return lambda x: shifted(x, a, b)


@dataclass(frozen=True)
class Cell:
    """The weights of one direction, and how its gates are computed.

    Attributes:
        call: The node.
        functions: The activations.
        w: The weights of the input; of all gates, joined along the rows, as are the others.
        r: Those of the state.
        wb: The bias of the input.
        rb: The bias of the state.
        peepholes: The weights by which the gates of an LSTM see the cell.
    """

    call: NodeCall
    functions: Sequence[Activation]
    w: Tensor
    r: Tensor
    wb: Tensor | None
    rb: Tensor | None
    peepholes: Tensor | None

    def step(self, x: Tensor, state: State) -> State:
        """Computes the next state."""
        steps = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}
        return steps[self.call.node.op_type](x, state)

    def _limited(self, x: Tensor) -> Tensor:
        limit = self.call.number("clip", 0.0)
        return torch.clamp(x, -limit, limit) if limit else x

    def _rnn(self, x: Tensor, state: State) -> State:
        return (self.functions[0](self._limited(F.linear(x, self.w, self.wb) + F.linear(state[0], self.r, self.rb))),)

    def _lstm(self, x: Tensor, state: State) -> State:
        f, g, h = self.functions
        i, o, t, c = (F.linear(x, self.w, self.wb) + F.linear(state[0], self.r, self.rb)).chunk(4, -1)
        if self.peepholes is not None:
            pi, po, pf = self.peepholes.chunk(3)
            i, t = i + pi * state[1], t + pf * state[1]
        i = f(self._limited(i))
        forget = 1 - i if self.call.integer("input_forget", 0) else f(self._limited(t))
        cell = forget * state[1] + i * g(self._limited(c))
        o = o if self.peepholes is None else o + po * cell
        return f(self._limited(o)) * h(cell), cell

    def _gru(self, x: Tensor, state: State) -> State:
        f, g = self.functions
        xz, xr, xh = F.linear(x, self.w, self.wb).chunk(3, -1)
        rz, rr, rh = self.r.chunk(3)
        bz, br, bh = (None, None, None) if self.rb is None else self.rb.chunk(3)
        z = f(self._limited(xz + F.linear(state[0], rz, bz)))
        reset = f(self._limited(xr + F.linear(state[0], rr, br)))
        after = self.call.integer("linear_before_reset", 0)
        new = reset * F.linear(state[0], rh, bh) if after else F.linear(reset * state[0], rh, bh)
        return ((1 - z) * g(self._limited(xh + new)) + z * state[0],)


def by_steps(
    call: NodeCall, x: Tensor, weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None], start: State
) -> tuple[Tensor, State]:
    """Runs a layer frame by frame over (T, N, C).

    Args:
        call: The node.
        x: The series.
        weights: Of the input, of the state, the biases and the peepholes; of all directions, as ONNX has them.
        start: The states at the start, (directions, N, H).

    Returns:
        All hidden states (T, N, directions * H), and the states at the end.
    """
    w, r, b, peepholes = weights
    directions = w.shape[0]
    functions = _activations(call, directions)
    each = len(functions) // directions
    every: list[Tensor] = []
    lasts: list[State] = []
    for d in range(directions):
        wb, rb = (None, None) if b is None else b[d].chunk(2)
        seen = None if peepholes is None else peepholes[d]
        cell = Cell(call, functions[d * each : (d + 1) * each], w[d], r[d], wb, rb, seen)
        state, rows = tuple(s[d] for s in start), []
        for entry in (x.flip(0) if d else x).unbind(0):
            state = cell.step(entry, state)
            rows.append(state[0])
        ys = torch.stack(rows)
        every.append(ys.flip(0) if d else ys)
        lasts.append(state)
    return torch.cat(every, -1), tuple(torch.stack(s) for s in zip(*lasts, strict=True))
