"""Gathers and scatters, and what selects by indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import (
    Host,
    NodeCall,
    Value,
    as_tensor,
    even_padding,
    reads,
    whole_numbers,
)

INT64_MAX = 2**63 - 1
REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@reads("Gather")
def gather(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    """Takes entries of a dim: one, some, or as many as a tensor of indices has."""
    axis, constant = call.integer("axis", 0) % x.dim(), call.known(1)
    if constant is not None and not call.is_constant(0):
        return _taken(x, axis, constant)
    if constant is None and indices.dim() > 1:
        before: list[slice | Tensor] = [slice(None)] * axis
        return x[(*before, indices)]
    indices = _from_front(call, indices, x.shape[axis])
    if axis == 0 and x.dim() == 2 and call.is_constant(0):
        return F.embedding(indices, x)
    return _selected(x, axis, indices)


def _taken(x: Tensor, dim: int, indices: Host) -> Tensor:
    """Reads the entries of a dim that are known while the model is traced."""
    indices = indices % x.shape[dim]
    if indices.ndim == 0:
        return x.select(dim, int(indices))
    walked = _walked(x, dim, indices)
    return walked if walked is not None else _selected(x, dim, as_tensor(indices))


def _selected(x: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Takes as many entries of a dim as a tensor of indices has."""
    rows = x.index_select(dim, indices.reshape(-1))
    return rows if indices.dim() == 1 else rows.reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])


def _from_front(call: NodeCall, indices: Tensor, size: int) -> Tensor:
    """Counts from the front those indices (the second input) that count from the end."""
    known = call.known(1)
    if known is not None:
        return as_tensor(known % size) if _has_negative(known) else indices
    return torch.where(indices < 0, indices + size, indices)


def _has_negative(indices: Host) -> bool:
    return bool(np.any(np.less(indices, 0)))


def _walked(x: Tensor, dim: int, indices: Host) -> Tensor | None:
    """Takes what indices name that walk evenly along each of their own one or two dims.

    A slice, or windows that slide.
    """
    if indices.ndim not in (1, 2) or indices.size < 2 or min(indices.shape) < 1:
        return None
    rows = indices.astype(np.int64).reshape(indices.shape[0], -1)
    along, across = _even(rows[:, 0]), _even(rows[0])
    if along is None or across is None or (rows - rows[:1] != rows[:, :1] - rows[0, 0]).any():
        return None
    if indices.ndim == 2 and rows.shape[1] > rows.shape[0] and across.step >= along.step:
        windows = _walked(x, dim, rows.T)  # a row for each tap, as convolutions are written out
        return None if windows is None else windows.transpose(dim, dim + 1)
    first, step, inner, last = along.start, along.step, across.step, int(rows[-1, -1]) + 1
    last = INT64_MAX if last + step > x.shape[dim] else last
    if indices.ndim == 1:
        return torch.ops.aten.slice.Tensor(x, dim, first, last, step)
    part = x if (first, last) == (0, INT64_MAX) else torch.ops.aten.slice.Tensor(x, dim, first, last)
    windows = part.unfold(dim, across.stop - across.start, step)
    return windows[..., ::inner].movedim(-1, dim + 1)


