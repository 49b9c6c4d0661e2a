"""What operators return for PyTorch's fake tensors, which have shapes and no numbers: looked up where it is known.

PyTorch remembers it, too, but to look it up there takes longer than much else that is done with a node.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Argument, Target
from torch.utils import _pytree as pytree

from co3d_compile.ir.node_reading import Args, Kwargs, called
from co3d_compile.ir.operator_kind import reads_memory

Result: TypeAlias = Any
CPU = torch.device("cpu")
MOST = 20_000  # results that are remembered
_known: dict[Hashable, Result] = {}


class _NotKnown(Exception):
    """More than the shapes of the operands says what is returned."""


def fake_like(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """Makes a fake tensor of the shape and the strides of a tensor."""
    return _Shape(value).made(mode)


def computed(mode: FakeTensorMode, target: Target, args: Args, kwargs: Kwargs) -> Result:
    """Computes what an operator returns for fake tensors.

    Args:
        mode: In which there are fake tensors.
        target: The operator.
        args, kwargs: Its arguments.
    """
    try:
        key = _key_of_call(target, args, kwargs)
    except _NotKnown:
        return _called(mode, target, args, kwargs)
    if key not in _known:
        result = _called(mode, target, args, kwargs)
        if not all(map(_is_plain, pytree.tree_leaves(result))):
            return result
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = pytree.tree_map(_Shape, result)
    known = _known[key]
    return known.made(mode) if isinstance(known, _Shape) else pytree.tree_map(lambda shape: shape.made(mode), known)


def _called(mode: FakeTensorMode, target: Target, args: Args, kwargs: Kwargs) -> Result:
    with mode, torch.no_grad():
        return called(target)(*args, **kwargs)


class _Shape:
    """All that is known of a tensor without numbers."""

    def __init__(self, value: Tensor) -> None:
        self.size, self.stride = tuple(value.shape), value.stride()
        self.offset, self.dtype = int(value.storage_offset()), value.dtype

    def made(self, mode: FakeTensorMode) -> Tensor:
        """Makes a fake tensor."""
        with torch._C._DisableTorchDispatch():
            if self.offset:
                end = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True)) + 1
                memory = torch.empty(self.offset + max(end, 0), dtype=self.dtype, device="meta")
                value = memory.as_strided(self.size, self.stride, self.offset)
            else:
                value = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(mode, value, CPU)


def _key_of_call(target: Target, args: Args, kwargs: Kwargs) -> Hashable:
    """Makes a key of a call.

    Raises:
        _NotKnown: More than the shapes says what it returns.
    """
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        raise _NotKnown
    placed = reads_memory(target)
    return target, _key(args, placed), _key(tuple(sorted(kwargs.items())), placed)


def _key(value: Argument, placed: bool) -> Hashable:
    """Makes a key of an argument."""
    if isinstance(value, Tensor):
        if not _is_plain(value):
            raise _NotKnown
        return tuple(value.shape), value.stride(), value.dtype, value.storage_offset() if placed else None
    if isinstance(value, (list, tuple)):
        return tuple([_key(v, placed) for v in value])
    if isinstance(value, (bool, int, float)):
        return type(value), value
    if value is None or isinstance(value, (str, torch.dtype, torch.layout, torch.memory_format, torch.device)):
        return value
    raise _NotKnown


def _is_plain(value: object) -> bool:
    """Says whether it is a fake tensor of the CPU whose sizes are known, and whose numbers are not."""
    if not isinstance(value, FakeTensor) or value.constant is not None or value.device != CPU:
        return False
    return value.layout is torch.strided and all(type(size) is int for size in value.shape)
