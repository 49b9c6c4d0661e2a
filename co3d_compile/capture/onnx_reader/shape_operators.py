"""Operators that move, join or cut dims: ``Reshape``, ``Transpose``, ``Concat``, ``Slice``, ``Pad`` and others."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import (
    Host,
    NodeCall,
    Value,
    pad_pairs,
    reads,
    torch_dtype,
    whole_numbers,
)

INT64_MAX = 2**63 - 1


@reads("Shape")
def shape(call: NodeCall, x: Tensor) -> Host:
    """Gives the sizes of a tensor: plain numbers while the model is traced."""
    rank = x.dim()
    start, end = call.integer("start", 0), call.integer("end", rank)
    return np.array([int(s) for s in x.shape][slice(start, end)], dtype=np.int64)


@reads("Size")
def size(call: NodeCall, x: Tensor) -> Host:
    """Gives the number of elements."""
    return np.array(x.numel(), dtype=np.int64)


@reads("Reshape", host=(1,))
def reshape(call: NodeCall, x: Tensor, target: Value = None) -> Tensor:
    """Gives another shape: 0 keeps a size, -1 takes what is left."""
    sizes = whole_numbers(target) if target is not None else call.integers("shape", ()) or []
    fixed = call.clips > 1 and not call.is_constant(0) and (target is None or call.is_constant(1))
    if call.place.is_stored if call.place is not None else fixed and not call.places and sizes[:1] != [0]:
        return x.reshape(_for_all_clips(call, x, sizes))
    if not call.integer("allowzero", 0):
        sizes = [x.shape[d] if s == 0 else s for d, s in enumerate(sizes)]
    return x.reshape(sizes)


def _for_all_clips(call: NodeCall, x: Tensor, sizes: list[int]) -> list[int]:
    """Changes a shape that is stored for one clip into that of several.

    Where nothing is known, the batch is the outermost dim.
    """
    sizes = [x.shape[d] if s == 0 else s for d, s in enumerate(sizes)]
    known = math.prod(s for s in sizes if s != -1)
    if -1 not in sizes and known == x.numel():
        return sizes
    sizes = [x.numel() // call.clips // known if s == -1 else s for s in sizes]
    sizes[call.place.dim if call.place is not None else 0] *= call.clips
    return sizes


@reads("Flatten")
def flatten(call: NodeCall, x: Tensor) -> Tensor:
    """Gives a matrix: the dims before ``axis``, and those from it on."""
    axis = call.integer("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


@reads("Transpose")
def transpose(call: NodeCall, x: Tensor) -> Tensor:
    """Reorders dims; without ``perm`` in the opposite order."""
    order = call.integers("perm") or list(reversed(range(x.dim())))
    return x if order == sorted(order) else x.permute(order)


@reads("Squeeze", host=(1,))
def squeeze(call: NodeCall, x: Tensor, axes: Value = None) -> Tensor:
    """Takes dims of size one out."""
    dims = call.dims(axes)
    return x.squeeze() if dims is None else x.squeeze(dims)


@reads("Unsqueeze", host=(1,))
def unsqueeze(call: NodeCall, x: Tensor, axes: Value = None) -> Tensor:
    """Puts dims of size one in."""
    dims = call.dims(axes) or []
    for dim in sorted(d % (x.dim() + len(dims)) for d in dims):
        x = x.unsqueeze(dim)
    return x


@reads("Concat")
def concat(call: NodeCall, *xs: Tensor) -> Tensor:
    """Joins along a dim."""
    return torch.cat(xs, call.integer("axis", 1))


@reads("Split", host=(1,))
def split(call: NodeCall, x: Tensor, sizes: Value = None) -> tuple[Tensor, ...]:
    """Cuts into parts of given sizes, or into as many as there are outputs."""
    axis = call.integer("axis", 0)
    parts = call.dims(sizes, "split")
    if parts is None:
        count = call.integer("num_outputs", len(call.node.outputs))
        most = -(-x.shape[axis] // count)
        parts = [min(most, x.shape[axis] - i * most) for i in range(count)]
    return tuple(torch.split(x, parts, axis))


@reads("Expand", host=(1,))
def expand(call: NodeCall, x: Tensor, target: Value) -> Tensor:
    """Repeats along dims of size one, by the rules of broadcasting."""
    sizes, place = whole_numbers(target), call.places[0] if call.places else None
    if place is not None:
        dim = place.dim + len(sizes) - x.dim()
        if dim >= 0 and sizes[dim] * call.clips == x.shape[place.dim]:
            sizes[dim] = x.shape[place.dim]
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(sizes)))


@reads("Tile", host=(1,))
def tile(call: NodeCall, x: Tensor, repeats: Value) -> Tensor:
    """Repeats a tensor along each dim."""
    return x.repeat(whole_numbers(repeats))


@reads("ConstantOfShape", host=(0,))
def constant_of_shape(call: NodeCall, target: Value) -> Tensor | Host:
    """Makes a tensor of one number. A short list is known while the model is traced: it may be a shape."""
    value = call.node.attributes["value"].as_tensor().numpy() if call.has("value") else np.zeros(1, np.float32)
    sizes = whole_numbers(target)
    if len(sizes) <= 1:
        return np.full(sizes, value.reshape(-1)[0], value.dtype)
    return torch.full(sizes, value.reshape(-1)[0].item(), dtype=torch.from_numpy(value).dtype)


@reads("EyeLike")
def eye_like(call: NodeCall, x: Tensor) -> Tensor:
    """Makes ones on a diagonal."""
    rows, columns = x.shape
    dtype = torch_dtype(call.integer("dtype", 1)) if call.has("dtype") else x.dtype
    diagonal = torch.arange(columns)[None] - torch.arange(rows)[:, None] == call.integer("k", 0)
    return diagonal.to(dtype)


@reads("Slice", host=(1, 2, 3, 4))
def slice_(
    call: NodeCall, x: Tensor, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Tensor:
    """Cuts from ``starts`` to ``ends``; a negative step walks backwards."""
    first, last = call.dims(starts, "starts") or [], call.dims(ends, "ends") or []
    dims = call.dims(axes) or list(range(len(first)))
    strides = whole_numbers(steps) if steps is not None else [1] * len(first)
    for dim, start, end, step in zip(dims, first, last, strides, strict=True):
        entries = x.shape[dim]
        if step < 0:
            start, end = (min(max(n + entries * (n < 0), least), entries - 1) for n, least in ((start, 0), (end, -1)))
            wanted = list(range(start, end, step))
            turned = wanted == list(reversed(range(entries)))
            x = x.flip(dim) if turned else x.index_select(dim, torch.tensor(wanted, dtype=torch.int64))
        else:
            x = torch.ops.aten.slice.Tensor(x, dim, start, min(end, INT64_MAX), step)
    return x


@reads("Pad", host=(1, 2, 3))
def pad(call: NodeCall, x: Tensor, pads: Value = None, value: Value = None, axes: Value = None) -> Tensor:
    """Pads, or crops where a number is negative."""
    given = call.dims(pads, "pads" if call.opset > 1 else "paddings") or []
    dims = [d % x.dim() for d in whole_numbers(axes)] if axes is not None else list(range(x.dim()))
    whole = [0] * (2 * x.dim())
    for i, dim in enumerate(dims):
        whole[dim], whole[x.dim() + dim] = given[i], given[len(dims) + i]
    mode = call.text("mode", "constant")
    if mode == "constant":
        number = (
            value.reshape(-1)[0].item() if isinstance(value, np.ndarray) and value.size else call.number("value", 0.0)
        )
        return F.pad(x, pad_pairs(whole), value=number)
    for dim in range(x.dim()):
        x = _padded_by_copies(call, x, dim, whole[dim], whole[x.dim() + dim], mode)
    return x


def _padded_by_copies(call: NodeCall, x: Tensor, dim: int, front: int, back: int, mode: str) -> Tensor:
    """Pads one dim by entries of its own, with PyTorch's operator where it has one for that dim."""
    if front < 0 or back < 0:
        x = x.narrow(dim, max(0, -front), x.shape[dim] + min(front, 0) + min(back, 0))
        front, back = max(0, front), max(0, back)
    if not front and not back:
        return x
    names = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}
    if mode not in names:
        raise call.refuse(f"pads in the mode {mode!r}")
    if 3 <= x.dim() <= 5 and dim >= 2:
        pairs = [0] * (2 * (x.dim() - 2))
        pairs[2 * (x.dim() - 1 - dim)], pairs[2 * (x.dim() - 1 - dim) + 1] = front, back
        return F.pad(x, pairs, mode=names[mode])
    entries = np.arange(-front, x.shape[dim] + back)
    last = x.shape[dim] - 1
    if mode == "edge":
        entries = np.clip(entries, 0, last)
    elif mode == "wrap":
        entries = entries % (last + 1)
    else:
        entries = last - abs(last - entries % (2 * last)) if last else entries * 0
    return x.index_select(dim, torch.from_numpy(entries))


