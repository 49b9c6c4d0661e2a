"""A model from code: import a factory, call it, give what it builds its weights."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from co3d_compile.capture.archive_safety import (
    PICKLE,
    check_inflation,
    identify,
    is_safetensors,
    refuse_foreign,
)
from co3d_compile.errors import LoadError

log = logging.getLogger(__name__)
T = TypeVar("T")
_NESTS = ("state_dict", "model_state", "model_state_dict", "model")


def show_shape(shape: Iterable[int]) -> str:
    """Writes a shape as on the command line: ``1x3x16x224x224``."""
    return "x".join(map(str, shape))


def brief(error: BaseException) -> str:
    """Returns the first line of an exception, short enough to stand in a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name


def import_target(model: str) -> Any:
    """Returns the object that ``package.module:attribute`` names."""
    module_name, attribute = model.split(":")
    import_from_here()
    try:
        target: Any = with_torchvision(lambda: importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        searched = f" The current directory, {Path.cwd()}, was searched too." if error.name == module_name else ""
        raise LoadError(f"{model}: there is no module named {error.name}.{searched}") from error
    except (Exception, SystemExit) as error:
        raise LoadError(f"{model}: importing {module_name} fails: {brief(error)}.") from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, dir(target), n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else None
            raise LoadError(f"{model}: {module_name} has no {attribute}.", hint=hint)
        target = getattr(target, part)
    return target


def build(model: str, factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls a factory; ``model`` is its name for messages."""
    called = f"{model}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})"
    try:
        return with_torchvision(lambda: factory(**kwargs))
    except (Exception, SystemExit) as error:
        raise LoadError(f"{called} fails: {brief(error)}.", hint="Its arguments come from --kwargs.") from error


def import_from_here() -> None:
    """Makes the current directory importable for good: a forward may import late."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def with_torchvision(action: Callable[[], T]) -> T:
    """Runs an action that may import torchvision, whose compiled part does not load beside a CPU torch.

    Its video models need none of that part; only the registrations for missing operators stop the import.
    """
    try:
        return action()
    except RuntimeError as error:
        stub = "torchvision._meta_registrations"
        if "torchvision::" not in str(error) or stub in sys.modules:
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        sys.modules[stub] = types.ModuleType(stub)
        log.info("torchvision's compiled operators do not load beside this torch; going on without them")
        return action()


def load_weights(module: nn.Module, path: Path, trust_pickle: bool = False) -> list[str]:
    """Puts a state dict into a module; returns notes for the user.

    Raises:
        LoadError: The file cannot be read, or its names or shapes are not those of the module.
    """
    own = module.state_dict()
    state, notes = _named_as(own, read_state_dict(path, trust_pickle), path)
    problems = {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} ({show_shape(v.shape)}, the model has {show_shape(own[k].shape)})"
            for k, v in state.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    found = [f"{len(keys)} {what}: {some(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise LoadError(
            f"{path} does not fit the model ({'; '.join(found)}).",
            hint="Check --kwargs (such as the number of classes) and the names of the layers.",
        )
    module.load_state_dict(state, strict=False)
    other = sorted({str(v.dtype) for k, v in state.items() if v.dtype != own[k].dtype})
    return notes + ([f"weights of {path} are {', '.join(other)}; converted to the model's own type"] if other else [])


def _named_as(own: Mapping[str, Tensor], state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns a state dict without what wraps a model and its names, and what was taken off or left out.

    ``torch.compile`` puts ``_orig_mod`` into names, ``DataParallel`` and Lightning a prefix before all of them. It is
    found by the names of the model. Under another prefix may lie what only training needs, such as a loss.
    """
    if not any("_orig_mod." in name for name in own):
        state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    if not needed or needed & state.keys():
        return state, []
    last = max(needed, key=len)
    prefixes = {name.removesuffix(last) for name in state if name.endswith(f".{last}")}
    fitting = [p for p in sorted(prefixes) if all(p + name in state for name in needed)]
    if len(fitting) != 1:
        return state, []
    prefix = fitting[0]
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    outside = [name for name in state if not name.startswith(prefix)]
    notes = [f"weights of {path} are named {prefix}…; the prefix was taken off"]
    return inside, notes + ([f"{len(outside)} other tensors were left out: {some(outside)}"] if outside else [])


def _check_weights(path: Path, head: bytes) -> None:
    """Says what a file is that holds no weights of its own, where PyTorch would call it damaged or dangerous."""
    check_inflation(path)
    refuse_foreign(path, head)
    if not is_safetensors(head) and not head.startswith((b"PK", b"\x80")):
        raise LoadError(f"{path} holds no weights.", hint="A torch.save or a safetensors file is wanted.")
    if head.startswith(b"PK") and (kind := identify(path)) != PICKLE:
        raise LoadError(f"{path} is a {kind}, which has its weights in it.", hint="Give it as the model, alone.")


def read_state_dict(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Reads named tensors: safetensors or torch.save, also nested in a checkpoint. Nothing is unpickled without trust.

    Raises:
        LoadError: The file cannot be read, holds no tensors, or must not be unpickled.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise LoadError(f"Weights {path} cannot be read: {error.strerror}.") from error
    _check_weights(path, head)
    try:
        if is_safetensors(head):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            import_from_here()
            state = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except ImportError as error:
        raise LoadError(f"{path} is a safetensors file.", hint="Install the package safetensors to read it.") from error
    except Exception as error:
        if "Weights only load failed" in str(error) and "Unsupported " in str(error):
            raise LoadError(
                f"Weights {path} hold pickled objects, which can run any code when opened.",
                hint="Save only tensors: torch.save(model.state_dict(), 'weights.pt'). "
                "If you trust where it comes from, give --trust-pickle.",
            ) from error
        raise LoadError(f"Weights {path} cannot be read: {brief(error)}.") from error
    for _ in range(3):  # a checkpoint may nest it, but not without end
        inner = [state[key] for key in _NESTS if isinstance(state, dict) and isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        held = f"keys {some([str(k) for k in state])}" if isinstance(state, dict) else type(state).__name__
        raise LoadError(f"{path} holds no state dict ({held}).")
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}


def some(names: Sequence[str]) -> str:
    """Returns the first few names of a list that may be long."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
