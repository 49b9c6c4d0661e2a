"""Reduced precision on the command line: states as float16, convolutions in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from co3d_compile.cli.common import OUTPUT, Options, option, together
from co3d_compile.errors import UsageError

if TYPE_CHECKING:
    from co3d_compile.compiler.compiled_model import CompiledModel


precision_options = together(
    option("--state-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
           group=OUTPUT,
           help="float16: states take half the memory; results are near those of the model, not equal to them."),
    option("--int8", is_flag=True, group=OUTPUT,
           help="Convolutions in 8 bits, by ONNX Runtime's quantisation, for a smaller file, not for speed; not exact. "
                "Needs --calibrate."),
    option("--calibrate", metavar="VIDEO", group=OUTPUT,
           help="Frames for --int8: a video or a folder of pictures, longer than the warm-up, of what will be seen."),
)  # fmt: skip


def take_precision(options: Options, native: bool, path: Path) -> Callable[[CompiledModel], CompiledModel] | None:
    """Takes the options out; returns what reduces a compiled model, if anything is to."""
    half, int8, video = options.pop("state_dtype") == "float16", options.pop("int8"), options.pop("calibrate")
    if int8 != (video is not None):
        raise UsageError("--int8 and --calibrate go together.", hint="Give --int8 --calibrate VIDEO, or neither.")
    if not (half or int8):
        return None
    if native or path.suffix == ".pt2":
        name = "--int8" if int8 else "--state-dtype float16"
        raise UsageError(f"{name} goes with neither --native nor a .pt2.", hint="Leave one of them away.")

    def reduce(compiled: CompiledModel) -> CompiledModel:
        compiled = compiled.to_int8(_steps(compiled, video)) if int8 else compiled
        return compiled.with_half_states() if half else compiled

    return reduce


def _steps(compiled: CompiledModel, video: str) -> Iterator[Any]:
    """Yields the frames of each step, as ``co3d run`` feeds them."""
    from co3d_compile.media.frame_source import Source
    from co3d_compile.media.video_steps import Feed

    with Source(video) as source:
        yield from Feed(compiled.info).steps(source)
