"""Reads an ONNX clip model from a file, safely, and makes a module of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir
import torch
from onnx import ModelProto
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass
from torch import Tensor

from co3d_compile.capture.onnx_reader.graph_facts import check_values, has_half_precision, is_quantized
from co3d_compile.capture.onnx_reader.memory_views import reshape_views
from co3d_compile.capture.onnx_reader.node_call import torch_dtype
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.capture.onnx_reader.several_clips import is_right_for_several
from co3d_compile.contract.model_contract import METADATA_KEY
from co3d_compile.errors import Co3dError, LoadError, UsageError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

SEED = 0


OnnxSource: TypeAlias = "str | os.PathLike[str] | ModelProto | ir.Model"
"""A path, or a model that was read by ``onnx`` or ``onnx_ir``."""


def is_onnx(model: object) -> TypeIs[OnnxSource]:
    """Says whether a model is given as an ONNX file or as what libraries make of one."""
    return isinstance(model, str | os.PathLike | ModelProto | ir.Model)


@dataclass(frozen=True)
class OnnxClipModel:
    """An ONNX clip model that was read.

    Attributes:
        module: Runs the graph with PyTorch.
        example_inputs: One clip, of random numbers.
        notes: What was changed on the way, for people.
    """

    module: OnnxModule
    example_inputs: tuple[Tensor, ...]
    notes: list[str]


def read_onnx(
    source: OnnxSource, shapes: Sequence[Sequence[int]] = (), assumed: Sequence[Sequence[int]] = ()
) -> OnnxClipModel:
    """Reads a clip model.

    Args:
        source: A path, or a model that was read by ``onnx`` or ``onnx_ir``.
        shapes: The shape of each input, where the file leaves dims free.
        assumed: What dims that are free have where no shapes are given.

    Raises:
        LoadError: The file cannot be read, or is a compiled step.
        UnsupportedError: Operators that cannot be read; all of them are named.
        UsageError: The shapes do not belong to this file.
    """
    model = _open(source)
    if METADATA_KEY in model.metadata_props:
        raise LoadError(
            "This file takes frames one at a time already: it is a compiled model.",
            hint="Give the clip model that it was compiled from.",
        )
    check_values(model.graph)
    try:
        module = OnnxModule(prepared(model), source if not isinstance(source, ModelProto) else model).eval()
        example = _example(model.graph, shapes, assumed)
    except Co3dError:
        raise
    except Exception as error:  # ONNX's own tools, on a file that does not fit together
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"This cannot be read as an ONNX model: {first}.") from error
    module.is_for_several = is_right_for_several(module, example)
    return OnnxClipModel(module, example, _notes(model.graph))


def prepared(model: ir.Model) -> ir.Model:
    """Rewrites a model: constants are no inputs and no nodes, and functions and views are written out."""
    RemoveInitializersFromInputsPass()(model)
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    reshape_views(model.graph)
    for value in model.graph.inputs:
        if value.shape is not None:  # Paddle writes a dim that is free as -1
            value.shape = ir.Shape([None if isinstance(s, int) and s < 0 else s for s in value.shape])
    return model


def _open(source: OnnxSource) -> ir.Model:
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, ModelProto):
        return ir.serde.deserialize_model(source)
    path = Path(source)
    if not path.is_file():
        raise LoadError(f"There is no file {path}.")
    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            _check_external(value, path)
        if not len(model.graph):
            raise LoadError(f"{path} cannot be read as an ONNX model: it has no operators.")
    except LoadError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"{path} cannot be read as an ONNX model: {first}.") from error
    return model


def _check_external(value: ir.Value, path: Path) -> None:
    """Refuses weights that a file names outside of its own folder, or that are not all there."""
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return
    file = (path.parent / tensor.location).resolve()
    if not file.is_relative_to(path.parent.resolve()):
        raise LoadError(f"{path} reads the weight {value.name} from outside of its own folder.")
    end = (tensor.offset or 0) + (tensor.length or 0)
    if not file.is_file() or file.stat().st_size < end:
        raise LoadError(f"The weight {value.name} is missing: {file.name} should lie beside {path.name}.")


def _example(graph: ir.Graph, shapes: Sequence[Sequence[int]], assumed: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    if shapes and len(shapes) != len(graph.inputs):
        raise UsageError(f"{len(shapes)} shapes are given; the model has {len(graph.inputs)} inputs.")
    generator = torch.Generator().manual_seed(SEED)
    tensors = []
    for i, value in enumerate(graph.inputs):
        sizes = _sizes(value, shapes[i] if shapes else None, assumed[i] if i < len(assumed) else ())
        dtype = torch_dtype(int(value.dtype or ir.DataType.FLOAT))
        if dtype.is_floating_point:
            tensors.append(torch.randn(sizes, generator=generator, dtype=dtype))
        else:
            tensors.append(torch.randint(0, 2, sizes, generator=generator).to(dtype))
    return tuple(tensors)


def _sizes(value: ir.Value, given: Sequence[int] | None, assumed: Sequence[int]) -> list[int]:
    """The shape of an input: as given, or the file's own; a free batch is one clip."""
    shape = value.shape
    if given is None and assumed and (shape is None or len(shape) == len(assumed)):
        given = [s if isinstance(s, int) else a for s, a in zip(shape or assumed, assumed, strict=True)]
    if given is not None:
        fixed = list(shape) if shape is not None else list(given)
        right = len(fixed) == len(given) and all(
            not isinstance(s, int) or s == g for s, g in zip(fixed, given, strict=True)
        )
        if not right:
            raise UsageError(f"The input {value.name} has the shape {_text(fixed)}, not {_text(given)}.")
        return list(given)
    sizes = [] if shape is None else [s if isinstance(s, int) else 1 if d == 0 else None for d, s in enumerate(shape)]
    if shape is None or None in sizes:
        said = _text(list(shape)) if shape is not None else "unknown"
        raise UsageError(
            f"The input {value.name} has the shape {said}: some dims are free.",
            hint="Give the shape of a clip with --shape, such as --shape 1x3x16x224x224.",
        )
    return [s for s in sizes if s is not None]


def _text(sizes: Sequence[object]) -> str:
    return "x".join(str(s) if isinstance(s, int) else "?" for s in sizes)


def _notes(graph: ir.Graph) -> list[str]:
    notes = []
    if has_half_precision(graph):
        notes.append("Weights in half precision were converted to float32.")
    if is_quantized(graph):
        notes.append("The model is quantized (QDQ); it is read without rounding to 8 bits.")
    return notes
