"""Where a model comes from, archive, TorchScript file, pickle, ONNX file or factory, made ready to be captured."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from co3d_compile.capture.model_files.archive_device import opened_for_the_cpu
from co3d_compile.capture.model_files.archive_safety import (
    ALWAYS_ALLOWED,
    EXPORT,
    MAX_INFLATION,
    ONNX,
    PICKLE,
    SAFE_WAYS,
    SCRIPT,
    check_export_archive,
    damaged,
    identify,
    not_a_module,
)
from co3d_compile.capture.model_files.checkpoint import load_weights
from co3d_compile.capture.model_files.example_clips import ClipShapes, Shape, check_shapes, example_clips, shapes_text
from co3d_compile.capture.model_files.model_factory import (
    brief,
    build,
    for_the_cpu,
    import_from_here,
    import_target,
    show_shape,
    some,
    with_torchvision,
)
from co3d_compile.capture.onnx_reader.onnx_file import read_onnx
from co3d_compile.capture.tracer import export
from co3d_compile.errors import CaptureError, Co3dError, LoadError, UsageError


@dataclass(frozen=True)
class Loaded:
    """A model ready for ``co3d.compile``.

    Attributes:
        program: The module in eval mode, or the exported program.
        example_inputs: The positional arguments of one clip; a model that takes one list has one list here. None for an
            exported program that has its own.
        kind: Where it came from, in words.
        notes: What was done to it that the user should know.
    """

    program: nn.Module | ExportedProgram
    example_inputs: tuple[Any, ...] | None
    kind: str
    notes: list[str] = field(default_factory=list)


def load(
    model: str,
    *,
    shapes: Sequence[Shape] = (),
    assumed: Sequence[Shape] = (),
    named: Mapping[str, Shape] | None = None,
    weights: Path | None = None,
    weights_key: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """Loads a model and makes example inputs for it.

    Args:
        model: Path of a torch.export archive, a TorchScript file, a pickled module or an ONNX clip model, or
            ``package.module:factory``, or ``folder/file.py:factory``. The kind of a file is found from its content. The
            current directory is importable.
        shapes: Shape of each input clip, such as ``(1, 3, 16, 224, 224)``; an archive knows its own.
        assumed: Shapes to take where neither ``shapes`` nor the file says them.
        named: Shape of each clip that a factory's model takes by keyword alone.
        weights: State dict for what the factory builds: a torch.save file or safetensors.
        weights_key: Where in that file it is, if several would do.
        kwargs: Keyword arguments of the factory.
        trust_pickle: Unpickle models and checkpoints, which runs whatever code the file holds.

    Raises:
        LoadError: The file, factory or weights cannot be read, must not be, or are of a kind that does not compile.
        CaptureError: The model refuses a clip of these shapes.
        UsageError: A shape is missing or absurd, or an option does not belong to this kind of model.
    """
    check_shapes([*shapes, *(named or {}).values()])
    path = Path(model)
    if path.exists():
        if weights is not None or kwargs or named:
            what = "--weights, --kwargs and --input belong to a package.module:factory; this model is a file."
            raise UsageError(what)
        return _load_file(path, ClipShapes(shapes, assumed), trust_pickle)
    if re.fullmatch(r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", model):
        clips = ClipShapes(shapes, () if named else assumed)
        return _load_factory(model, clips, named or {}, (weights, weights_key), kwargs or {}, trust_pickle)
    raise LoadError(
        f"There is no file {model}.",
        hint="To build a model from code give package.module:factory or folder/file.py:factory.",
    )


def _load_file(path: Path, shapes: ClipShapes, trust_pickle: bool) -> Loaded:
    if not path.is_file():
        raise LoadError(f"{path} is not a file.")
    try:
        kind = identify(path)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
    return READERS[kind](path, shapes, trust_pickle)


def _read_archive(path: Path, shapes: ClipShapes, trust_pickle: bool) -> Loaded:
    """Reads what ``torch.export.save`` has written."""
    if not trust_pickle:
        check_export_archive(path)
    from torch.export.pt2_archive._package import load_pt2

    try:
        file, device = opened_for_the_cpu(path, trust_pickle)
        with file:
            programs = load_pt2(file).exported_programs
    except Exception as error:
        raise _not_opened(path, error) from error
    if len(programs) != 1:
        raise LoadError(f"{path} holds {len(programs)} programs; one is wanted.", hint="Use torch.export.save.")
    (program,) = programs.values()
    notes = [f"the program was exported on {device}; it is read for the CPU"] if device else []
    loaded = _from_program(program, shapes, EXPORT, notes)
    try:
        program.module()  # reads signatures and guards, which opening does not look at
    except Exception as error:
        raise _not_opened(path, error) from error
    return loaded


def _not_opened(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path} cannot be opened as a torch.export archive: {brief(error)}.",
        hint=f"It is damaged or was written by another version than PyTorch {torch.__version__}.",
    )


def _read_script(path: Path, shapes: ClipShapes, trust_pickle: bool) -> Loaded:
    """Reads what ``torch.jit.save`` has written."""
    try:
        script = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:
        raise damaged(path, brief(error)) from error
    return _from_script(script, shapes, SCRIPT, shapes.notes)


def _read_pickle(path: Path, shapes: ClipShapes, trust_pickle: bool) -> Loaded:
    """Reads a module from a torch.save file; without trust nothing but tensors is read, to tell what the file is."""
    import_from_here()
    try:
        content = with_torchvision(lambda: torch.load(path, map_location="cpu", weights_only=not trust_pickle))
    except Exception as error:
        if not trust_pickle and "Weights only load failed" in str(error) and "Unsupported " in str(error):
            raise LoadError(
                f"{path} is a pickle: opening it can run any code on this machine.",
                hint=f"If you trust where it comes from, give --trust-pickle. Safer: {SAFE_WAYS}",
            ) from error
        if isinstance(error, (AttributeError, ImportError)):
            raise LoadError(
                f"{path} needs code that is not importable here: {brief(error)}.",
                hint="Run from the directory in which the model was saved.",
            ) from error
        raise damaged(path, brief(error)) from error
    modules = {k: v for k, v in content.items() if isinstance(v, nn.Module)} if isinstance(content, dict) else {}
    if len(modules) > 1:
        hint = f"Save the one that is meant: torch.save(checkpoint[{str(next(iter(modules)))!r}], 'model.pth')."
        raise LoadError(f"{path} holds several modules ({some(list(map(str, modules)))}).", hint=hint)
    content = next(iter(modules.values()), content)
    if isinstance(content, nn.Module):
        notes = [f"unpickled {path} as told by --trust-pickle", *shapes.notes]
        return _from_module(content, shapes, PICKLE, notes)
    if isinstance(content, dict):
        raise not_a_module(path)
    raise LoadError(f"{path} holds a {type(content).__name__}, not a model.", hint=SAFE_WAYS)


def _read_onnx(path: Path, shapes: ClipShapes, trust_pickle: bool) -> Loaded:
    """Reads a clip model of any library, written as ONNX."""
    clip = read_onnx(path, shapes.given, shapes.assumed)
    return Loaded(clip.module, clip.example_inputs, ONNX, clip.notes)


READERS: dict[str, Callable[[Path, ClipShapes, bool], Loaded]] = {
    EXPORT: _read_archive,
    SCRIPT: _read_script,
    PICKLE: _read_pickle,
    ONNX: _read_onnx,
}
"""For each kind of file that ``identify`` tells what reads it, with the shapes of the clip and whether to unpickle."""


def _load_factory(
    model: str,
    shapes: ClipShapes,
    named: Mapping[str, Shape],
    checkpoint: tuple[Path | None, str | None],
    kwargs: Mapping[str, Any],
    trust_pickle: bool,
) -> Loaded:
    target = import_target(model)
    built = target
    if not isinstance(target, nn.Module):
        if not callable(target):
            raise LoadError(f"{model} is a {type(target).__name__}, not a function that builds a model.")
        built = build(model, target, kwargs)
    elif kwargs:
        raise LoadError(f"{model} is a model already; --kwargs is for a function that builds one.")
    kind = f"factory {model}"
    notes: list[str] = []
    if isinstance(built, ExportedProgram):
        return _from_program(built, shapes, kind, notes)
    if not isinstance(built, nn.Module):
        raise LoadError(f"{model} gave a {type(built).__name__}, not a torch.nn.Module.")
    weights, key = checkpoint
    if weights is not None:
        notes += load_weights(built, weights, trust_pickle, key)
    elif key is not None:
        raise UsageError("--weights-key names a part of --weights.", hint="Give --weights FILE too.")
    if named:
        return _by_keyword(built, shapes.given, named, kind, notes)
    return _from_module(built, shapes, kind, notes + shapes.notes)


def _from_program(program: ExportedProgram, shapes: ClipShapes, kind: str, notes: list[str]) -> Loaded:
    args, kwargs = program.example_inputs or ((), {})
    if kwargs:
        raise LoadError(f"The program takes keyword arguments ({some(list(kwargs))}).", hint="Export it without.")
    inputs = tuple(args) or example_clips(shapes.known)
    tensors = _flatten(inputs)
    own = [tuple(t.shape) for t in tensors]
    if shapes.given and [tuple(s[1:]) for s in shapes.given] != [s[1:] for s in own]:  # streams, as many as there are
        raise UsageError(
            f"The program was exported for {shapes_text(own)}, not {shapes_text(shapes.given)}.",
            hint="Leave --shape out, or export it again with this clip.",
        )
    weights = set(program.graph_signature.parameters)
    _check_tensors([*program.state_dict.items(), *program.constants.items(), *_numbered(tensors)], weights)
    return Loaded(program, inputs, kind, notes)


def _from_script(script: torch.jit.ScriptModule, shapes: ClipShapes, kind: str, notes: list[str]) -> Loaded:
    notes += _made_ready(script)
    inputs: tuple[Any, ...] = example_clips(shapes.known, script)
    schema = script.forward.schema  # type: ignore[attr-defined]
    wanted = [a for a in schema.arguments[1:] if not a.has_default_value()]
    if [a.type.kind() for a in wanted] == ["ListType"]:
        inputs = (list(inputs),)
    elif not len(wanted) <= len(inputs) < len(schema.arguments):
        raise _wrong_count(f"({', '.join(a.name for a in schema.arguments[1:])})", len(inputs))
    _try(script, inputs)
    return Loaded(script, inputs, kind, notes)


def _from_module(module: nn.Module, shapes: ClipShapes, kind: str, notes: list[str]) -> Loaded:
    if isinstance(module, torch.jit.ScriptModule):
        return _from_script(module, shapes, kind, notes)
    notes += _made_ready(module)
    one_by_one, *in_a_list = _calls(module, example_clips(shapes.known, module))
    try:
        _try(module, one_by_one)
    except CaptureError:
        for inputs in in_a_list:  # the networks of PySlowFast take a list, of one clip too
            with suppress(CaptureError):
                _try(module, inputs)
                return Loaded(module, inputs, kind, [*notes, "the model takes its clips in a list"])
        raise
    return Loaded(module, one_by_one, kind, notes)


def _by_keyword(
    module: nn.Module, shapes: Sequence[Shape], named: Mapping[str, Shape], kind: str, notes: list[str]
) -> Loaded:
    """Exports a network with clips that it takes by keyword alone."""
    notes += _made_ready(module)
    clips = example_clips([*shapes, *named.values()], module)
    program = export(module, clips[: len(shapes)], True, dict(zip(named, clips[len(shapes) :], strict=True)))
    return Loaded(program, None, kind, notes)


def _calls(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    """Lists the calls that the model's signature allows: with one clip after the other, or with all in one list."""
    signature = inspect.signature(module.forward)
    found = []
    for call in (inputs, (list(inputs),)):
        with suppress(TypeError):
            signature.bind(*call)
            found.append(call)
    if not found:
        raise _wrong_count(str(signature), len(inputs))
    return found


