"""Lists of tensors, which ONNX calls sequences. How long they are is known while the model is traced."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import Host, NodeCall, TensorList, Value, reads, whole_numbers


@reads("SequenceConstruct", "SequenceEmpty")
def sequence_construct(call: NodeCall, *xs: Tensor) -> TensorList:
    """Makes a list."""
    call.integer("dtype", 1)  # the kind of numbers of an empty list, which nothing asks for
    return TensorList(xs)


@reads("SequenceAt", host=(1,))
def sequence_at(call: NodeCall, xs: TensorList, position: Value) -> Tensor:
    """Gives one entry, counted from the front or from the end."""
    return xs.entries[whole_numbers(position)[0]]


@reads("SequenceInsert", host=(2,))
def sequence_insert(call: NodeCall, xs: TensorList, x: Tensor, position: Value = None) -> TensorList:
    """Puts a tensor in front of an entry; without a position at the end."""
    count = len(xs.entries)
    at = count if position is None else whole_numbers(position)[0]
    if not -count <= at <= count:
        raise call.refuse(f"puts a tensor at {at} of a list of {count}")
    at = at % count if at < 0 else at
    return TensorList((*xs.entries[:at], x, *xs.entries[at:]))


@reads("SequenceErase", host=(1,))
def sequence_erase(call: NodeCall, xs: TensorList, position: Value = None) -> TensorList:
    """Takes an entry out; without a position the last one."""
    kept = list(xs.entries)
    del kept[-1 if position is None else whole_numbers(position)[0]]
    return TensorList(tuple(kept))


@reads("SequenceLength")
def sequence_length(call: NodeCall, xs: TensorList) -> Host:
    """Counts the entries."""
    return np.array(len(xs.entries), np.int64)


@reads("ConcatFromSequence")
def concat_from_sequence(call: NodeCall, xs: TensorList) -> Tensor:
    """Joins the entries along a dim, or along a new one."""
    axis = call.integer("axis", 0)
    return torch.stack(xs.entries, axis) if call.integer("new_axis", 0) else torch.cat(xs.entries, axis)


@reads("SplitToSequence", host=(1,))
def split_to_sequence(call: NodeCall, x: Tensor, sizes: Value = None) -> TensorList:
    """Cuts a tensor into parts of one size, or of a size each; without sizes into single entries."""
    axis, keeps = call.integer("axis", 0), call.integer("keepdims", 1)
    if sizes is None:
        return TensorList(torch.split(x, 1, axis) if keeps else torch.unbind(x, axis))
    assert isinstance(sizes, np.ndarray)
    return TensorList(torch.split(x, int(sizes) if sizes.ndim == 0 else whole_numbers(sizes), axis))
