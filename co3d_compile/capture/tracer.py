"""Runs ``torch.export`` on a network, and says in which module it failed."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module as code_written_late
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from co3d_compile.capture.batched_functions import WAY_OUT, batching_frames, lost_in
from co3d_compile.capture.caught_failures import failures_caught
from co3d_compile.capture.known_constants import Args, ConstantsKnown, Kwargs, T, tensors_of
from co3d_compile.capture.model_files.model_factory import for_the_cpu
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.capture.packed_sequences import PackedSequences
from co3d_compile.capture.recurrent_shapes import recurrent_layers_by_shape
from co3d_compile.capture.torchscript import DECIDE, exported_script
from co3d_compile.capture.torchvision_operators import without_compiled_part
from co3d_compile.errors import CaptureError, Co3dError, UsageError, first_line
from co3d_compile.ir.stack_traces import without_stack_traces
from co3d_compile.support.silence_torch import quiet

IN_TORCH = "Compute it in PyTorch: what NumPy computes with the values of a clip cannot be captured."
SITE = "site-packages"
OURS = str(Path(__file__).parents[1]) + os.sep
Model: TypeAlias = nn.Module | ExportedProgram
Clip: TypeAlias = Sequence[pytree.PyTree]
"""The arguments of one clip: tensors, lists of them, or anything else that a network takes."""


@contextmanager
def evaluated(model: Model) -> Iterator[Callable[..., pytree.PyTree]]:
    """Gives the model in eval mode, and then as it was."""
    if isinstance(model, ExportedProgram):
        yield model.module()
        return
    training = [m for m in model.modules() if getattr(m, "training", False)]  # a frozen script has no mode
    try:
        model.eval()
    except NotImplementedError:  # the module of an exported program refuses; its operators are those of eval mode
        training = []
    try:
        with without_compiled_part():
            yield model
    finally:
        for m in training:
            m.training = True


def doubled(clip: Clip) -> Clip | None:
    """Doubles the clip of an example, so that the batch can be told from other dims of size one.

    None where there is more than one clip already, or an input without a batch.
    """
    tensors = tensors_of(clip)
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    twice: Clip = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), tuple(clip))
    return twice


def export(
    model: nn.Module, clip: Clip | None, two: bool = True, keywords: Mapping[str, pytree.PyTree] | None = None
) -> ExportedProgram:
    """Runs ``torch.export`` with the module in eval mode, and with errors that people can act on."""
    if clip is None:
        raise UsageError(
            "example_inputs is needed: the arguments of one clip, such as (torch.randn(1, 3, 16, 112, 112),)."
        )
    call = tuple(clip), dict(keywords or {})
    try:
        with torch.no_grad(), evaluated(model):
            if not isinstance(model, OnnxModule):  # it makes nothing
                _run_once(model, *call)
            calls = doubled(call) if two else None
            if calls is not None:
                with contextlib.suppress(Exception):  # a model for a single clip is captured as such below
                    return traced(model, *calls)
            return traced(model, *call)
    except Co3dError:
        raise
    except GuardOnDataDependentSymNode as error:
        raise CaptureError(
            f"{type(model).__name__} chooses in Python by the values of a tensor{_where(error)}.", hint=DECIDE
        ) from error
    except Exception as error:
        _check_batched(model, call, error)
        message = first_line(error).rstrip(".:")
        shapes = ", ".join("x".join(map(str, t.shape)) for t in tensors_of(call)) or "none"
        raise CaptureError(
            f"{type(model).__name__} cannot be captured with inputs of shape {shapes}: {message}{_line_of(error)}.",
            hint=for_the_cpu(error) or (IN_TORCH if ".numpy()" in message else _way_out(model)),
        ) from error


def check_runs(model: nn.Module, clip: Clip, usual: Clip) -> None:
    """Raises what a network says of another clip than the usual one: tracing it may take minutes to say the same.

    A network that does not run on the usual one may be traced all the same.
    """
    error = _failure(model, clip)
    if error is not None and _failure(model, usual) is None:
        raise error


def _failure(model: nn.Module, clip: Clip) -> Exception | None:
    """Runs a network, and gives what it raises."""
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), evaluated(model) as run:
            run(*deepcopy(tuple(clip)))
    except Exception as error:  # a network refuses clips in any way it likes
        return error
    finally:
        torch.set_rng_state(state)
    return None


def _run_once(model: nn.Module, clip: tuple[pytree.PyTree, ...], keywords: dict[str, pytree.PyTree]) -> None:
    """Runs the model, so that what it makes at its first call is there, and what it returns is known to PyTorch.

    A mask or a parameter that is made while the model is traced would be the tracer's, and stay in the model.
    """
    state = torch.get_rng_state()
    with contextlib.suppress(Exception):  # whatever is wrong is said of the capture
        results = pytree.tree_leaves(model(*deepcopy(clip), **deepcopy(keywords)))
        for kind in {type(value) for value in results if is_dataclass(value)}:
            torch.export.register_dataclass(kind)
    torch.set_rng_state(state)


def _where(error: Exception) -> str:
    """The line of the model that the tracer names, if it names one; else that which the error came from."""
    found = re.search(r'call raised this error:\s+File "([^"]+)", line (\d+), in .*\n\s*(\S.*)', str(error))
    if found is None or found[1].startswith(OURS):
        return _line_of(error)
    return f" ({Path(found[1]).name}, line {found[2]}: {found[3]})"


def _check_batched(model: nn.Module, call: tuple[Args, Kwargs], error: Exception) -> None:
    """Raises CaptureError if the tracer has lost what is computed in ``torch.vmap``."""
    path = lost_in(error)
    if path is None:
        return
    clip, keywords = deepcopy(call)
    with torch.no_grad(), evaluated(model):
        frames = batching_frames(lambda: model(*clip, **keywords))
    if frames is not None:
        where = _line_in(frames)
        raise CaptureError(f"torch.vmap cannot be captured{where}.", module_path=path, hint=WAY_OUT) from error


def _line_of(error: BaseException) -> str:
    """The line of the model that an error came from."""
    return _line_in(traceback.extract_tb(error.__traceback__))


def _line_in(frames: traceback.StackSummary) -> str:
    """The innermost line that is neither PyTorch's nor ours."""
    others = [str(Path(file).parent) + os.sep for file in (torch.__file__, contextlib.__file__)]
    others.append(OURS)
    lines = [f for f in frames if f.line and (SITE in f.filename or not f.filename.startswith(others[1]))]
    lines = [f for f in lines if not f.filename.startswith((others[0], others[2]))]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno}: {lines[-1].line})" if lines else ""


