"""Opens a compiled model in onnxruntime, checked against its metadata."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import onnxruntime as ort

from co3d_compile.contract.model_contract import METADATA_KEY, Contract, check_graph, refuse_free_rows
from co3d_compile.contract.read_contract import parse
from co3d_compile.errors import ContractError, LoadError, UsageError, not_onnx
from co3d_compile.runtime.buffers import CPU
from co3d_compile.runtime.stored_metadata import properties
from co3d_compile.support.machine import block_channels

Provider: TypeAlias = str | tuple[str, Mapping[str, str | int | float | bool]]


# Memory of these providers' device is bound as it is; the others take and give host memory.
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


@runtime_checkable
class Serializable(Protocol):
    """A compiled model in memory: ``to_bytes()`` is the ONNX file, weights included."""

    def to_bytes(self) -> bytes: ...


def read_source(model: object) -> tuple[str | bytes, bytes]:
    """Reads what onnxruntime opens, and its SHA-256, to which snapshots are tied (of external data: references)."""
    if isinstance(model, (str, os.PathLike)):
        try:
            with open(model, "rb") as file:
                return os.fsdecode(model), hashlib.file_digest(file, "sha256").digest()
        except (OSError, ValueError) as error:
            what = f"{os.fsdecode(model)}: {getattr(error, 'strerror', None) or error}"
            raise LoadError(f"Cannot read the model {what}.", hint="Give an ONNX file.") from error
    if isinstance(model, Serializable) and not isinstance(model, int):
        model = model.to_bytes()
    if not isinstance(model, (bytes, bytearray, memoryview)):
        hint = "Give a path, the bytes of an ONNX file or a compiled model."
        raise UsageError(f"A {type(model).__name__} is no model.", hint=hint)
    return bytes(model), hashlib.sha256(model).digest()


def session_options(threads: int | None) -> ort.SessionOptions:
    """Sets what every session of onnxruntime is opened with; ``threads``: None for onnxruntime's choice."""
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    # Threads that spin between two steps take the cores from other sessions, and from everyone between two frames.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_source(
    source: str | bytes, providers: Sequence[Provider] | None, options: ort.SessionOptions
) -> ort.InferenceSession:
    wanted = ["CPUExecutionProvider"] if providers is None else list(providers)
    names = [item if isinstance(item, str) else item[0] for item in wanted]
    there = ort.get_available_providers()
    missing = [name for name in names if name not in there]
    if missing or not names:
        what = f"onnxruntime has no provider {', '.join(map(str, missing))}." if missing else "There is no provider."
        raise UsageError(what, hint=f"This installation has {', '.join(there)}.")
    try:
        session = ort.InferenceSession(source, options, providers=wanted)
    except Exception as error:
        what = str(error).strip().rstrip(".")
        raise LoadError(f"onnxruntime cannot open the model: {what}.", hint=not_onnx(source)) from error
    if names[0] not in session.get_providers():
        hint = "onnxruntime's warnings name the library that is missing."
        raise UsageError(f"onnxruntime could not start {names[0]}.", hint=hint)
    return session


def device_of(session: ort.InferenceSession) -> tuple[str, int]:
    first = session.get_providers()[0]
    options = session.get_provider_options().get(first, {})
    return (_DEVICES[first], int(options.get("device_id", 0))) if first in _DEVICES else CPU


def stored_contract(session: ort.InferenceSession) -> Contract:
    """Reads the contract in the metadata. Raises ContractError if there is none, or a damaged one."""
    text = properties(session).get(METADATA_KEY)
    if text is None:
        raise ContractError("The ONNX file has no co3d metadata.", hint="Compile the model with co3d-compile.")
    return parse(text)


def check_contract(session: ort.InferenceSession, contract: Contract, batch: int) -> None:
    """Compares a contract with the graph that it describes, this machine, and the number of streams."""
    if contract.native not in (None, block_channels()):
        what = f"The model was compiled with --native for blocks of {contract.native} channels"
        raise UsageError(f"{what}; this machine has blocks of {block_channels()}.", hint="Compile it here, or without.")
    if batch != 1:
        refuse_free_rows(contract, f"A batch of {batch} streams")
    rows = [state.shape[state.batch_dim] for state in contract.states]
    for fixed in [*rows, *(spec.shape[0] for spec in contract.inputs if spec.shape)]:
        if fixed not in ("N", "K", batch):
            raise UsageError(f"The model was compiled for a batch of {fixed}, not {batch}.", hint=f"Use batch={fixed}.")
    check_graph(contract, session.get_inputs(), session.get_outputs(), batch)
