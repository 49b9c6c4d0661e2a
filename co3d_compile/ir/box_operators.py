"""Operators that cut boxes out of a map of features, as torchvision defines them: ``roi_align`` and ``roi_pool``.

They stand for torchvision's own, which are not there wherever its compiled part does not load.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOXES = 1  # which operand of these operators is the boxes


@torch.library.custom_op("co3d::roi_align", mutates_args=())
def roi_align(x: Tensor, boxes: Tensor, scale: float, height: int, width: int, samples: int, aligned: bool) -> Tensor:
    """Computes the mean over samples in each bin of each box.

    Args:
        x: Features (N, C, H, W).
        boxes: (K, 5): the index in the batch, x1, y1, x2, y2.
        scale: Places of the features per unit of the boxes.
        height, width: Bins of a box.
        samples: In a bin along each axis; 0 or less: as many as it has places.
        aligned: Whether boxes are half a place farther in front, as the centres of places are.
    """
    offset, parts = (0.5 if aligned else 0.0), []
    for index, x1, y1, x2, y2 in boxes.unbind(0):
        features = x[int(index)]
        along_y, along_x = (
            _bilinear(a * scale - offset, b * scale - offset, bins, samples, size, aligned)
            for a, b, bins, size in ((y1, y2, height, x.shape[2]), (x1, x2, width, x.shape[3]))
        )
        parts.append(along_y @ features @ along_x.T)
    return torch.stack(parts) if parts else x.new_empty((0, x.shape[1], height, width))


def _bilinear(start: Tensor, end: Tensor, bins: int, samples: int, size: int, aligned: bool) -> Tensor:
    """Computes the weight of each place along an axis in each bin, (bins, size)."""
    length = end - start if aligned else (end - start).clamp(min=1.0)
    count = samples if samples > 0 else int(torch.ceil(length / bins))
    if count <= 0:
        return start.new_zeros((bins, size))
    inside = (torch.arange(count, dtype=start.dtype) + 0.5) * (length / bins / count)
    at = start + torch.arange(bins, dtype=start.dtype)[:, None] * (length / bins) + inside
    there = ((at >= -1) & (at <= size)).to(start.dtype)
    at = at.clamp(0, size - 1)
    places = torch.arange(size, dtype=start.dtype)
    return ((1 - (at[..., None] - places).abs()).clamp(min=0) * there[..., None]).mean(1)


@torch.library.custom_op("co3d::roi_pool", mutates_args=())
def roi_pool(x: Tensor, boxes: Tensor, scale: float, height: int, width: int) -> Tensor:
    """Takes the maximum over each bin of each box, bins rounded to whole places; arguments as of :func:`roi_align`."""
    result = x.new_zeros((len(boxes), x.shape[1], height, width))
    for k, (index, *corners) in enumerate(boxes):
        x1, y1, x2, y2 = (int(torch.trunc(c * scale + torch.sign(c) * 0.5)) for c in corners)
        rows, columns = _bins(x, y1, y2, height, x.shape[2]), _bins(x, x1, x2, width, x.shape[3])
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                places = x[int(index), :, row, column]
                if places.numel():
                    result[k, :, i, j] = places.amax((1, 2))
    return result


def _bins(x: Tensor, start: int, end: int, bins: int, size: int) -> list[slice]:
    """Finds the places of each bin along an axis."""
    edges = torch.arange(bins + 1, dtype=x.dtype) * (torch.tensor(max(end - start + 1, 1), dtype=x.dtype) / bins)
    first, last = (edge.add(start).clamp(0, size).int().tolist() for edge in (edges[:-1].floor(), edges[1:].ceil()))
    return [slice(*places) for places in zip(first, last, strict=True)]


@roi_align.register_fake
@roi_pool.register_fake
def _shape(x: Tensor, boxes: Tensor, scale: float, height: int, width: int, *_: int | bool) -> Tensor:
    return x.new_empty((boxes.shape[0], x.shape[1], height, width))


ALIGN, POOL = torch.ops.co3d.roi_align.default, torch.ops.co3d.roi_pool.default
