"""``torch.vmap`` in a network: PyTorch's tracer loses what is computed in it, and names neither it nor its line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from unittest import mock

from torch._functorch import vmap

LOST = re.compile(
    r"fake tensor in the exported program constant's list.*attribute: (?:(.+)\.)?lifted_tensor_", re.DOTALL
)
ENTER = "_vmap_increment_nesting"  # PyTorch calls it for each one
WAY_OUT = (
    "Write it for the whole tensor: what is done to each row, with that dim in the batch (flatten, then unflatten)."
)


def lost_in(error: BaseException) -> str | None:
    """Finds the module in which the tracer has lost a tensor, by its path; None if the error is another one."""
    found = LOST.search(str(error))
    return None if found is None else found[1] or ""


def batching_frames(run: Callable[[], object]) -> traceback.StackSummary | None:
    """Finds where a network that is run enters ``torch.vmap`` first; None if it does not."""
    seen: list[traceback.StackSummary] = []
    enter: Callable[..., object] = getattr(vmap, ENTER)

    def noted(*args: object) -> object:
        seen.append(traceback.extract_stack())
        return enter(*args)

    with mock.patch.object(vmap, ENTER, noted):
        run()
    return seen[0] if seen else None
