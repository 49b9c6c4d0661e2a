"""The form in which a compiled model runs on this machine, and how its states correspond to those of the given file.

Needs numpy alone: whoever opens a form that is already there converts nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec, StateSpec, resolve
from co3d_compile.contract.read_contract import parse
from co3d_compile.errors import ContractError
from co3d_compile.support.plain_types import Array

RUNNING_KEY = "co3d_running"
LEAST_BYTES = 1 << 18  # states of one stream that take less are moved in some ten microseconds


@dataclass(frozen=True)
class RunningForm:
    """What is known of a file that runs in place of the given one.

    Attributes:
        contract: The contract of this file. Its states have the names of the given file's.
        blocked: States whose channels lie in blocks, though they do not in the given file.
    """

    contract: Contract
    blocked: frozenset[str] = frozenset()

    def to_given(self, state: StateSpec, values: Array) -> Array:
        """Gives the values of a state as the given file has them; ``state`` is the state there."""
        if state.input not in self.blocked:
            return values
        block, (rows, channels, *space) = self.contract.native or 1, values.shape
        apart = values.reshape(rows, channels // block, *space, block)
        return np.ascontiguousarray(np.moveaxis(apart, -1, 2).reshape(values.shape)[:, : state.shape[1]])

    def from_given(self, state: StateSpec, values: Array) -> Array:
        """Gives the values of a state as this file has them; channels that fill the last block are zero."""
        if state.input not in self.blocked:
            return values
        block, (rows, channels, *space) = self.contract.native or 1, values.shape
        blocks = -(-channels // block)
        whole = np.zeros((rows, blocks * block, *space), values.dtype)
        whole[:, :channels] = values
        apart = np.moveaxis(whole.reshape(rows, blocks, block, *space), 2, -1)
        return np.ascontiguousarray(apart).reshape(whole.shape)

    def to_json(self) -> str:
        """Writes the form as JSON, which :func:`running_form` reads."""
        return json.dumps({"contract": self.contract.to_json(), "blocked": sorted(self.blocked)})


def running_form(metadata: Mapping[str, str]) -> RunningForm | None:
    """Reads what the metadata of a file says of its form; None: it is a file as the compiler gives it.

    Raises:
        ContractError: The metadata is damaged.
    """
    if RUNNING_KEY not in metadata:
        return None
    try:
        data = json.loads(metadata[RUNNING_KEY])
        return RunningForm(parse(data["contract"]), frozenset(map(str, data["blocked"])))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ContractError("The metadata of a converted file is damaged.") from error


def why_plain(contract: Contract) -> str:
    """Says why another form than that of the given file would gain nothing, as far as its contract tells.

    Empty: it may.
    """
    if contract.native is not None:
        return "it was compiled with --native"
    tensors: list[InputSpec | OutputSpec | StateSpec] = [*contract.inputs, *contract.outputs, *contract.states]
    if any(not isinstance(size, int) and size != "N" for tensor in tensors for size in tensor.shape):
        return "its sizes are known at each step only"
    if state_bytes(contract) < LEAST_BYTES:
        return "its states are small"
    return ""


def state_bytes(contract: Contract) -> int:
    """Counts the bytes of the states of one stream."""
    return sum(math.prod(resolve(s.shape, 1)) * np.dtype(s.dtype).itemsize for s in contract.states)
