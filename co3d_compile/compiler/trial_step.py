"""One step of a compiled file in ONNX Runtime, before anybody is given it: what it cannot open or run is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from co3d_compile.compiler.compiled_model import CompiledModel
from co3d_compile.compiler.replaced_module import ClipNetwork
from co3d_compile.contract.model_contract import Contract, InputSpec, resolve
from co3d_compile.contract.reader_loop import stepped
from co3d_compile.errors import UnsupportedError
from co3d_compile.ir.program import Program
from co3d_compile.support.cpu_session import by_name, cpu_session
from co3d_compile.support.plain_types import Array

NAMED = re.compile(r"(?:Name:'|[Nn]ode \()([^')]+)")
"""Where ONNX Runtime names a node of the file."""


KNOWN_DOMAINS = {"", "ai.onnx", "com.microsoft"}


def try_step(compiled: CompiledModel, source: ClipNetwork) -> None:
    """Opens the file in ONNX Runtime as it is, and runs the first step of the example clip.

    What holds operators of users' own libraries, or over 2 GB of weights, is passed over.

    Raises:
        UnsupportedError: ONNX Runtime refuses it; the operator is named, if ONNX Runtime does.
    """
    functions = {key[0] for key in compiled.model.functions}
    if compiled.is_large or {node.domain for node in compiled.model.graph} - KNOWN_DOMAINS - functions:
        return
    program, info = compiled.program, compiled.info
    batch, doing = program.step.fixed_batch or 1, "open"
    try:
        run = by_name(cpu_session(compiled.to_bytes(), optimized=False))
        doing = "run"
        frames = [_frames(spec, x, batch) for spec, x in zip(info.inputs, _clip(info, source), strict=True)]
        next(stepped(info, batch, [frames], run))
    except Exception as error:
        raise _refused(doing, error, program) from error


def _refused(what: str, error: Exception, program: Program) -> UnsupportedError:
    """Writes the error for people, which says what operator of the network it is about."""
    said = str(error).strip().rstrip(".")
    origins = program.notes.origins
    operator, path = next((origins[name] for name in NAMED.findall(said) if name in origins), (None, None))
    return UnsupportedError(
        f"ONNX Runtime cannot {what} the compiled file: {said}.",
        operator=operator,
        module_path=path,
        hint="Write it in another way, or give its translation: co3d.rule(op, onnx=…).",
    )


def _clip(info: Contract, source: ClipNetwork) -> Sequence[Tensor | None]:
    """Reads the tensors of the example clip, for each input of the file; None where they are not known."""
    found = [v for v in pytree.tree_leaves((source.clip, dict(source.keywords))) if isinstance(v, Tensor)]
    return found if len(found) == len(info.inputs) else [None] * len(info.inputs)


def _frames(spec: InputSpec, x: Tensor | None, batch: int) -> Array:
    """Makes what the first step takes: of an example clip its first frames, else ones."""
    shape, dtype = resolve(spec.shape, batch), np.dtype(spec.dtype)
    if x is None or "K" in spec.shape:
        return np.ones(shape, dtype)
    if spec.time_dim is not None:  # the clip over again, where a step takes more frames than it has
        x = x.index_select(spec.time_dim, torch.arange(spec.frames_per_step or 1) % x.shape[spec.time_dim])
    x = torch.cat([x.detach()] * batch)[:batch]
    result: Array = x.reshape(shape).numpy().astype(dtype) if x.numel() == prod(shape) else np.ones(shape, dtype)
    return result