def _wrong_count(arguments: str, given: int) -> CaptureError:
    return CaptureError(f"The model takes {arguments}, not {given} clip(s).", hint="Give one --shape per input.")


def _try(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Runs the model once, so that a clip it refuses is told in its own words and with the module that refuses."""
    inside: list[str] = []
    handles: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*_: object) -> None:
        inside.pop()

    if not isinstance(module, torch.jit.ScriptModule):
        for name, child in module.named_modules():
            handles += [child.register_forward_pre_hook(enter(name)), child.register_forward_hook(leave)]
    try:
        with torch.no_grad():
            module(*deepcopy(inputs))
    except Co3dError:
        raise
    except Exception as error:
        # TorchScript's message is a traceback; what went wrong stands last.
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = lines[-1] if isinstance(module, torch.jit.ScriptModule) else brief(error)
        shapes = shapes_text([tuple(t.shape) for t in _flatten(inputs)])
        raise CaptureError(
            f"The model refuses a clip of {shapes}: {why}.",
            module_path=inside[-1] if inside else None,
            hint=for_the_cpu(error) or "Give the clip it was trained on with --shape.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _made_ready(module: nn.Module) -> list[str]:
    """Checks the weights of a network, and puts it in eval mode; returns what to say of that."""
    _check_tensors([*module.named_parameters(), *module.named_buffers()], {n for n, _ in module.named_parameters()})
    if not any(getattr(child, "training", False) for child in module.modules()):  # a frozen script has no mode
        return []
    module.eval()
    return ["the model was in training mode; put in eval mode (stored statistics for batch norm, no dropout)"]


def _check_tensors(tensors: Iterable[tuple[str, Any]], weights: Container[str]) -> None:
    """Refuses what ONNX Runtime on a CPU has no convolutions for, weights that are no numbers, and false sizes."""
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type != "cpu":
            hint = "Give it its weights first." if tensor.device.type == "meta" else "Move it with model.cpu()."
            raise LoadError(f"{name} is on device {tensor.device}, not on the CPU.", hint=f"{hint} Then save again.")
        real = tensor.dtype in (torch.float32, torch.float64)
        if (tensor.is_floating_point() or tensor.is_complex()) and not real:
            raise LoadError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; only float32 and float64 models compile.",
                hint="Convert it with model.float() and save or export it again.",
            )
        if tensor.nbytes > max(ALWAYS_ALLOWED, MAX_INFLATION * tensor.untyped_storage().nbytes()):
            held = tensor.untyped_storage().nbytes()
            raise LoadError(f"{name} claims a shape of {show_shape(tensor.shape)} and holds {held} bytes.")
        if name in weights and not bool(torch.isfinite(tensor).all()):
            raise LoadError(f"{name} contains NaN or infinity.", hint="Take weights from before training diverged.")


def _flatten(inputs: Iterable[Any]) -> list[Tensor]:
    return [t for x in inputs for t in (_flatten(x) if isinstance(x, (list, tuple)) else [x]) if isinstance(t, Tensor)]


def _numbered(tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"input {i}", tensor) for i, tensor in enumerate(tensors)]
