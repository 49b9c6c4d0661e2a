"""The untouched model on one long clip, read at the indices that a stream reports (DESIGN section 1)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from . import Reference, Window

_PROBE = 48  # frames over which entries are counted: a multiple of every stride in use
_LARGE = 6_000_000  # numbers in a clip
_counted: dict[Hashable, list[tuple[int, ...]]] = {}


@contextmanager
def eager() -> Iterator[None]:
    """Eager runs without gradients and without NNPACK, which smears NaN over a whole tensor."""
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        yield


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class LongClip:
    """The trunk of a reference on one clip longer than the stream.

    Args:
        reference: how the model is run.
        clip: one clip per input; its length is that of the windows.
        dims: time dim of each input.
        as_list: the trunk takes one list.
        dense: entry o of the model started at frame phi stands at o * stride + phi.
        key: what is the same for clips of the same trunk, whose entries are counted once.
    """

    def __init__(
        self,
        reference: Reference,
        clip: Sequence[Tensor],
        dims: Sequence[int],
        as_list: bool,
        dense: bool,
        key: Hashable = None,
    ) -> None:
        self.reference, self.dims, self.as_list, self.dense = reference, tuple(dims), as_list, dense
        self._like = tuple(clip)
        self.clip = tuple(tensor.shape[dim] for tensor, dim in zip(clip, dims, strict=True))
        common = math.gcd(*self.clip)
        repeats = _PROBE // math.gcd(self.clip[0] // common, _PROBE)
        probes = [[n * 3 + n // common * more for n in self.clip] for more in (0, repeats)]
        self.lengths, *ends = self._counts([self.clip, *probes], (key, self.clip) if key is not None else None)
        self._frames = self.clip[0] // common * repeats
        self._entries = [b - a for a, b in zip(*ends, strict=True)]
        self.tensors: tuple[Tensor, ...] = ()
        self.start = 0

    def run(self, frames: Sequence[Tensor], start: int) -> None:
        """Runs the trunk; the stream begins `start` frames (of the first input) into this clip."""
        self.start = start
        with eager():
            if self.dense:
                self.tensors = tuple(self._interleaved(frames, k) for k in range(len(self.lengths)))
            else:
                self.tensors = self._trunk(frames)

    def entries(self, tensor: int, frames: int) -> int:
        """Entries of a trunk tensor in so many frames of the first input."""
        if self.dense:
            return frames
        product = frames * self._entries[tensor]
        assert product % self._frames == 0, f"{frames} frames are no whole number of entries of tensor {tensor}"
        return product // self._frames

    def stride(self, tensor: int) -> int:
        return max(1, self._frames // self._entries[tensor])

    def newest(self, tensor: int, last: int, count: int, spacing: int = 1) -> Tensor:
        """`count` entries, `spacing` apart, that end at the stream's entry `last`."""
        dim = self.reference.time_dims[tensor]
        end = last + self.entries(tensor, self.start)
        begin = end - (count - 1) * spacing
        assert begin >= 0 and end < self.tensors[tensor].shape[dim], f"entry {last} is outside the model's long clip"
        return self.tensors[tensor].index_select(dim, torch.arange(begin, end + 1, spacing))

    def _trunk(self, frames: Sequence[Tensor]) -> tuple[Tensor, ...]:
        copies = [tensor.clone() for tensor in frames]  # some models write into their input
        return as_tuple(self.reference.trunk(copies) if self.as_list else self.reference.trunk(*copies))

    def _counts(self, lengths: Sequence[Sequence[int]], key: Hashable) -> list[tuple[int, ...]]:
        """Entries of each trunk tensor where inputs are so long; a small network is quicker itself than its fake."""
        found = _counted.get(key)
        if found is None:
            large = sum(t.numel() // n * m for t, n, m in zip(self._like, self.clip, lengths[-1], strict=True)) > _LARGE
            with FakeTensorMode(allow_non_fake_inputs=True) if large else nullcontext(), eager():
                found = [self._count(each) for each in lengths]
        if key is not None:
            _counted[key] = found
        return found

    def _count(self, lengths: Sequence[int]) -> tuple[int, ...]:
        shapes = [
            [n if k == dim else size for k, size in enumerate(tensor.shape)]
            for tensor, dim, n in zip(self._like, self.dims, lengths, strict=True)
        ]
        tensors = self._trunk([torch.zeros(s, dtype=t.dtype) for s, t in zip(shapes, self._like, strict=True)])
        return tuple(t.shape[dim] for t, dim in zip(tensors, self.reference.time_dims, strict=True))

    def _interleaved(self, frames: Sequence[Tensor], tensor: int) -> Tensor:
        dim = self.reference.time_dims[tensor]
        phases = [
            self._trunk([t.narrow(d, phi, t.shape[d] - phi) for t, d in zip(frames, self.dims, strict=True)])[tensor]
            for phi in range(self.stride(tensor))
        ]
        length = min(phase.shape[dim] for phase in phases)
        return torch.stack([phase.narrow(dim, 0, length) for phase in phases], dim + 1).flatten(dim, dim + 1)


def values_at(clip: LongClip, what: int | Window, delay: int, unit: int, step: int, pulse: int) -> Tensor:
    """What an output must be at a step; its delay is told in entries of which ``unit`` come in a step."""
    if isinstance(what, int):
        count = clip.entries(what, pulse)
        return clip.newest(what, (step + 1) * count - 1 - delay, count)
    delay += what.crop
    rates = {k: clip.entries(k, pulse) for k in what.reads}
    if clip.reference.by_clip:
        newest = {k: _clip_end(clip, k, (step + 1) * rate) for k, rate in rates.items()}
    else:
        newest = {k: (step + 1) * rate - 1 - delay * rate // unit for k, rate in rates.items()}
    spacing = {k: clip.stride(k) if clip.dense else 1 for k in what.reads}
    windows = [clip.newest(k, newest[k], clip.lengths[k], spacing[k]) for k in what.reads]
    with eager():
        return torch.as_tensor(what.fn(*windows))


def _clip_end(clip: LongClip, tensor: int, seen: int) -> int:
    """Last frame of the newest whole clip; clips start a whole number of strides from the first frame."""
    stride = 1 if clip.dense else max(1, clip.reference.stride * clip.clip[tensor] // clip.clip[0])
    return (seen - clip.clip[tensor]) // stride * stride + clip.clip[tensor] - 1
