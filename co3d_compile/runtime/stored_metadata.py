"""The metadata of a file, read without a session."""

from __future__ import annotations

from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING

from co3d_compile.contract.json_readers import HINT
from co3d_compile.contract.model_contract import METADATA_KEY, REPORT_KEY, Contract
from co3d_compile.contract.read_contract import parse
from co3d_compile.contract.stored_report import stored_report
from co3d_compile.errors import ContractError, LoadError, not_onnx
from co3d_compile.support.plain_types import JsonObject

if TYPE_CHECKING:
    import onnxruntime as ort

Stored = tuple[Contract, JsonObject | None]


def properties(session: ort.InferenceSession) -> dict[str, str]:
    """Reads the metadata entries of a file.

    Raises:
        ContractError: They are no text.
    """
    try:
        found: dict[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise ContractError(f"The metadata of the file is no text: {error}.", hint=HINT) from error
    return found


_KEY = b"\x0a" + bytes([len(METADATA_KEY)]) + METADATA_KEY.encode() + b"\x12"  # the entry as protocol buffers write it


def is_compiled(model: Path) -> bool:
    """Says whether an ONNX file was written by the compiler: a look at its bytes, which opens no model."""
    with model.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return content.rfind(_KEY) >= 0


def read_contract(model: Path) -> Contract:
    """Reads the metadata of a compiled file.

    Raises:
        LoadError: The file cannot be read or is no ONNX model.
        ContractError: It was not written by the compiler, or its metadata is damaged.
    """
    return read_stored(model)[0]


def read_stored(model: Path) -> Stored:
    """Reads the contract and the report of a compiled file, as ``read_contract``; no report: it has none."""
    import onnxruntime as ort

    from co3d_compile.support.cpu_session import cpu_session

    if not model.is_file():
        raise LoadError(f"There is no file {model}.")
    ort.set_default_logger_severity(4)
    try:
        session = cpu_session(model, optimized=False)
    except Exception as error:
        what = f"{model} is no ONNX model that ONNX Runtime can open: {str(error)[:300].rstrip('.')}."
        raise LoadError(what, hint=not_onnx(model)) from error
    stored = properties(session)
    if METADATA_KEY not in stored:
        raise ContractError(f"{model} was not written by co3d-compile.", hint="Compile a PyTorch model first.")
    return parse(stored[METADATA_KEY]), stored_report(stored[REPORT_KEY]) if REPORT_KEY in stored else None
