"""co3d-compile: from a trained clip-based 3D CNN to a model that runs frame by frame.

The public names and their modules stand in ``__init__.pyi``, which type checkers read too. A name is imported when
it is first used: running a compiled model needs neither torch nor onnx.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {line.names[0].name: line.module for line in _STUB.body if isinstance(line, ast.ImportFrom)}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise _missing(name, error) from None
    globals()[name] = value
    return value


def _missing(name: str, error: ModuleNotFoundError) -> Exception:
    """Writes one line for a package that this part of ours needs; what is missing of our own stays as it is."""
    from co3d_compile.errors import Co3dError
    from co3d_compile.support.install_hint import install_command

    if (error.name or "").partition(".")[0] not in ("torch", "onnx", "onnxscript", "onnx_ir"):
        return error
    what = f"co3d_compile.{name} needs {error.name}, which is not installed."
    return Co3dError(what, hint=install_command("co3d-compile[compile]"))


def __dir__() -> list[str]:
    return __all__
