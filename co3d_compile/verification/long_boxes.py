"""The boxes of each step of a run, and those that belong to a clip of it.

Boxes of all steps are one tensor, (steps, most rows, columns), whose rows that are not there are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from co3d_compile.ir.program import Input
from co3d_compile.verification.output_plans import Plan
from co3d_compile.verification.time_claims import NoReference


@dataclass(frozen=True)
class LongBoxes:
    """The boxes of one input on a long clip.

    Args:
        values: Those of each step.
        begin: The frame of the first input with which the first of these steps begins.
        pulse: Frames of the first input per step.
        ahead: Frames from the start of a clip to the entry that its boxes belong to.
    """

    values: Tensor
    begin: int
    pulse: int
    ahead: int

    def of_clip(self, start: Fraction) -> Tensor | None:
        """Takes the boxes of the clip that starts at a frame; None where it has none of these."""
        step = (int(start) + self.ahead - self.begin) // self.pulse
        return rows_of(self.values[step]) if 0 <= step < len(self.values) else None


def boxes_of(
    inputs: Sequence[Input], frames: Sequence[Tensor], begin: int, seen: int, ahead: int
) -> dict[str, LongBoxes]:
    """Finds the inputs that are boxes, by name.

    Args:
        inputs, frames: All inputs, and what they are on the long clip.
        begin: The frame of the first input with which the steps begin whose boxes these are.
        seen: How many frames of the first input these steps took.
        ahead: Frames from the start of a clip to the entry that its boxes belong to.
    """
    pairs = [(i.name, x) for i, x in zip(inputs, frames, strict=True) if i.boxes is not None]
    return {name: LongBoxes(x, begin, seen // len(x), ahead) for name, x in pairs}


def frames_ahead(plans: Sequence[Plan], newest: bool) -> int:
    """Counts the first input's frames from a clip's start to the entry of its boxes: entry T // 2 of a window of
    T entries, or its newest one.

    Raises:
        NoReference: Results come from windows whose middle entries are different frames.
    """
    found = set()
    for plan in plans:
        entries = [(r, r.newest if newest else r.oldest + (r.newest - r.oldest + 1) // 2) for r in plan.reads]
        if entries:
            found.add(int(max((r.claim.crop + at * r.claim.spacing) * r.claim.rate for r, at in entries)))
    if len(found) > 1:
        raise NoReference("its boxes belong to different frames for different results")
    return found.pop() if found else 0


def rows_of(values: Tensor) -> Tensor:
    """Takes the rows that are there."""
    return values[~values.isnan().any(-1)]


def all_boxes(steps: Sequence[Tensor]) -> Tensor:
    """Joins the boxes of all steps to one tensor."""
    return torch.nn.utils.rnn.pad_sequence(list(steps), batch_first=True, padding_value=torch.nan)


def random_boxes(inputs: Sequence[Input], spec: Input, rows: int, generator: torch.Generator) -> Tensor:
    """Draws boxes inside of a frame; columns in front of their corners are zero, such as the index in the batch."""
    height, width = next(i.shape[-2:] for i in inputs if len(i.shape) > 3)
    corners = torch.rand((rows, 2, 2), generator=generator).sort(1).values * torch.tensor([width, height])
    return torch.cat([torch.zeros(rows, spec.shape[1]), corners.flatten(1)], 1)[:, 4:].to(spec.dtype)
