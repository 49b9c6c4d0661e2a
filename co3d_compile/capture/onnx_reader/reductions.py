"""Reductions over dims, cumulative sums, and searches for the largest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import NodeCall, Value, reads, whole_numbers

REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, dims, keep: x.mean(dims, keep),
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keep, dtype=x.dtype),
    "ReduceMax": lambda x, dims, keep: _by_values(torch.amax, x, dims, keep),
    "ReduceMin": lambda x, dims, keep: _by_values(torch.amin, x, dims, keep),
    "ReduceL1": lambda x, dims, keep: x.abs().sum(dims, keep, dtype=x.dtype),
    "ReduceL2": lambda x, dims, keep: x.square().sum(dims, keep, dtype=x.dtype).sqrt(),
    "ReduceSumSquare": lambda x, dims, keep: x.square().sum(dims, keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, dims, keep: x.sum(dims, keep).log(),
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keep),
}


def _by_values(function: Callable[..., Tensor], x: Tensor, dims: list[int], keep: bool) -> Tensor:
    """Reduces by a function that has no kernel for truth values."""
    return function(x.to(torch.uint8), dims, keep).to(x.dtype) if x.dtype is torch.bool else function(x, dims, keep)


def _reduced_dims(call: NodeCall, x: Tensor, axes: Value) -> list[int] | None:
    """Reads the dims that a reduction covers; None where there are none to cover."""
    dims = call.dims(axes)
    if dims is None or not dims:
        return None if call.integer("noop_with_empty_axes", 0) else list(range(x.dim()))
    return [d % x.dim() for d in dims]


def _enter_tables() -> None:
    for name, function in REDUCE.items():

        def reduced(
            call: NodeCall, x: Tensor, axes: Value = None, *, function: Callable[..., Tensor] = function
        ) -> Tensor:
            dims = _reduced_dims(call, x, axes)
            keep = bool(call.integer("keepdims", 1))
            if dims is None:  # each element by itself: the absolute value, the square
                return function(x.unsqueeze(-1), [-1], False)
            return function(x, [] if x.dim() == 0 else dims, keep)

        reads(name, host=(1,))(reduced)


_enter_tables()


@reads("ReduceProd", host=(1,))
def product(call: NodeCall, x: Tensor, axes: Value = None) -> Tensor:
    """Multiplies over dims, one after the other."""
    dims, keep = _reduced_dims(call, x, axes), bool(call.integer("keepdims", 1))
    for dim in sorted(dims or [], reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


@reads("ArgMax", "ArgMin")
def arg_extreme(call: NodeCall, x: Tensor) -> Tensor:
    """Finds where the largest or the smallest entry is: the first one, or the last."""
    dim, keep = call.integer("axis", 0), bool(call.integer("keepdims", 1))
    find = torch.argmax if call.node.op_type == "ArgMax" else torch.argmin
    if call.integer("select_last_index", 0):
        return x.shape[dim] - 1 - find(x.flip(dim), dim, keepdim=keep)
    return find(x, dim, keepdim=keep)


@reads("CumSum", host=(1,))
def cumulative_sum(call: NodeCall, x: Tensor, axis: Value) -> Tensor:
    """Adds up along a dim."""
    dim = whole_numbers(axis)[0]
    backwards = bool(call.integer("reverse", 0))
    x = x.flip(dim) if backwards else x
    total = x.cumsum(dim, dtype=x.dtype)
    total = total - x if call.integer("exclusive", 0) else total
    return total.flip(dim) if backwards else total


@reads("TopK", host=(1,))
def top_k(call: NodeCall, x: Tensor, k: Value = None) -> tuple[Tensor, ...]:
    """Finds the k largest or smallest entries, and where they are."""
    count = whole_numbers(k)[0] if k is not None else call.integer("k", 1)
    dim, largest = call.integer("axis", -1), bool(call.integer("largest", 1))
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)  # of equal entries the first ones
    return values.narrow(dim, 0, count), indices.narrow(dim, 0, count)
