"""A model from code: import a factory, and call it."""

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

from co3d_compile.errors import LoadError

log = logging.getLogger(__name__)
T = TypeVar("T")


def show_shape(shape: Iterable[int]) -> str:
    """Writes a shape as on the command line: ``1x3x16x224x224``."""
    return "x".join(map(str, shape))


def brief(error: BaseException) -> str:
    """The first line of an exception, short enough to stand in a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name


def import_target(model: str) -> Any:
    """Imports the object that ``package.module:attribute`` names, or ``folder/file.py:attribute``."""
    module_name, _, attribute = model.rpartition(":")
    import_from_here()
    file = Path(module_name).resolve() if module_name.endswith(".py") else None
    if file is not None:
        module_name = _module_in(file)
    try:
        target: Any = with_torchvision(lambda: importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        searched = f" The current directory, {Path.cwd()}, was searched too." if error.name == module_name else ""
        raise LoadError(f"{model}: there is no module named {error.name}.{searched}") from error
    except (Exception, SystemExit) as error:
        hint = for_the_cpu(error)
        raise LoadError(f"{model}: importing {module_name} fails: {brief(error)}.", hint=hint) from error
    if file is not None and Path(getattr(target, "__file__", None) or "").resolve() != file:
        raise LoadError(f"{model}: another module is called {module_name}.", hint="Rename the file.")
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
        hint = for_the_cpu(error) or """Its arguments come from --kwargs, such as --kwargs '{"num_classes": 400}'."""
        raise LoadError(f"{called} fails: {brief(error)}.", hint=hint) from error


def for_the_cpu(error: BaseException) -> str | None:
    """Says the way out for code that asks for a GPU; None: it is not that."""
    said = str(error).lower()
    if "cuda" not in said and "nvidia" not in said:
        return None
    return "It compiles on the CPU: let the code ask for the device of its input (x.device), not for a GPU."


def _module_in(file: Path) -> str:
    """Makes a file importable, with what lies beside it as for a script, and gives the name by which it is imported.

    Where the current directory is above it, that is where names begin; elsewhere above the outermost ``__init__.py``.
    """
    if not file.is_file():
        raise LoadError(f"There is no file {file}.")
    root = Path.cwd()
    if not file.is_relative_to(root) or any("." in part for part in file.relative_to(root).with_suffix("").parts):
        root = file.parent
        while (root / "__init__.py").is_file():
            root = root.parent
    sys.path += [str(folder) for folder in (root, file.parent) if str(folder) not in sys.path]
    return ".".join(file.relative_to(root).with_suffix("").parts)


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


def some(names: Sequence[str]) -> str:
    """Lists the first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
