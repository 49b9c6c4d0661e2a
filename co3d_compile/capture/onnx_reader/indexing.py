"""Gathers and scatters, and what selects by indices."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import Host, NodeCall, Value, as_tensor, reads, whole_numbers

REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@reads("Gather")
def gather(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    """Takes entries of a dim: one, some, or as many as a tensor of indices has."""
    axis = call.integer("axis", 0) % x.dim()
    constant = call.known(1)
    if constant is not None and constant.ndim == 0:
        return x.select(axis, int(constant))
    indices = as_tensor(constant % x.shape[axis]) if constant is not None else indices
    if constant is None:
        indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if axis == 0 and x.dim() == 2 and call.is_constant(0):
        return F.embedding(indices, x)
    if indices.dim() == 1:
        return x.index_select(axis, indices)
    rows = x.index_select(axis, indices.reshape(-1))
    return rows.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _from_front(indices: Tensor, size: int) -> Tensor:
    """Indices that count from the end, counted from the front."""
    return torch.where(indices < 0, indices + size, indices)


@reads("GatherElements")
def gather_elements(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    """Takes an entry of a dim for each element of the result."""
    axis = call.integer("axis", 0)
    return torch.gather(x, axis, _from_front(indices, x.shape[axis]).long())


@reads("GatherND")
def gather_nd(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    """Takes slices by tuples of indices."""
    batch = call.integer("batch_dims", 0)
    lead = [
        torch.arange(x.shape[d]).reshape([-1 if i == d else 1 for i in range(indices.dim() - 1)]) for d in range(batch)
    ]
    return x[(*lead, *indices.long().unbind(-1))]


@reads("ScatterElements", "Scatter")
def scatter_elements(call: NodeCall, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Writes elements to places along a dim."""
    axis, how = call.integer("axis", 0), call.text("reduction", "none")
    indices = _from_front(indices, x.shape[axis]).long()
    if how == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, REDUCTIONS[how])


@reads("ScatterND")
def scatter_nd(call: NodeCall, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Writes slices to places that tuples of indices name."""
    how = call.text("reduction", "none")
    known = call.known(1)
    box = _box(known, tuple(x.shape)) if known is not None and how == "none" else None
    if box is not None:
        return _written(x, box, updates)
    places = tuple(_from_front(i, x.shape[d]).long() for d, i in enumerate(indices.unbind(-1)))
    if how in ("none", "add"):
        return x.index_put(places, updates, accumulate=how == "add")
    rank = indices.shape[-1]
    flat = torch.zeros_like(places[0])
    for d, place in enumerate(places):
        flat = flat * x.shape[d] + place
    rows = x.reshape(int(np.prod(x.shape[:rank])), -1)
    new = updates.reshape(-1, rows.shape[1])
    where = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    return rows.scatter_reduce(0, where, new, REDUCTIONS[how]).reshape(x.shape)


def _box(indices: Host, shape: tuple[int, ...]) -> list[slice] | None:
    """The slices that tuples of indices name, if each walks evenly along a dim of its own, in the order of the dims."""
    rank = indices.shape[-1]
    if indices.ndim != rank + 1 or indices.size == 0:
        return None
    slices = []
    for d in range(rank):
        walk = np.moveaxis(indices[..., d] % shape[d], d, 0).reshape(indices.shape[d], -1)
        first = walk[:, 0]
        step = int(first[1] - first[0]) if len(first) > 1 else 1
        if step < 1 or (walk != first[:, None]).any() or (np.diff(first) != step).any():
            return None
        slices.append(slice(int(first[0]), int(first[-1]) + 1, step))
    return slices


def _written(x: Tensor, box: list[slice], updates: Tensor) -> Tensor:
    """``x`` with a box of it replaced: slice by slice, as an assignment in PyTorch is captured."""
    part = x
    parts = []
    for d, where in enumerate(box):
        parts.append(part)
        part = torch.ops.aten.slice.Tensor(part, d, where.start, where.stop, where.step)
    result = updates.reshape(part.shape)
    for d, (whole, where) in reversed(list(enumerate(zip(parts, box, strict=True)))):
        result = torch.slice_scatter(whole, result, d, where.start, where.stop, where.step)
    return result


@reads("OneHot", host=(1,))
def one_hot(call: NodeCall, indices: Tensor, depth: Value, values: Tensor) -> Tensor:
    """Makes a dim in which one entry is on."""
    count, axis = whole_numbers(depth)[0], call.integer("axis", -1)
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    places = torch.where(indices < 0, indices + count, indices).unsqueeze(axis)
    numbers = torch.arange(count, dtype=indices.dtype).reshape([-1 if d == axis else 1 for d in range(places.dim())])
    return torch.where(places == numbers, values[1], values[0])


@reads("Range", host=(0, 1, 2))
def count_up(call: NodeCall, start: Value, limit: Value, delta: Value) -> Host:
    """Counts from a number to another one."""
    assert isinstance(start, np.ndarray) and isinstance(limit, np.ndarray) and isinstance(delta, np.ndarray)
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@reads("Compress", host=(1,))
def compress(call: NodeCall, x: Tensor, condition: Value) -> Tensor:
    """Keeps the entries of a dim for which a constant is true."""
    assert isinstance(condition, np.ndarray)
    places = torch.from_numpy(np.nonzero(condition)[0])
    return x.index_select(call.integer("axis", 0), places) if call.has("axis") else x.flatten().index_select(0, places)


@reads("GridSample")
def grid_sample(call: NodeCall, x: Tensor, grid: Tensor) -> Tensor:
    """Samples at places that a grid names."""
    modes = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    return F.grid_sample(
        x,
        grid,
        mode=modes[call.text("mode", "linear")],
        padding_mode=call.text("padding_mode", "zeros"),
        align_corners=bool(call.integer("align_corners", 0)),
    )
