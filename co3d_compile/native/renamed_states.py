"""States that only move by a slot are renamed, not copied: what ``state_io="renamed"`` gives, of a finished file.

s0 -> Identity -> next s1          (paired)
s1 takes its next value from s0    (renamed: the output is gone)
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from co3d_compile.contract.model_contract import Contract, StateSpec


def rename_states(model: ir.Model, contract: Contract) -> Contract:
    """Takes outputs that only hand on another state out of the model. Returns the contract of what is left."""
    states = {state.input: state for state in contract.states}
    results = {str(value.name): value for value in model.graph.outputs}
    takes = {state.input: state.output for state in contract.states if state.output in states}
    gone: set[str] = set()
    for state in contract.states:
        source = _moved(results[state.output], states) if state.output in results else None
        if source is not None and _can_take(state, source, takes):
            takes[state.input] = source.input
            gone.add(state.output)
    kept = [value for value in model.graph.outputs if value.name not in gone]
    dropped = [value for value in model.graph.outputs if value.name in gone]
    model.graph.outputs[:] = kept
    for value in dropped:
        node = value.producer()
        if node is not None and not value.uses():
            model.graph.remove(node, safe=True)
    renamed = tuple(dataclasses.replace(s, output=takes.get(s.input, s.output)) for s in contract.states)
    return dataclasses.replace(contract, states=renamed)


def _moved(value: ir.Value, states: dict[str, StateSpec]) -> StateSpec | None:
    """Finds the state that an output hands on unchanged."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Identity" else None
    return states.get(str(source.name)) if source is not None and source.is_graph_input() else None


def _can_take(state: StateSpec, source: StateSpec, takes: dict[str, str]) -> bool:
    """Says whether a state may take its value from another.

    Of the same kind, handed on to no third, and not in a circle.
    """
    alike = (source.shape, source.dtype, source.batch_dim) == (state.shape, state.dtype, state.batch_dim)
    if not alike or source.input in takes.values():
        return False
    before: str | None = source.input
    while before is not None:
        if before == state.input:
            return False
        before = takes.get(before)
    return True
