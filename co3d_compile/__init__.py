"""co3d-compile: from a trained clip-based 3D CNN to a model that runs frame by frame.

Names are imported when they are first used: running a compiled model needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from co3d_compile.version import __version__

if TYPE_CHECKING:
    from co3d_compile.compiled_model import CompiledModel
    from co3d_compile.compiler import compile
    from co3d_compile.contract import Contract
    from co3d_compile.custom import rule
    from co3d_compile.errors import (
        CaptureError,
        Co3dError,
        Co3dWarning,
        ContractError,
        LoadError,
        OutputError,
        PassError,
        SessionError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from co3d_compile.facts import Kernel
    from co3d_compile.manager import Pass, PassList
    from co3d_compile.passes import default_passes
    from co3d_compile.predictor import Prediction, Predictor, predict
    from co3d_compile.preprocess import Preprocess
    from co3d_compile.program import Program
    from co3d_compile.session import StreamSession
    from co3d_compile.source import Source, read_source

_WHERE = {
    "compiled_model": ["CompiledModel"],
    "compiler": ["compile"],
    "contract": ["Contract"],
    "custom": ["rule"],
    "errors": [
        "CaptureError",
        "Co3dError",
        "Co3dWarning",
        "ContractError",
        "LoadError",
        "OutputError",
        "PassError",
        "SessionError",
        "UnsupportedError",
        "UsageError",
        "VerificationError",
    ],
    "facts": ["Kernel"],
    "manager": ["Pass", "PassList"],
    "passes": ["default_passes"],
    "predictor": ["Prediction", "Predictor", "predict"],
    "preprocess": ["Preprocess"],
    "program": ["Program"],
    "session": ["StreamSession"],
    "source": ["Source", "read_source"],
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "CaptureError",
    "Co3dError",
    "Co3dWarning",
    "CompiledModel",
    "Contract",
    "ContractError",
    "Kernel",
    "LoadError",
    "OutputError",
    "Pass",
    "PassError",
    "PassList",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Program",
    "SessionError",
    "Source",
    "StreamSession",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "__version__",
    "compile",
    "default_passes",
    "predict",
    "read_source",
    "rule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
