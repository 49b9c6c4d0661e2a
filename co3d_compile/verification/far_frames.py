"""The network itself on frames far out, beside the file: a clip does not show that a count ends, or a loop changes.

The long clip that a file is compared with else is of the captured graph, and a few clips long. This one is as long as
the network is run on in a short time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from co3d_compile.capture.tracer import evaluated
from co3d_compile.contract.model_contract import Contract
from co3d_compile.runtime.session import StreamSession
from co3d_compile.verification.clip_model import Example, Model, eager, example_of, off_by_rounding
from co3d_compile.verification.compared_steps import Frames, random_frames
from co3d_compile.verification.output_plans import Plan
from co3d_compile.verification.reference import Reference

LONGEST, LONGER = 64, 4  # clips, and by how many times each is longer than the one before
SECONDS = 0.3  # of the network
NEAR = 1  # clips in which both are the same, or what is compared is not what the file computes
RIGHT, WRONG = 1e-3, 1e-2  # of the deviation of what is expected, in those clips and behind them


def changed_far_out(
    reference: Reference, info: Contract, session: StreamSession, model: Model, example: Example, seed: int
) -> str:
    """Says from which frame on a file that counts, or remembers all frames, is no longer what the network is.

    Empty where it is, and where the network cannot be run on such a clip or has results that are no streams.

    Args:
        reference: What the file was compared with.
        info: What the file says.
        session: The file.
        model: The network.
        example: The arguments of one clip.
        seed: Of the random frames.
    """
    counts = info.receptive_field is None or any(np.issubdtype(state.dtype, np.integer) for state in info.states)
    replaced = reference.gates() or reference.kernels or reference.dense or info.boundary == "exact"
    replaced = replaced or reference.has_halves  # of which rounding alone makes others
    timed = all(i.time_dim is not None and i.boxes is None for i in reference.inputs)
    if (
        not counts
        or replaced
        or not timed
        or isinstance(model, ExportedProgram)
        or not all(map(_plain, reference.plans))
    ):
        return ""
    clips, seconds, steps, expected = 1, 0.0, [], []
    while clips <= LONGEST and seconds < SECONDS:
        start = time.perf_counter()
        longer = _steps(reference, info, clips * reference.clip, seed)
        try:
            expected, steps = _expected(reference, model, example, longer), longer
        except Exception:  # a network refuses other clips in any way it likes
            break
        clips, seconds = LONGER * clips, LONGER * (time.perf_counter() - start)
    found = _first_difference(reference, info, session, steps, expected)
    if not found:
        return ""
    generator = torch.Generator().manual_seed(seed)
    rounded = [off_by_rounding(step, generator) for step in steps]
    beside = zip(_expected(reference, model, example, rounded), expected, strict=True)
    amplified = any(float((a - b).abs().double().max()) > WRONG / 4 * _spread(b) for a, b in beside)
    return "" if amplified else found


def _spread(x: Tensor) -> float:
    """The deviation of what is expected; of one number, one."""
    return max(float(x.double().std()), 1e-9) if x.numel() > 1 else 1.0


def _plain(plan: Plan) -> bool:
    """Says whether an output is a stream with a dim of its own for time."""
    return plan.sort == "stream" and plan.claim.place is not None and plan.claim.place.alone and not plan.claim.single


def _steps(reference: Reference, info: Contract, frames: int, seed: int) -> list[Frames]:
    """Draws the frames of each step."""
    pulse = next(f for i in info.inputs if (f := i.frames_per_step))
    return list(islice(random_frames(reference, pulse, seed), frames // pulse))


def _expected(reference: Reference, model: Model, example: Example, steps: list[Frames]) -> list[Tensor]:
    """Runs the network on all frames as one clip."""
    long = (torch.cat([step[k] for step in steps], spec.time_dim or 0) for k, spec in enumerate(reference.inputs))
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(long), example_of(model, example))
    with eager(), evaluated(model) as network:
        return [x for x in pytree.tree_leaves(network(*args, **kwargs)) if isinstance(x, Tensor)]


def _first_difference(
    reference: Reference, info: Contract, session: StreamSession, steps: list[Frames], expected: list[Tensor]
) -> str:
    """Streams the same frames, and says where the file leaves what is expected, if that is behind the first clips."""
    session.reset()
    errors: list[list[tuple[int, float]]] = [[] for _ in expected]
    scales = [_spread(x) for x in expected]
    for number, frames in enumerate(steps):
        result = session.step(tuple(np.ascontiguousarray(x.numpy()) for x in frames))
        results = result if isinstance(result, tuple) else (result,)
        if number >= info.warmup_steps:
            for k, got in enumerate(results):
                errors[k] += _errors(reference, info, k, number, torch.from_numpy(got), expected[k], scales[k])
    for k, found in enumerate(errors):
        rate = reference.plans[k].claim.rate
        near = [error for n, error in found if n * rate < NEAR * reference.clip]
        wrong = next((n for n, error in found if error > WRONG), None)
        if near and max(near) < RIGHT and wrong is not None:
            return (
                f"Output '{info.outputs[k].name}' is that of the network up to frame {int(wrong * rate) - 1}, and "
                "not from there on: the network counts frames, or changes, otherwise than the clip shows."
            )
    return ""


def _errors(
    reference: Reference, info: Contract, k: int, step: int, got: Tensor, expected: Tensor, scale: float
) -> Iterator[tuple[int, float]]:
    """Yields the error of each entry that a step gives, by its index."""
    plan, output = reference.plans[k], info.outputs[k]
    place, count = plan.claim.place, output.entries_per_step
    assert place is not None
    newest = (step + 1) * count - 1 - plan.late(output.delay, output.has_time)
    for back in range(count):
        n = newest - back
        if 0 <= n < expected.shape[place.dim]:
            own = got.select(place.dim, count - 1 - back) if got.dim() == expected.dim() else got
            yield n, float((own - expected.select(place.dim, n)).abs().double().max()) / scale
