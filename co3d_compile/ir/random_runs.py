"""Random tensors for trial runs of a graph, and whether two runs gave the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from co3d_compile.ir.program import Program


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draws numbers that a root or a logarithm takes: from 0 to 1, or 0 and 1 where numbers are whole."""
    if dtype.is_floating_point:
        return torch.rand(tuple(shape), dtype=dtype, generator=generator)
    return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)


def random_clips(program: Program) -> list[Tensor]:
    """Draws inputs of a captured program, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    values = [n.meta["val"] for n in program.placeholders()]
    return [random_tensor(value.shape, value.dtype, generator) for value in values]


def equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Says whether two tensors are equal but for rounding; ``tolerance`` is relative to the largest finite number.

    What is no number in both, or the same infinity, is equal.
    """
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    largest = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * largest + 1e-30, equal_nan=True)