@reads("CenterCropPad", host=(1,))
def center_crop_pad(call: NodeCall, x: Tensor, target: Value) -> Tensor:
    """Crops or pads with zeros around the centre."""
    sizes = whole_numbers(target)
    dims = call.integers("axes") or list(range(x.dim()))
    for dim, wanted in zip(dims, sizes, strict=True):
        extra = wanted - x.shape[dim]
        if extra < 0:
            x = x.narrow(dim, -extra // 2, wanted)
        else:
            pairs = [0] * (2 * x.dim())
            pairs[2 * (x.dim() - 1 - dim % x.dim())] = extra // 2
            pairs[2 * (x.dim() - 1 - dim % x.dim()) + 1] = extra - extra // 2
            x = F.pad(x, pairs)
    return x


@reads("DepthToSpace")
def depth_to_space(call: NodeCall, x: Tensor) -> Tensor:
    """Moves blocks of channels into space."""
    block = call.integer("blocksize", 1)
    n, c, h, w = x.shape
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


@reads("SpaceToDepth")
def space_to_depth(call: NodeCall, x: Tensor) -> Tensor:
    """Moves blocks of space into channels."""
    block = call.integer("blocksize", 1)
    n, c, h, w = x.shape
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


@reads("Trilu", host=(1,))
def triangle(call: NodeCall, x: Tensor, k: Value = None) -> Tensor:
    """Keeps the upper or the lower triangle."""
    diagonal = whole_numbers(k)[0] if k is not None else 0
    return torch.triu(x, diagonal) if call.integer("upper", 1) else torch.tril(x, diagonal)


@reads("ReverseSequence", host=(1,))
def reverse_sequence(call: NodeCall, x: Tensor, lengths: Value) -> Tensor:
    """Turns a dim around where each row is as long as the whole; others are refused."""
    dim = call.integer("time_axis", 0)
    if call.integer("batch_axis", 1) == dim:
        raise call.refuse("has its batch where time is")
    if any(length != x.shape[dim] for length in whole_numbers(lengths)):
        raise call.refuse("turns rows of different lengths around")
    return x.flip(dim)
