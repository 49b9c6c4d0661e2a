"""Recurrent layers: ``LSTM``, ``GRU`` and ``RNN`` in all directions, with initial states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import Host, NodeCall, reads
from co3d_compile.capture.onnx_reader.recurrent_cells import USUAL, activation_names, by_steps

GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""Where PyTorch's gates stand among those of ONNX: (i, o, f, c) against (i, f, g, o); (z, r, h) against (r, z, n)."""


@reads("LSTM", "GRU", "RNN", host=(4,))
def recurrent(
    call: NodeCall, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | Host | None = None,
    h: Tensor | None = None, c: Tensor | None = None, peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Runs a recurrent layer over (T, N, C), or over (N, T, C) where ``layout`` is 1.

    Returns:
        All hidden states (T, directions, N, H), the last one (directions, N, H) and of an LSTM the last cell.
    """
    kind, direction = call.node.op_type, call.text("direction", "forward")
    _check(call, lengths, x)
    first = bool(call.integer("layout", 0))
    if first:
        x = x.transpose(0, 1)
        h, c = (s.transpose(0, 1) if s is not None else None for s in (h, c))
    steps, batch, _ = x.shape
    size, directions = r.shape[2], r.shape[0]
    zero = x.new_zeros(directions, batch, size)
    h, c = (zero if s is None else s if s.shape[1] == batch else s.expand(zero.shape) for s in (h, c))
    x = x.flip(0) if direction == "reverse" else x
    if _is_pytorch_layer(call, peepholes, directions):
        ys, last, cell = _layer(kind, call, x, _weights(kind, w, r, b), h, c, b is not None)
    else:
        ys, states = by_steps(call, x, (w, r, b, peepholes), (h, c) if kind == "LSTM" else (h,))
        last, cell = states[0], states[1] if kind == "LSTM" else None
    y = ys.reshape(steps, batch, directions, size).transpose(1, 2)
    y = y.flip(0) if direction == "reverse" else y
    if first:
        y, last = y.permute(2, 0, 1, 3), last.transpose(0, 1)
        cell = cell.transpose(0, 1) if cell is not None else None
    return (y, last) if cell is None else (y, last, cell)


def _check(call: NodeCall, lengths: Tensor | Host | None, x: Tensor) -> None:
    steps = x.shape[1 if call.integer("layout", 0) else 0]
    if lengths is not None and any(int(n) != steps for n in lengths.reshape(-1)):
        raise call.refuse("is given rows of different lengths")


def _is_pytorch_layer(call: NodeCall, peepholes: Tensor | None, directions: int) -> bool:
    """Says whether a layer of PyTorch computes the same."""
    kind, names = call.node.op_type, activation_names(call, directions)
    usual = names == USUAL[kind] * directions or (kind == "RNN" and set(names) == {"relu"})
    own = call.number("clip", 0.0) or call.integer("input_forget", 0) or peepholes is not None
    return usual and not own and (kind != "GRU" or bool(call.integer("linear_before_reset", 0)))


def _weights(kind: str, w: Tensor, r: Tensor, b: Tensor | None) -> list[Tensor]:
    """Orders the weights of each direction as PyTorch does."""
    order, weights = GATES[kind], []
    for d in range(w.shape[0]):
        sets = [w[d], r[d]] if b is None else [w[d], r[d], *b[d].chunk(2)]
        for t in sets:
            gates = t.chunk(len(order))
            weights.append(torch.cat([gates[i] for i in order]) if len(order) > 1 else t)
    return weights


def _layer(
    kind: str, call: NodeCall, x: Tensor, weights: list[Tensor], h: Tensor, c: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    both = h.shape[0] == 2
    if kind == "LSTM":
        ys, last, cell = torch.lstm(x, [h, c], weights, bias, 1, 0.0, False, both, False)
        return ys, last, cell
    relu = "relu" in activation_names(call, h.shape[0])
    run: Callable[..., tuple[Tensor, Tensor]] = (
        torch.gru if kind == "GRU" else torch.rnn_relu if relu else torch.rnn_tanh
    )
    ys, last = run(x, h, weights, bias, 1, 0.0, False, both, False)
    return ys, last, None
