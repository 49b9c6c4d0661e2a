"""Constants of a file as a network computes them.

An exporter computes what depends on no frame and stores the numbers: a mask, a count of frames, zeros beside the
frames. Beyond the clip such a constant goes on, a learned one does not. So it is written again as what it was.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def core(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Keeps a single entry along each dim along which all entries of a constant are the same."""
    for dim in range(array.ndim):
        one = array.take([0], dim) if array.shape[dim] > 1 else array
        if one is not array and bool((array.take([1], dim) == one).all()) and bool((array == one).all()):
            array = one
    return array


def counted(array: NDArray[np.generic]) -> tuple[int, float, float] | None:
    """Gives the dim, first value and step of numbers that count evenly along one dim, or are all the same (step 0)."""
    if array.size < 2 or array.dtype.kind not in "fiub":
        return None
    small = core(array)
    if small.size == 1:
        return 0, small.item(), 0
    if max(small.shape) != small.size or small.size < 3 or array.dtype.kind == "b":
        return None
    line = small.reshape(-1)
    first, step = line[0].item(), line[1].item() - line[0].item()
    even = bool((line == (first + step * np.arange(line.size)).astype(array.dtype)).all())
    return (small.shape.index(small.size), first, step) if even else None


def made(array: NDArray[np.generic]) -> Tensor | None:
    """Computes with PyTorch a constant that counts, or is one number; None for others."""
    found = counted(array)
    if found is None:
        return None
    dim, first, step = found
    dtype = torch.from_numpy(np.zeros(1, array.dtype)).dtype
    if step == 0:
        return torch.full(array.shape, first, dtype=dtype)
    line = torch.arange(array.shape[dim], dtype=dtype) * step + first
    return line.reshape([-1 if d == dim else 1 for d in range(array.ndim)]).expand(array.shape)
