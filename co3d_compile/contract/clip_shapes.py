"""The clip that a file was compiled with, as far as the file says."""

from __future__ import annotations

from collections.abc import Mapping

from co3d_compile.contract.model_contract import Contract, InputSpec


def clip_shapes(info: Contract) -> list[tuple[int, ...]]:
    """Reads the shape of the clip of each input; empty: the file does not say it.

    A file without the clip's length mostly has that of its window, which is the same unless another one was asked for.
    """
    frames = info.options.get("clip_frames")
    if not isinstance(frames, Mapping):
        first = info.inputs[0].frames_per_step or 1
        frames = {name: info.window * own // first for name, own in info.frames_per_step.items()} if info.window else {}
    lengths = [frames.get(spec.name) if spec.time_dim is not None else 1 for spec in info.inputs]
    if info.free_rows is not None or not all(isinstance(length, int) for length in lengths):
        return []
    return [_of_clip(spec, int(length or 0)) for spec, length in zip(info.inputs, lengths, strict=True)]


def _of_clip(spec: InputSpec, frames: int) -> tuple[int, ...]:
    """The shape of one clip, whose time dim is gone at one frame per step."""
    sizes = [1 if dim == "N" else int(dim) for dim in spec.shape]
    if spec.time_dim is not None:
        sizes[spec.time_dim : spec.time_dim + (spec.frames_per_step != 1)] = [frames]
    return tuple(sizes)
