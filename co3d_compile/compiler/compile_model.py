"""``compile``: a clip model in, a frame-by-frame model out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from co3d_compile.capture.capture_model import arguments_of, as_module, check_kinds, leaves_sizes_open
from co3d_compile.capture.onnx_reader.onnx_file import OnnxSource, is_onnx, read_onnx
from co3d_compile.compiler.build_model import Build
from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.compiler.replaced_module import ClipNetwork
from co3d_compile.compiler.time_dim_check import check_time_dim, doubt_time_dim, usual_dims
from co3d_compile.compiler.tune_forms import tuned
from co3d_compile.errors import Co3dWarning
from co3d_compile.ir.options import Options
from co3d_compile.ir.pass_manager import Pass, Progress, check_passes
from co3d_compile.passes import default_passes


def compile(
    module: nn.Module | ExportedProgram | OnnxSource,
    example_inputs: Sequence[Any] | Tensor | None = None,
    *,
    window: int | None = None,
    frames_per_step: int | None = None,
    pool_scope: str = "frame",
    stride_mode: str = "step",
    boundary: str = "stream",
    unsupported: str = "window",
    state_io: str = "paired",
    recurrence: str = "state",
    max_delay: int | None = None,
    delay_by: str = "fold",
    box_frame: str = "middle",
    time_dim: int | Sequence[int | None] | None = None,
    also: Sequence[str] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
    tune: bool = False,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    preprocess: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> CompiledModel:
    """Compiles a clip model into a model that takes the next frames and its own state.

    Continual convolutions, no temporal padding, delayed residuals: Hedegaard and Iosifidis, "Continual 3D
    Convolutional Neural Networks for Real-time Processing of Videos", ECCV 2022, section 3.

    Args:
        module: The trained clip model, or what ``torch.export`` made of it, or an ONNX clip model: its path, or what
            ``onnx`` or ``onnx_ir`` have read.
        example_inputs: The arguments of one clip, such as ``(torch.randn(1, 3, 16, 112, 112),)``; of one
            argument the tensor itself will do.
        window: Frames that operators over the whole time axis (the head's pool) look at; default the clip's own.
        frames_per_step: New frames of the first input per step: the least possible, or a multiple of it.
        pool_scope: What a pool that gates the stream (squeeze-and-excitation) looks at: ``"frame"`` the current
            entry, ``"window"`` the newest window, ``"recompute"`` falls back to a window of everything behind it.
        stride_mode: ``"step"``: a step takes as many frames as the strides need. ``"dense"``: one result per frame.
        boundary: ``"stream"``: no start and no end. ``"exact"``: both ends as the clip model has them (docs/ends.md).
        unsupported: ``"window"``: operators without an extension run again on a window. ``"error"``: refused.
        state_io: ``"paired"``: each state has its output. ``"renamed"``: states that only move have none.
        recurrence: ``"state"``: recurrent layers, and loops that hand values on, run on for as long as the stream.
            ``"window"``: where they never forget, they start again with each window, as the clip does.
        max_delay: Frames by which an answer may be late. What the network's own delay is more is saved by convolutions
            and pools over time that read less of the future: another network, which the report names
            (docs/latency.md).
        delay_by: How these read less of it: ``"fold"`` adds the last taps of a kernel to the last one that is left,
            ``"shift"`` stands the whole kernel later, ``"drop"`` leaves its last taps out.
        box_frame: Which entry boxes belong to of the window whose features they are cut out of: ``"middle"``, entry
            T // 2, or ``"newest"``, its last one.
        time_dim: The dim of the inputs that counts frames; a list gives it per input (None in it: no time). Default 2,
            unless the network itself takes dim 1 for its sequence, which is refused; a dim that is given is obeyed.
            The first convolution of an ONNX file says it: 1 for channels last, (N, T, H, W, C).
        also: Paths of modules whose results are outputs too, such as ``["trunk"]``, each with its own delay.
        example_kwargs: The arguments of one clip that the network takes by keyword alone.
        passes: The pipeline; default :func:`co3d_compile.default_passes`.
        tune: Measure on this machine which form of each continual convolution is fastest, instead of estimating it.
        dump: A directory to write the graph to, before and after each pass.
        progress: Called with (stage, done, total).
        preprocess: How a picture becomes a frame, by the names of :class:`co3d_compile.Preprocess`, such as
            ``{"size": 182, "mean": 0.45, "std": 0.225, "fps": 10}``. Stored in the file, changes nothing else.
        labels: Names of the classes, in the order of the scores. Stored in the file.

    Raises:
        Co3dError: One of its kinds; the message names the operator, the module path and the way out.
    """
    notes: list[str] = []
    example_inputs = arguments_of(example_inputs)
    if is_onnx(module):
        clip = read_onnx(module, [tuple(t.shape) for t in example_inputs or ()])
        module, example_inputs, notes = clip.module, example_inputs or clip.example_inputs, clip.notes
    check_kinds(module, example_inputs)
    if isinstance(module, ExportedProgram) and leaves_sizes_open(module):
        module, example_inputs, example_kwargs = as_module(module, example_inputs, example_kwargs)
    source = ClipNetwork(module, example_inputs, dict(example_kwargs or {}))
    dims = usual_dims(module) if time_dim is None else time_dim
    treated = pool_scope, stride_mode, boundary, unsupported, state_io
    said = time_dim is not None or not isinstance(dims, int)  # the operators of an ONNX file tell
    options = Options(window, frames_per_step, *treated, dims, also, recurrence, max_delay, delay_by, said, box_frame)
    pipeline = list(default_passes() if passes is None else passes)
    check_passes(pipeline)
    build = Build(source, options, pipeline, Path(dump) if dump is not None else None, progress)
    compiled = tuned(build.model, _compiled_layer, progress) if tune else build.model()
    if time_dim is None:
        check_time_dim(compiled.program, source.network, example_inputs, options)
        doubt = doubt_time_dim(compiled.program, compiled.captured) if not said else None
        notes += [doubt] if doubt else []
    compiled.source = source
    compiled.describe(preprocess, labels)
    for message in [*notes, *compiled.report().warnings]:
        warnings.warn(message, Co3dWarning, stacklevel=2)
    return compiled


def _compiled_layer(network: nn.Module, clip: Tensor) -> CompiledModel:
    """Compiles one layer, to be timed."""
    return compile(network, (clip,), state_io="renamed")
