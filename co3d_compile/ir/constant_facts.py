"""Facts of constants: progressions, bands, tensors of one value."""

from __future__ import annotations

import torch


def progression(value: torch.Tensor) -> tuple[int, float, float] | None:
    """Dim, first value and step of a constant that counts along one dim: it counts on beyond the clip."""
    long = [d for d, s in enumerate(value.shape) if s > 1]
    if len(long) != 1 or value.numel() < 3 or value.dtype == torch.bool:
        return None
    line = value.flatten().double()
    steps = line[1:] - line[:-1]
    even = bool((steps - steps[0]).abs().max() <= 1e-9) and float(steps[0]) != 0
    return (long[0], float(line[0]), float(steps[0])) if even else None


def band(mask: torch.Tensor) -> tuple[int, int] | None:
    """The least and largest distance into the past that an attention mask allows, if it is a band of such."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.numel() != mask.shape[-1] ** 2 or mask.shape[-1] < 3:
        return None
    square = mask.reshape(mask.shape[-2:])
    allowed = square if mask.dtype == torch.bool else square == 0
    if mask.dtype != torch.bool and not bool((allowed | (square == -torch.inf)).all()):
        return None
    n = square.shape[0]
    diagonals = [torch.diagonal(allowed, -back) for back in range(1 - n, n)]
    inside = [back for back, line in zip(range(1 - n, n), diagonals, strict=True) if bool(line.all())]
    even = all(bool(line.all()) or not bool(line.any()) for line in diagonals)
    if not even or not inside or inside != list(range(inside[0], inside[-1] + 1)):
        return None
    return (inside[0], inside[-1]) if inside[0] > 1 - n and inside[-1] < n - 1 else None


def _fill(value: torch.Tensor) -> float | None:
    """The one number that a constant consists of."""
    return float(value.flatten()[0]) if value.numel() and _uniform(value) else None


def _alike(value: torch.Tensor) -> frozenset[int]:
    """The dims along which a constant stays the same."""
    return frozenset(d for d in range(value.dim()) if bool((value == value.narrow(d, 0, 1)).all()))


def _uniform(value: torch.Tensor, wanted: float | None = None) -> bool:
    if value.numel() == 0:
        return True
    first = value.flatten()[0]
    return bool((value == first).all()) and (wanted is None or float(first) == wanted)
