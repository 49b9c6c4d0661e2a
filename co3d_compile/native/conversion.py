"""From a compiled file to the one that runs in its place: states renamed, in the layout of this machine's kernels."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from co3d_compile.contract.model_contract import METADATA_KEY, Contract
from co3d_compile.native.native_layout import in_native_layout
from co3d_compile.native.renamed_states import rename_states
from co3d_compile.native.running_form import RUNNING_KEY, RunningForm
from co3d_compile.support.machine import block_channels


class NothingGained(Exception):
    """No other form of this file is faster; the message says why."""


def convert(content: bytes, contract: Contract) -> bytes:
    """Writes the file that runs in place of the given one, as bytes.

    Its metadata holds the given file's contract under the usual key, and its own form under ``RUNNING_KEY``.

    Raises:
        NothingGained: No state moves, and none can be kept in blocks; or the weights lie in another file.
    """
    model = ir.from_proto(onnx.load_from_string(content))
    if any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values()):
        raise NothingGained("its weights are in a file of their own")
    given = model.metadata_props[METADATA_KEY]
    running, blocked = rename_states(model, contract), frozenset[str]()
    if block_channels() > 1:
        model, running, blocked = in_native_layout(model, running)
    if running.states == contract.states and not blocked:
        raise NothingGained("no state moves or is an image of a convolution")
    model.metadata_props[METADATA_KEY] = given
    model.metadata_props[RUNNING_KEY] = RunningForm(running, blocked).to_json()
    file: bytes = ir.to_proto(model).SerializeToString()
    return file