@reads("GatherElements")
def gather_elements(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    """Takes an entry of a dim for each element of the result."""
    axis = call.integer("axis", 0)
    return torch.gather(x, axis, _from_front(call, indices, x.shape[axis]).long())


@reads("GatherND")
def gather_nd(call: NodeCall, x: Tensor, indices: Tensor) -> Tensor:
    """Takes slices by tuples of indices."""
    batch, known = call.integer("batch_dims", 0), call.known(1)
    if known is not None and known.shape[-1] == 1 and not batch:
        return _taken(x, 0, known[..., 0])
    lines = _lines(known) if known is not None and not batch else None
    if lines is not None:
        for d, line in enumerate(lines):
            x = _taken(x, d, line)
        return x
    lead = [
        torch.arange(x.shape[d]).reshape([-1 if i == d else 1 for i in range(indices.dim() - 1)]) for d in range(batch)
    ]
    return x[(*lead, *indices.long().unbind(-1))]


@reads("ScatterElements", "Scatter")
def scatter_elements(call: NodeCall, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Writes elements to places along a dim."""
    axis, how = call.integer("axis", 0) % x.dim(), call.text("reduction", "none")
    known = call.known(1)
    if known is not None and how == "none" and known.size:
        line = np.moveaxis(known % x.shape[axis], axis, 0).reshape(known.shape[axis], -1)
        walk = _even(line[:, 0]) if (line == line[:, :1]).all() else None
        if walk is not None and all(_fills(call, x, known.shape, d) for d in range(x.dim()) if d != axis):
            shape = [known.shape[axis] if d == axis else size for d, size in enumerate(x.shape)]
            return torch.slice_scatter(x, updates.expand(shape), axis, walk.start, walk.stop, walk.step)
    indices = _from_front(call, indices, x.shape[axis]).long()
    if how == "none":
        return x.scatter(axis, indices, updates)
    if how == "add":
        return x.scatter_add(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, REDUCTIONS[how])


def _fills(call: NodeCall, x: Tensor, written: Sequence[int], dim: int) -> bool:
    """Says whether every entry of a dim is written to, in each clip where the file is written for one."""
    return x.shape[dim] in (written[dim], written[dim] * call.clips)


@reads("ScatterND")
def scatter_nd(call: NodeCall, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Writes slices to places that tuples of indices name."""
    how = call.text("reduction", "none")
    known = call.known(1)
    box = _box(known, tuple(x.shape)) if known is not None and how == "none" else None
    if box is not None:
        return _written(x, box, updates)
    places = [indices[..., d].long() for d in range(indices.shape[-1])]
    if how in ("none", "add"):
        return x.index_put(tuple(places), updates, accumulate=how == "add")
    if known is None or _has_negative(known):
        places = [torch.where(i < 0, i + x.shape[d], i) for d, i in enumerate(places)]
    rank = indices.shape[-1]
    flat = torch.zeros_like(places[0])
    for d, place in enumerate(places):
        flat = flat * x.shape[d] + place
    rows = x.reshape(int(np.prod(x.shape[:rank])), -1)
    new = updates.reshape(-1, rows.shape[1])
    where = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    return rows.scatter_reduce(0, where, new, REDUCTIONS[how]).reshape(x.shape)


def _box(indices: Host, shape: tuple[int, ...]) -> list[slice] | None:
    """Finds the slices that tuples of indices name, dim by dim, if each walks evenly along its own dim."""
    lines = _lines(indices)
    slices = [_even(line % size) for line, size in zip(lines or [], shape, strict=False)]
    return [s for s in slices if s is not None] if lines and None not in slices else None


def _even(line: Host) -> slice | None:
    """Finds the slice that names the same entries as a line of indices that grow evenly."""
    step = int(line[1] - line[0]) if len(line) > 1 else 1
    if step < 1 or (np.diff(line) != step).any():
        return None
    return slice(int(line[0]), int(line[-1]) + 1, step)


def _lines(indices: Host) -> list[Host] | None:
    """Finds the indices along each dim, if tuples of indices name all places where these cross."""
    rank = indices.shape[-1]
    if indices.ndim != rank + 1 or indices.size == 0:
        return None
    walks = [np.moveaxis(indices[..., d], d, 0).reshape(indices.shape[d], -1) for d in range(rank)]
    return [w[:, 0] for w in walks] if all((w == w[:, :1]).all() for w in walks) else None


def _written(x: Tensor, box: list[slice], updates: Tensor) -> Tensor:
    """Replaces a box of ``x``: slice by slice, as an assignment in PyTorch is captured."""
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


@reads("Col2Im", host=(1, 2))
def fold(call: NodeCall, x: Tensor, image: Value, block: Value) -> Tensor:
    """Adds blocks that overlap to pictures."""
    pads = even_padding(call.integers("pads") or [0] * 4)
    if pads is None or len(pads) != 2:
        raise call.refuse("folds no pictures, or pads their sides unevenly")
    dilations, strides = call.integers("dilations", (1, 1)) or (), call.integers("strides", (1, 1)) or ()
    sizes = [tuple(v) for v in (whole_numbers(image), whole_numbers(block), dilations, pads, strides)]
    return F.fold(x, *sizes)
