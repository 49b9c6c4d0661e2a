"""A digest of the weights in a compiled file, so that a change after compiling is noticed (docs/contract.md)."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import Co3dError, ContractError

if TYPE_CHECKING:
    import onnx_ir as ir

CHANGED = "The weights in the file are not those that it was compiled with"
UNKNOWN = "The file does not say what its weights were when it was compiled: an older compiler wrote it"


def weights_digest(model: ir.Model) -> str:
    """Computes the SHA-256 over all initialisers in the order of their names: name, dtype, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None:
            digest.update(json.dumps([name, tensor.dtype.name, tensor.shape.numpy()]).encode())
            digest.update(tensor.tobytes())
    return digest.hexdigest()


def wrong_weights(contract: Contract, source: str | bytes) -> str:
    """Says what is wrong with the weights of a file; empty if they are as compiled.

    Args:
        contract: Its contract.
        source: The path of the file, or its bytes.

    Raises:
        Co3dError: A package is missing.
    """
    if contract.weights_sha256 is None:
        return UNKNOWN
    try:
        import onnx
        import onnx_ir as ir
    except ImportError as error:
        hint = "Install it with pip install onnx-ir."
        raise Co3dError("Checking weights needs the packages onnx and onnx-ir.", hint=hint) from error
    model = ir.load(source) if isinstance(source, str) else ir.from_proto(onnx.load_from_string(source))
    return "" if weights_digest(model) == contract.weights_sha256 else CHANGED


def check_weights(contract: Contract, source: str | bytes) -> None:
    """Raises ContractError where the weights are others than when the file was compiled, or where it does not say."""
    wrong = wrong_weights(contract, source)
    if wrong:
        raise ContractError(f"{wrong}.", hint="Compile the model again, or open the file without checking its weights.")
