"""The weights in a checkpoint, and which of them belong to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from co3d_compile.capture.model_files.archive_safety import (
    PICKLE,
    check_inflation,
    identify,
    is_safetensors,
    refuse_foreign,
)
from co3d_compile.capture.model_files.model_factory import brief, import_from_here, show_shape, some
from co3d_compile.errors import LoadError, UsageError

State = dict[str, Tensor]
USUAL = ("", "state_dict", "model_state", "model_state_dict", "model")
"""What the weights are called that are meant, where several fit."""
DEPTH = 3  # a checkpoint may nest them, but not without end


def load_weights(module: nn.Module, path: Path, trust_pickle: bool = False, key: str | None = None) -> list[str]:
    """Puts a state dict into a module; returns notes for the user.

    Args:
        module: What takes the weights.
        path: A state dict, alone or somewhere in a checkpoint.
        trust_pickle: Unpickle whatever the file holds.
        key: Where in the checkpoint it is, such as ``state_dict_ema`` or ``ema.module``.

    Raises:
        LoadError: The file cannot be read, or its names or shapes are not those of the module.
        UsageError: There is nothing under the key, or several would do.
    """
    own = module.state_dict()
    content = read_checkpoint(path, trust_pickle)
    found = dict(_state_dicts(content, ""))
    if not found:
        held = f"keys {some(list(map(str, content)))}" if isinstance(content, Mapping) else type(content).__name__
        raise LoadError(f"{path} holds no state dict ({held}).")
    if key is not None and key not in found:
        raise UsageError(f"{path} has no weights under {key!r}.", hint=f"It has some under {_keys(found)}.")
    named = {at: _named_as(own, state, path) for at, state in found.items()}
    fitting = [at for at in ([key] if key is not None else named) if not _problems(own, named[at][0])]
    at = _chosen(path, fitting) if fitting else min(named, key=_rank) if key is None else key
    state, notes = named[at]
    if problems := _problems(own, state):
        where = f" ({at})" if at and len(found) > 1 else ""
        hint = "Check --kwargs (such as the number of classes) and the names of the layers."
        raise LoadError(f"{path}{where} does not fit the model ({problems}).", hint=hint)
    module.load_state_dict(state, strict=False)
    other = sorted({str(v.dtype) for k, v in state.items() if v.dtype != own[k].dtype})
    more = [each for each in fitting if each != at]
    if at not in USUAL or more:
        notes = [f"weights of {path} are those under {at or 'no key'}", *notes]
    notes += [f"those under {_keys(more)} fit too; --weights-key takes them"] if more else []
    return notes + ([f"weights of {path} are {', '.join(other)}; converted to the model's own type"] if other else [])


def _chosen(path: Path, fitting: list[str]) -> str:
    """Chooses which of several state dicts is meant."""
    first, *others = sorted(fitting, key=_rank)
    if others and _rank(first) == len(USUAL):
        raise UsageError(f"Several weights of {path} fit: {_keys(fitting)}.", hint="Give one of them as --weights-key.")
    return first


def _rank(key: str) -> int:
    """Says how usual a place is: the last of its names that is not usual spoils it."""
    return max(USUAL.index(part) if part in USUAL else len(USUAL) for part in key.split("."))


def _keys(found: Iterable[str]) -> str:
    return some([key or "no key" for key in found])


def _state_dicts(content: Any, at: str, depth: int = DEPTH) -> Iterator[tuple[str, State]]:
    """Yields every set of named tensors in a checkpoint, and where it is; a module stands for its own."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield at, tensors
    for name, value in content.items():
        if depth and isinstance(name, str) and isinstance(value, (Mapping, nn.Module)):
            yield from _state_dicts(value, f"{at}.{name}" if at else name, depth - 1)


def _problems(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Says what keeps a state dict from being that of the model; empty: nothing does."""
    problems = {
        "missing": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} ({show_shape(v.shape)}, the model has {show_shape(own[k].shape)})"
            for k, v in state.items()
            if k in own and v.shape != own[k].shape
        ],
    }
    return "; ".join(f"{len(keys)} {what}: {some(keys)}" for what, keys in problems.items() if keys)


def _named_as(own: Mapping[str, Tensor], state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Takes from a state dict what wraps a model and its names, and says what was taken off or left out.

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


def read_checkpoint(path: Path, trust_pickle: bool = False) -> Any:
    """Reads a safetensors or a torch.save file. Nothing is unpickled without trust.

    Raises:
        LoadError: The file cannot be read, or must not be unpickled.
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

            return load_file(path)
        import_from_here()
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
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
