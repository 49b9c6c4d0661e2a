"""Decompositions of our own, for operators of which PyTorch's say nothing, or hide what they do to time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from types import NotImplementedType
from typing import TypeAlias

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.fx.node import Argument

from co3d_compile.ir.aten_operators import EXACT_OVERLOADS
from co3d_compile.ir.node_reading import Operator
from co3d_compile.rules import RULES, is_pointwise

aten = torch.ops.aten
_NONE = -1  # in place of a dim

Table: TypeAlias = dict[OpOverload, Operator]
Result: TypeAlias = Tensor | NotImplementedType


def stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Computes ``torch.stack`` on a dim of its own.

    PyTorch's joins along the dim that is there, often time, and splits it.
    """
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``nn.Bilinear``, of which PyTorch makes an operator that ONNX has not, as a linear layer and a sum."""
    outs, ins, _ = weight.shape
    of_b = torch.nn.functional.linear(b, weight.flatten(0, 1))
    result = (of_b.reshape(*b.shape[:-1], outs, ins) * a.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *_flags: bool,
) -> Tensor:
    """Computes ``aten._convolution``, which TorchScript runs, without the backend's flags behind its ``groups``."""
    return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Computes ``aten.copy``: the source in the dtype and shape of a tensor of which no number is read."""
    cast = source if source.dtype == into.dtype else aten._to_copy.default(source, dtype=into.dtype)
    return cast if cast.shape == into.shape else cast.expand(into.shape)


def unwritten(size: Sequence[int], *args: Argument, dtype: torch.dtype | None = None, **kwargs: Argument) -> Tensor:
    """Computes a tensor that is to be written over as zeros: what it holds must not matter."""
    return torch.zeros(list(size), dtype=dtype)


def masked(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Result:
    """Computes ``x[mask] = 0``, one number wherever a mask is true, as a choice between this number and x."""
    masks = [index for index in indices if index is not None]
    one = all(isinstance(size, int) and size == 1 for size in values.shape)
    if accumulate or not one or len(masks) != 1 or masks[0].dtype is not torch.bool:
        return NotImplemented
    behind = x.dim() - (len(indices) - 1) - masks[0].dim()
    number = values.squeeze() if values.dim() else values
    return torch.where(masks[0].reshape(*masks[0].shape, *[1] * behind), number, x)


def strided(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Result:
    """Computes ``as_strided`` as slices, and windows of slices, along the dims that its strides are multiples of.

    In a step a tensor has other strides, so that the numbers it is called with would mean something else. There is none
    where it walks from one dim into one that does not lie beside it in memory, or three times along one dim.
    """
    if not all(isinstance(number, int) for number in (*x.shape, *x.stride(), *size, *stride)):
        return NotImplemented
    result = _along_dims(x, size, stride, storage_offset)
    for d in range(x.dim() - 1):
        if result is NotImplemented and x.stride(d) == x.stride(d + 1) * x.shape[d + 1]:
            result = _along_dims(x.flatten(d, d + 1), size, stride, storage_offset)
    return result


def _along_dims(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None) -> Result:
    """Computes :func:`strided` where no walk goes from one dim into another; else returns NotImplemented."""
    start = 0 if storage_offset is None else storage_offset - int(x.storage_offset())
    strides: tuple[int, ...] = x.stride()
    walks: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # dim of x: dims of the result, entries, steps
    dims = sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=lambda d: -strides[d])
    for i, (entries, distance) in enumerate(zip(size, stride, strict=True)):
        if entries == 1 and i < x.dim() and x.shape[i] == 1:
            walks[i].append((i, 1, 1))
        elif entries > 1 and distance:
            d = next((d for d in dims if 0 < strides[d] <= distance and distance % strides[d] == 0), None)
            if d is None:
                return NotImplemented
            walks[d].append((i, entries, distance // strides[d]))
    starts = dict.fromkeys(range(x.dim()), 0)
    for d in dims:
        if strides[d]:
            starts[d], start = divmod(start, strides[d])
    outside = start or min(starts.values(), default=0) < 0
    if outside or any(starts[d] + sum((n - 1) * s for _, n, s in walks[d]) >= x.shape[d] for d in starts):
        return NotImplemented
    if any(len(walk) > 2 for walk in walks.values()):
        return NotImplemented
    return _walked(x, [starts[d] for d in range(x.dim())], walks, size)


def _walked(x: Tensor, starts: list[int], walks: dict[int, list[tuple[int, int, int]]], size: Sequence[int]) -> Tensor:
    places: list[int] = []  # the dim of the result that each dim of x has become
    behind: list[int] = []
    for d, start in enumerate(starts):
        farthest = sorted(walks[d], key=lambda walk: (1 - walk[1]) * walk[2])  # blocks reach farther than a block
        (place, entries, step), *more = farthest or [(_NONE, 1, 1)]
        places.append(place)
        span = (entries - 1) * step + 1
        if more:
            inner, count, apart = more[0]
            behind.append(inner)
            firsts = [start + i * apart for i in range(count)]
            x = torch.cat([aten.slice.Tensor(x, d, first, first + span, step).unsqueeze(-1) for first in firsts], -1)
        else:
            x = aten.slice.Tensor(x, d, start, start + span, step)
    places += behind
    left = [d for d, place in enumerate(places) if place == _NONE]
    x = x.squeeze(left) if left else x
    there = [place for place in places if place != _NONE]
    x = x if there == sorted(there) else x.permute([there.index(i) for i in sorted(there)])
    for i in range(len(size)):
        x = x if i in there else x.unsqueeze(i)
    return x.expand(list(size))


def overlapped(grad: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Result:
    """Computes ``unfold_backward``, as in ``istft``, of values for each row.

    PyTorch writes it in another way where the values are the same for all rows of a batch.
    """
    written = decomposition_table[aten.unfold_backward.default]
    d = dim % max(len(input_sizes), 1)
    rows = [*input_sizes[:d], grad.shape[d], *input_sizes[d + 1 :], size]
    return written(grad.expand(rows) if grad.dim() == len(rows) else grad, input_sizes, dim, size, step)


def counted(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """Computes ``bucketize`` by counting the boundaries below each number. PyTorch's is no operator of ONNX."""
    below = ~(boundaries > x.unsqueeze(-1)) if right else ~(boundaries >= x.unsqueeze(-1))
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def searched(
    boundaries: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """Computes ``searchsorted``, of one row of boundaries or a row for each row of x, in the same way."""
    boundaries = boundaries if sorter is None else boundaries.gather(-1, sorter)
    rows = boundaries if boundaries.dim() == 1 else boundaries.unsqueeze(-2)
    return counted(x, rows, out_int32=out_int32, right=right or side == "right")


def unpooled(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Computes ``max_unpool2d`` as writes into each picture; PyTorch's counts through all pictures of the batch."""
    picture = x.new_zeros([*x.shape[:-2], size[0] * size[1]])
    return picture.scatter(-1, indices.flatten(-2), x.flatten(-2)).unflatten(-1, list(size))


def distances(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """Computes ``cdist`` from the differences of all pairs of rows. ONNX has no operator for it."""
    apart = a.unsqueeze(-2) - b.unsqueeze(-3)
    return torch.linalg.vector_norm(apart, p, -1)


def hypotenuse(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``hypot``, which ONNX has not."""
    return (a * a + b * b).sqrt()


def with_sign(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``copysign``, which ONNX has not; zeros have no sign here."""
    return torch.where(b < 0, -a.abs(), a.abs())


OURS: Table = {
    aten._convolution.default: convolution,
    aten.stack.default: stacked,
    aten._cdist_forward.default: distances,
    aten.hypot.default: hypotenuse,
    aten.copysign.Tensor: with_sign,
    aten.bilinear.default: bilinear,
    aten.as_strided.default: strided,
    aten.copy.default: copied,
    aten.empty.memory_format: unwritten,
    aten.empty_permuted.default: unwritten,
    aten.empty_strided.default: unwritten,
    aten.unfold_backward.default: overlapped,
    aten.index_put.default: masked,
    aten.bucketize.Tensor: counted,
    aten.searchsorted.Tensor: searched,
    aten.max_unpool2d.default: unpooled,
}

# Kept whole beside the operators that have a rule: they are rewritten by a pass, or have an ONNX operator of their own.
KEEP = {
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    aten.scaled_dot_product_attention.default,
    aten.im2col.default,
    aten.select_scatter.default,
    *EXACT_OVERLOADS,
}

DECOMPOSITIONS: Table = {}
"""What takes the place of users' own operators when a model is captured."""


def decompositions() -> Table:
    """Lists PyTorch's own decompositions, less the operators that have a rule of their own."""
    composite = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    return {**_of_others(frozenset(composite), frozenset(RULES)), **OURS, **DECOMPOSITIONS}


@lru_cache(maxsize=1)
def _of_others(composite: frozenset[str], ruled: frozenset[OpOverload]) -> Table:
    """Finds those of operators without a rule: to ask for each is a tenth of the time of a small network.

    Args:
        composite: See :func:`_defaults`.
        ruled: The operators with a rule.
    """
    whole = ruled | KEEP
    return {o: f for o, f in _defaults(composite).items() if o not in whole and not is_pointwise(o)}


@lru_cache(maxsize=1)
def _defaults(composite: frozenset[str]) -> Table:
    """Lists PyTorch's own decompositions.

    It looks through all operators for them, a tenth of the time of a small network.

    Args:
        composite: The names of the operators that are made of others: a library may add to them at any time.
    """
    return dict(torch.export.default_decompositions().items())
