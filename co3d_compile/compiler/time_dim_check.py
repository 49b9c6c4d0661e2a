"""Whether dim 2 of the inputs is time, where the user does not say which dim is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from co3d_compile.capture.capture_model import capture
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.capture.onnx_reader.time_dims import time_dims
from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.ir.node_reading import operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.options import Options
from co3d_compile.ir.pass_manager import run_passes
from co3d_compile.ir.program import Fallback, Program
from co3d_compile.passes import AnnotateTime, Canonicalize, FoldBatchNorm

aten = torch.ops.aten
DEFAULT = 2
"""The dim that counts the frames in (N, C, T, H, W) and in (N, C, T)."""
PICTURES = 4
"""The dims of (N, C, H, W)."""
OVER_CHANNELS = ("conv", "batch_norm", "lstm", "gru", "rnn")
"""Operators that never compute over all of time, but over all channels or features: named by how their names begin."""


def usual_dims(network: nn.Module | ExportedProgram) -> int | list[int | None]:
    """Guesses the dims that count frames where nobody says it.

    As the first layers of an ONNX file have it, else dim 2.
    """
    if not isinstance(network, OnnxModule):
        return DEFAULT
    found = time_dims(network.onnx_graph)
    if all(dim is None for dim in found):
        return DEFAULT
    ranks = [len(v.shape) if v.shape is not None else 0 for v in network.onnx_graph.inputs]
    return [DEFAULT if dim is None and rank > DEFAULT else dim for dim, rank in zip(found, ranks, strict=True)]


def check_time_dim(
    program: Program, network: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None, options: Options
) -> None:
    """Refuses a network that takes another dim than 2 for its sequence.

    A network on (N, T, C, H, W) folds T into the batch of its 2D layers. With dim 2 as time these layers would compute
    over "all of time", which are their channels; with dim 1 they stream.

    Args:
        program: The network, compiled with dim 2 as time.
        network: The network.
        example_inputs: The arguments of one clip.
        options: The options that it was compiled with.

    Raises:
        UsageError: Layers compute over all of dim 2, and with dim 1 as time no layer does.
    """
    wrong = _over_channels(program)
    timed = next(i for i in program.inputs if i.time_dim is not None)
    if not wrong or timed.time_dim != DEFAULT or timed.shape[1] == 1:
        return
    try:
        other = capture(network, example_inputs, replace(options, time_dim=1))
        run_passes(other, [Canonicalize(), FoldBatchNorm(), AnnotateTime()])
    except Co3dError:
        return
    if not _over_channels(other):
        layer = f"{wrong[0].operator} in {wrong[0].module_path or 'the model'}"
        raise UsageError(
            f"Dim 2 of {timed.name} was taken for time, but {layer} computes over all of it: "
            f"the network takes dim 1 for its sequence, of {timed.shape[1]} entries.",
            hint="Give time_dim=1 (--time-dim 1), or time_dim=2 to compile it as it is.",
        )


def doubt_time_dim(program: Program, captured: Program | None) -> str | None:
    """Warns where dim 2 of one input of four dims looks like the height of pictures, as with frames in the channels.

    Its 2D layers treat dims 2 and 3 alike then, which have one size. A file that streams the rows of a picture is right
    by its index equations, so that no comparison finds it.

    Args:
        program: The network, compiled with dim 2 as time.
        captured: As it was captured.
    """
    timed = [i for i in program.inputs if i.time_dim is not None]
    if captured is None or len(timed) != 1 or timed[0].time_dim != DEFAULT or len(timed[0].shape) != PICTURES:
        return None
    layers = [n for n in captured.graph.nodes if n.target in (aten.conv2d.default, aten.conv2d.padding)]
    sizes = [
        [shape_of(operand(n, 1))[2:], *(Arguments(n).integers(name, 2) for name in ("stride", "dilation"))]
        for n in layers
    ]
    alike = all(a == b for n in sizes for a, b in n) and any(max(kernel) > 1 for kernel, *_ in sizes)
    if timed[0].shape[2] != timed[0].shape[3] or not alike:
        return None
    taken = f"Dim 2 of {timed[0].name} is taken for time, of {timed[0].shape[2]} entries"
    return (
        f"{taken}, but the 2D layers treat dims 2 and 3 alike, as height and width of pictures. Say where the frames "
        "are: time_dim=1 (--time-dim 1) for frames that are stacked as channels, time_dim=2 if this is right."
    )


def _over_channels(program: Program) -> list[Fallback]:
    """Finds layers on a window that cannot have time there."""
    names = [(f, f.operator.removeprefix("aten.").lstrip("_")) for f in program.notes.recomputed]
    return [f for f, name in names if name.startswith(OVER_CHANNELS)]
