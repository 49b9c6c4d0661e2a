"""Random clips that a network gives finite numbers for: not every network takes numbers below zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from co3d_compile.ir.program import Input
from co3d_compile.verification.long_boxes import random_boxes

Draw: TypeAlias = Callable[[Input, Tensor, list[int], torch.Generator], Tensor]


def _normal(spec: Input, example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        return torch.randn(*shape, generator=generator)
    return torch.randint(0, 2, shape, generator=generator)


def _from_0_to_1(spec: Input, example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    floats = spec.dtype.is_floating_point
    return torch.rand(*shape, generator=generator) if floats else _normal(spec, example, shape, generator)


def _of_the_example(spec: Input, example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Draws from the numbers of the example clip, such as the indices of an embedding."""
    if not example.numel():
        return _normal(spec, example, shape, generator)
    return example.flatten()[torch.randint(0, example.numel(), shape, generator=generator)]


DRAWS: tuple[tuple[str, Draw], ...] = (
    ("", _normal),
    ("numbers from 0 to 1", _from_0_to_1),
    ("numbers of the example clip", _of_the_example),
)


class RandomClips:
    """Draws the inputs of a network: normal numbers, where the network gives finite numbers for them.

    A logarithm or a root gives none for numbers below zero; an embedding refuses indices that it does not have.

    Args:
        inputs: Of the network.
        example: The tensors of one clip.
    """

    def __init__(self, inputs: Sequence[Input], example: Sequence[Tensor]) -> None:
        self.inputs, self.example = inputs, example
        self.what, self._draw = DRAWS[0]

    def draw(self, shapes: Sequence[Sequence[int]], generator: torch.Generator) -> list[Tensor]:
        """Draws inputs of these shapes."""
        results = []
        for spec, example, shape in zip(self.inputs, self.example, shapes, strict=True):
            if spec.boxes is not None:
                x = random_boxes(self.inputs, spec, shape[0], generator)
            else:
                x = self._draw(spec, example, list(shape), generator)
            results.append(x.to(spec.dtype))
        return results

    def settle(self, run: Callable[[list[Tensor]], Sequence[Tensor]]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Chooses the numbers of which the network makes most finite ones.

        Args:
            run: Runs the network on a clip.

        Returns:
            The clip that was drawn so, and what the network gives for it: nothing, where it takes none of such numbers.
        """
        shapes = [spec.shape for spec in self.inputs]
        clip: list[Tensor] = []
        best: tuple[int, str, Draw, list[Tensor], Sequence[Tensor]] | None = None
        for what, draw in DRAWS:
            self.what, self._draw = what, draw
            clip = self.draw(shapes, torch.Generator().manual_seed(1))
            try:
                results = run(clip)
            except (IndexError, RuntimeError, ValueError):
                continue  # it does not take such numbers
            wrong = sum(int((~r.isfinite()).sum()) for r in results)
            if best is None or wrong < best[0]:
                best = wrong, what, draw, clip, results
            if not wrong:
                break
        if best is None:
            return clip, []
        _, self.what, self._draw, clip, results = best
        return clip, results
