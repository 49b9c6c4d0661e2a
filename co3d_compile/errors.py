"""The errors that a user can meet. Each names the operator and module path where there is one, and the way out."""

from __future__ import annotations

import os
from collections.abc import Sequence


class Co3dError(Exception):
    """Base of every error raised on purpose by this package.

    Args:
        message: What is wrong, in one sentence.
        operator: ATen or ONNX operator at fault, if one is.
        module_path: Dotted path of the module that owns the operator, if known.
        hint: The way out: what the user can do next.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, operator: str | None = None, module_path: str | None = None, hint: str | None = None
    ) -> None:
        self.message = message
        self.operator = operator
        self.module_path = module_path
        self.hint = hint
        where = ""
        if operator:
            where = f" [{operator}" + (f" in {module_path}" if module_path else "") + "]"
        elif module_path:
            where = f" [{module_path}]"
        super().__init__(message + where + (f" {hint}" if hint else ""))


class UsageError(Co3dError):
    """An argument, option or combination of options that makes no sense."""

    exit_code = 2


class VerificationError(Co3dError):
    """The compiled model does not agree with the untouched model."""

    exit_code = 3


class LoadError(Co3dError):
    """The model file, weights or factory cannot be read, or must not be (pickles)."""

    exit_code = 4


class CaptureError(Co3dError):
    """The model refuses the clip, or ``torch.export`` cannot capture it."""

    exit_code = 4


class UnsupportedError(Co3dError):
    """Something has no meaning on a stream, and falling back to a window was refused or is impossible."""

    exit_code = 5


class PassError(Co3dError):
    """A pass broke the graph or a promise; the pass is named."""

    exit_code = 5


class OutputError(Co3dError):
    """The compiled model cannot be written."""

    exit_code = 6


class ContractError(Co3dError):
    """An ONNX file that does not keep the contract of docs/contract.md, or damaged metadata."""

    exit_code = 4


class SessionError(Co3dError):
    """Wrong use of a stream session: shape, dtype, number of inputs, foreign state."""

    exit_code = 2


class Co3dWarning(UserWarning):
    """Something the user should know that stops nothing."""


def first_line(error: Exception) -> str:
    """The first line of what a library says went wrong; its kind, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def without_extension(operators: Sequence[str], hint: str) -> UnsupportedError:
    """Makes the error of a network of which parts would run again at each step, where that is refused."""
    return UnsupportedError(f"These operators have no extension beyond the clip: {'; '.join(operators)}.", hint=hint)


def not_onnx(model: str | os.PathLike[str] | bytes) -> str:
    """Says the way out with a file, or its content, that onnxruntime does not open."""
    if isinstance(model, bytes):
        start = model[:2]
    else:
        with open(model, "rb") as file:
            start = file.read(2)
    pytorch = start in (b"PK", b"\x80\x02")
    return "It is a PyTorch file: compile it with co3d-compile first." if pytorch else "Is it a whole ONNX file?"
