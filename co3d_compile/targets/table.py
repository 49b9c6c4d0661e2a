"""The table of targets: the shapes that a compiled model can take, each in a file of its own.

``CompiledModel`` converts by it, ``co3d export`` offers what writes, ``co3d doctor`` says what each row needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from co3d_compile.contract.model_contract import Contract
    from co3d_compile.targets.settings import Settings


@dataclass(frozen=True)
class Target:
    """One shape of the result. Names of functions and classes are ``module:name`` below this package's parent.

    Attributes:
        name: The word for it; ``co3d export --NAME`` where it writes.
        feature: What it is good for, as ``co3d doctor`` says.
        packages: What it needs, by import name.
        install: How to get that.
        convert: From an ONNX model, its contract and maybe more to another model and its contract.
        inexact: How its results differ, if they do.
        write: Writes a compiled file by its contract and settings to a folder or file, whose path it returns.
        settings: The class of these settings.
        metavar: What stands for the folder or file in ``--help``.
        text: What the command does, in ``--help``.
        done: What was done, with ``{states}`` for ``3 states``.
    """

    name: str
    feature: str
    packages: tuple[str, ...]
    install: str
    convert: str = ""
    inexact: str = ""
    write: str = ""
    settings: str = ""
    metavar: str = ""
    text: str = ""
    done: str = ""

    def converter(self) -> Callable[..., tuple[ir.Model, Contract]]:
        """Imports the function that converts."""
        function: Callable[..., tuple[ir.Model, Contract]] = _loaded(self.convert)
        return function

    def writer(self) -> Callable[..., Path]:
        """Imports the function that writes."""
        function: Callable[..., Path] = _loaded(self.write)
        return function

    def settings_class(self) -> type[Settings]:
        """Imports the class of its settings."""
        found: type[Settings] = _loaded(self.settings)
        return found


def _loaded(name: str):  # type: ignore[no-untyped-def]
    """Imports what ``module:name`` names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(f"co3d_compile.{module}"), attribute)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "native",
            "convert to this machine's layout",
            ("onnxruntime", "onnx_ir"),
            "co3d-compile[native]",
            convert="native.native_layout:to_native",
        ),
        Target(
            "half-states",
            "convert to float16 states",
            ("onnx_ir",),
            "co3d-compile[compile]",
            convert="targets.half_states:with_half_states",
            inexact="States are kept as float16",
        ),
        Target(
            "int8",
            "convert to 8 bits",
            ("onnxruntime", "onnx"),
            "co3d-compile[compile]",
            convert="targets.int8:to_int8",
            inexact="Convolutions compute in 8 bits",
        ),
        Target(
            "triton",
            "export for Triton",
            ("numpy",),
            "co3d-compile",
            write="targets.triton_repository:write_repository",
            settings="targets.triton_repository:Options",
            metavar="REPO",
            text="Write the model and its config.pbtxt into a repository of Triton Inference Server.",
            done="{states} kept by the server",
        ),
        Target(
            "litert",
            "export for phones (LiteRT)",
            ("litert_torch", "ai_edge_litert"),
            "co3d-compile[litert]",
            write="targets.litert:write_tflite",
            settings="targets.litert:Options",
            metavar="OUT.tflite",
            text="Write the step as a LiteRT file, for phones, after it gave the same results here.",
            done="{states} as inputs and outputs",
        ),
    )
}
