"""States as float16: they are kept in half the bytes, and every operator computes in float32 as before.

    state (float32) -> operators -> next state (float32)
    state (float16) -> Cast -> operators -> Cast -> next state (float16)

A state that moves on unchanged is not cast on the way: half of the bytes move.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from co3d_compile.contract.model_contract import Contract, StateSpec
from co3d_compile.errors import UsageError

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)


def with_half_states(model: ir.Model, contract: Contract) -> tuple[ir.Model, Contract]:
    """Gives the model with its float32 states as float16, and its contract. States of other dtypes stay as they are.

    Raises:
        UsageError: None of them is float32.
    """
    chains = [chain for chain in contract.chains() if all(map(_fits, chain))]
    if not chains:
        dtypes = ", ".join(sorted({state.dtype for state in contract.states}))
        has = f"only states of {dtypes}" if dtypes else "no state"
        raise UsageError(f"Nothing becomes float16 by half-states: the model has {has}.", hint="Keep it as it is.")
    half = ir.from_proto(ir.to_proto(model))
    graph = half.graph
    names = {state.input for chain in chains for state in chain}
    results = {value.name: value for value in graph.outputs}
    for chain in chains:
        _narrow_result(graph, results[chain[0].output], names)
    for value in graph.inputs:
        if value.name in names:
            _narrow_input(graph, value)
    states = tuple(dataclasses.replace(s, dtype="float16") if s.input in names else s for s in contract.states)
    options = {**contract.options, "state_dtype": "float16"}
    return half, dataclasses.replace(contract, states=states, options=options)


def _fits(state: StateSpec) -> bool:
    """Says whether it is float32, and starts at a value that float16 has: infinity is one, the least float32 is not."""
    return state.dtype == "float32" and (not np.isfinite(state.initial) or abs(state.initial) <= LARGEST)


def _narrow_input(graph: ir.Graph, value: ir.Value) -> None:
    """Makes everything read the state through a cast, but what only hands it on."""
    value.dtype = HALF
    uses = [(user, index) for user, index in value.uses() if user.outputs[0].dtype != HALF]
    if not uses:
        return
    cast = ir.node("Cast", [value], {"to": int(FLOAT)})
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.dtype = f"{value.name}.float32", value.shape, FLOAT
    for user, index in uses:
        user.replace_input_with(index, wide)
    graph.insert_before(graph[0], cast)


def _narrow_result(graph: ir.Graph, value: ir.Value, states: set[str]) -> None:
    """Gives the next state a cast, unless it is another state that moves on."""
    node = value.producer()
    if node is not None and node.op_type == "Identity" and not value.uses():
        source = node.inputs[0]
        if source is not None and source.is_graph_input() and source.name in states:
            value.dtype = HALF
            return
    index, name = next((i, v.name) for i, v in enumerate(graph.outputs) if v is value)
    cast = ir.node("Cast", [value], {"to": int(HALF)})
    narrow = cast.outputs[0]
    value.name, narrow.name = f"{name}.float32", name
    narrow.shape, narrow.dtype = value.shape, HALF
    graph.append(cast)
    graph.outputs[index] = narrow
