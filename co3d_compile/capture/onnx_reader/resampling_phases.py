"""A dim that is resized by a whole factor: each entry gives as many results, each a mean of a few entries around it.

Written so, it goes on beyond the clip; a matrix would be that of one clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

SAME = 1e-6
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Phases:
    """How a dim is resized.

    Attributes:
        stride: How many entries there are for each result; one where there are more results.
        taps: For each result that belongs to an entry, the entries that it reads, counted from that one, with weights.
    """

    stride: int
    taps: tuple[dict[int, float], ...]

    @property
    def reach(self) -> tuple[int, int]:
        """How many entries before and behind its own one a result reads."""
        offsets = [o for taps in self.taps for o in taps]
        return max(0, -min(offsets)), max(0, max(offsets))

    def matrix(self, entries: int) -> NDArray[np.float64]:
        """Computes the weights for a number of entries; outside there are copies of the first and the last one."""
        count = len(self.taps)
        found = np.zeros((entries // self.stride * count, entries))
        for row in range(len(found)):
            for offset, weight in self.taps[row % count].items():
                found[row, min(max(row // count * self.stride + offset, 0), entries - 1)] += weight
        return found

    def resized(self, x: Tensor, dim: int) -> Tensor:
        """Resizes a dim of ``x``."""
        front, back = self.reach
        pairs = [0] * (2 * (x.dim() - 2))
        pairs[2 * (x.dim() - 1 - dim)], pairs[2 * (x.dim() - 1 - dim) + 1] = front, back
        count = x.shape[dim] // self.stride
        x = F.pad(x, pairs, mode="replicate") if front or back else x
        results = []
        for taps in self.taps:
            parts = [self._part(x, dim, front + offset, count) * weight for offset, weight in taps.items()]
            results.append(sum(parts[1:], parts[0]))
        return results[0] if len(results) == 1 else torch.stack(results, dim + 1).flatten(dim, dim + 1)

    def _part(self, x: Tensor, dim: int, first: int, count: int) -> Tensor:
        last = first + (count - 1) * self.stride + 1
        return torch.ops.aten.slice.Tensor(x, dim, first, INT64_MAX if last == x.shape[dim] else last, self.stride)


def phases(matrix: NDArray[np.float64], x: Tensor, dim: int) -> Phases | None:
    """Finds the phases by which a matrix resizes a dim by a whole factor, if it does and PyTorch can pad that dim."""
    size, entries = matrix.shape
    if dim < 2 or x.dim() > 5 or (size % entries and entries % size):
        return None
    count, stride = max(1, size // entries), max(1, entries // size)
    middle = entries // stride // 2
    taps = []
    for row in matrix[middle * count : (middle + 1) * count]:
        read = np.flatnonzero(np.abs(row) > SAME)
        if not read.size or read[0] == 0 or read[-1] == entries - 1:
            return None
        taps.append({int(at) - middle * stride: float(row[at]) for at in read})
    found = Phases(stride, tuple(taps))
    return found if np.allclose(found.matrix(entries), matrix, rtol=0, atol=SAME) else None
