"""The clip graph that a file is verified with: captured anew, or the one that the compiler has just captured."""

from __future__ import annotations

from contextlib import suppress

from co3d_compile.capture.capture_model import capture, describe_inputs
from co3d_compile.capture.fewer_clips import for_one_clip
from co3d_compile.ir.options import Options
from co3d_compile.ir.program import Program
from co3d_compile.verification.capture_check import CaptureCheck
from co3d_compile.verification.clip_model import Example, Model, tensors_of
from co3d_compile.verification.random_clips import RandomClips


def captured_model(
    model: Model, example: Example, options: Options, known: Program | None
) -> tuple[Program, RandomClips, CaptureCheck]:
    """Gives the captured graph of a model, the random clips that it takes, and the check that it is this model's.

    Args:
        model: The clip model.
        example: The arguments of one clip.
        options: As the model was compiled.
        known: What the compiler has captured of it; whether it still is the model is looked at.

    Raises:
        VerificationError: The captured graph does not compute what the model does.
    """
    there = None if known is None else _for_the_example(known, model, example, options)
    if there is not None:
        with suppress(Exception):  # what was rewritten for fewer clips may be another network, or none
            return there, *_checked(there, model, example)
    program = capture(model, example, options, two=False)
    return program, *_checked(program, model, example)


def _for_the_example(known: Program, model: Model, example: Example, options: Options) -> Program | None:
    """Makes the graph for as many clips as the example has; None where that cannot be, or it was another example."""
    given = [(tuple(t.shape), t.dtype) for t in tensors_of(model, example)]
    captured = [(i.shape, i.dtype) for i in known.inputs]
    if given == captured:
        program: Program | None = known.copied()
    else:
        twice = [((2, *shape[1:]), dtype) for shape, dtype in given if shape[:1] == (1,)]
        program = for_one_clip(known) if twice == captured else None
    if program is None or tuple(options.also) != tuple(known.options.also):
        return None
    program.options, program.inputs = options, describe_inputs(program.module, options)
    alike = [i.time_dim for i in known.inputs] == [i.time_dim for i in program.inputs]
    return program if alike else None


def _checked(program: Program, model: Model, example: Example) -> tuple[RandomClips, CaptureCheck]:
    random_clips, check = RandomClips(program.inputs, tensors_of(model, example)), CaptureCheck(program, model, example)
    check.run(random_clips)
    return random_clips, check
