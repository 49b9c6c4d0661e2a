"""Facts of constants: progressions, bands, tensors of one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Constant:
    """What is known of the values of a constant.

    It is part of the fact of the constant's node, for rules look at nodes and at nothing else.

    Args:
        fill: The one number that it consists of.
        filling: Whether it consists of one number that was not learned: it may fill in what lies outside of a stream.
        alike: The dims along which it stays the same.
        progression: Dim, first value and step, if it counts along one dim and was not learned.
        band: The least and largest distance into the past that it allows, if it is such an attention mask.
    """

    fill: float | None = None
    filling: bool = False
    alike: frozenset[int] = frozenset()
    progression: tuple[int, float, float] | None = None
    band: tuple[int, int] | None = None

    @staticmethod
    def of(value: torch.Tensor, learned: bool, computed: bool) -> Constant:
        """Finds what is known of a tensor.

        Args:
            value: The tensor.
            learned: Whether it is a parameter, or computed from one.
            computed: Whether the model computes it.
        """
        fill = fill_of(value)
        return Constant(
            fill=fill,
            filling=(fill is not None or not value.numel()) and not learned,
            alike=_alike(value) if computed else frozenset(),
            progression=progression(value) if computed and not learned else None,
            band=band(value),
        )


def progression(value: torch.Tensor) -> tuple[int, float, float] | None:
    """Finds the dim, first value and step of a constant that counts along one dim: it counts on beyond the clip.

    Along its other dims it stays the same.
    """
    if value.dtype == torch.bool or not value.numel():
        return None
    counted = set(range(value.dim())) - _alike(value)
    if len(counted) != 1:
        return None
    (dim,) = counted
    line = value.movedim(dim, 0).flatten(1)[:, 0].double() if value.dim() > 1 else value.double()
    steps = line[1:] - line[:-1]
    rounding = 1e-9 + 4 * torch.finfo(value.dtype).eps * float(line.abs().max()) if value.is_floating_point() else 0
    even = len(line) > 2 and bool((steps - steps.mean()).abs().max() <= rounding)
    return (dim, float(line[0]), float(steps.mean())) if even else None


def band(mask: torch.Tensor) -> tuple[int, int] | None:
    """Finds the least and largest distance into the past that an attention mask allows, if it is a band of such."""
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


def _alike(value: torch.Tensor) -> frozenset[int]:
    """Finds the dims along which a constant stays the same."""
    return frozenset(d for d in range(value.dim()) if not value.numel() or bool((value == value.narrow(d, 0, 1)).all()))


def fill_of(value: torch.Tensor) -> float | None:
    """Finds the one number that a tensor is all over; None where it differs, or is empty."""
    alike = value.numel() and bool((value == value.flatten()[0]).all())
    return float(value.flatten()[0]) if alike else None