def traced(model: nn.Module, clip: tuple[pytree.PyTree, ...], keywords: dict[str, pytree.PyTree]) -> ExportedProgram:
    """Runs ``torch.export``, also of a model that reads ``x.data`` or copies tensors as Python copies objects,
    decides in Python by the values of constants, packs sequences or catches what a module of it raises."""
    if isinstance(model, torch.jit.ScriptModule) and not keywords:
        with quiet(), recurrent_layers_by_shape():
            return exported_script(model, clip)
    plain: ExportedProgram | None = None
    with quiet(), without_stack_traces(), code_written_late(True), recurrent_layers_by_shape():
        with contextlib.suppress(Exception):
            plain = torch.export.export(model, clip, keywords, strict=False)
            if not _reads_sizes(plain):
                return plain
        try:
            with _CopiesTraced(), ConstantsKnown(model) as constants, PackedSequences(constants), failures_caught():
                return torch.export.export(model, clip, keywords, strict=False)
        except Exception:
            if plain is None:
                raise
            return plain


def _reads_sizes(exported: ExportedProgram) -> bool:
    """Says whether sizes, or other numbers, are read from tensors: constants may be what they are."""
    reads = torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default
    return any(n.target in reads for n in exported.graph.nodes)


class _CopiesTraced(TorchFunctionMode):
    """A mode in which ``x.data``, ``copy.deepcopy(x)`` and ``copy.copy(x)`` of an activation are operators."""

    def __torch_function__(
        self, func: Callable[..., T], types: Args, args: Args = (), kwargs: Kwargs | None = None
    ) -> T | Tensor | tuple[Callable[..., Tensor], tuple[Tensor, Tensor]]:
        """Runs a call; one that reads ``data`` becomes ``detach``, and one that copies a tensor becomes ``clone``."""
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            return func(*args, **(kwargs or {}))
        if func == _READ_DATA and not isinstance(x, nn.Parameter):
            return x.detach()
        if func == Tensor.__deepcopy__:
            return x.clone()
        if func == Tensor.__reduce_ex__:  # of copy.copy: the same memory in another tensor
            return Tensor.view_as, (x, x)
        return func(*args, **(kwargs or {}))


_READ_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def _way_out(model: nn.Module) -> str:
    scripted = next((name for name, m in model.named_modules() if name and isinstance(m, torch.jit.ScriptModule)), None)
    reduced = next((name for name, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if reduced is not None:
        return f"Its parameter {reduced} is in half precision: convert the model first, model.float()."
    if scripted is not None:
        return f"Its part {scripted} is TorchScript: build it without torch.jit.script, or script the whole model."
    return "Check the clip shape (long enough for the model's pools?), and that the model runs on it."
