"""Example clips: of which shape, and random numbers of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from co3d_compile.capture.model_files.model_factory import show_shape
from co3d_compile.errors import UsageError

Shape = tuple[int, ...]

MAX_CLIP_ELEMENTS = 1 << 30
SEED = 0


@dataclass(frozen=True)
class ClipShapes:
    """The shape of each input clip.

    Attributes:
        given: As the user says. An archive and an ONNX file may know their own.
        assumed: What is taken where neither says it.
    """

    given: Sequence[Shape] = ()
    assumed: Sequence[Shape] = ()

    @property
    def known(self) -> Sequence[Shape]:
        """Those that are to be taken where the model does not know its own."""
        return self.given or self.assumed

    @property
    def notes(self) -> list[str]:
        """What is to be said of them."""
        if self.given or not self.assumed:
            return []
        return [f"the clip is taken as {shapes_text(self.assumed)}, as the compiled file says; --shape gives another"]


def check_shapes(shapes: Iterable[Shape]) -> None:
    """Raises UsageError where a shape has no room for a clip, or room for far too much."""
    for shape in shapes:
        if min(shape, default=0) < 1 or math.prod(shape) > MAX_CLIP_ELEMENTS:
            raise UsageError(f"A clip of shape {show_shape(shape)} makes no sense: sizes are from 1, 4 GiB in all.")


def example_clips(shapes: Sequence[Shape], module: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Draws random clips, in float64 for a network that has no other numbers."""
    if not shapes:
        raise UsageError("The clip shape is not known.", hint="Give --shape, such as --shape 1x3x16x224x224.")
    generator = torch.Generator().manual_seed(SEED)
    kinds = {p.dtype for p in module.parameters()} if module is not None else set()
    dtype = torch.float64 if kinds == {torch.float64} else torch.float32
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def shapes_text(shapes: Iterable[Sequence[int]]) -> str:
    """Writes several shapes."""
    return " and ".join(show_shape(s) for s in shapes) or "no shape"
