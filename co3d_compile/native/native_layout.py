"""``to_native``: a compiled model in the blocked layout of this machine's kernels, states and all.

ONNX Runtime's convolutions on a CPU work on channels in blocks. It puts a reorder where a tensor enters or leaves them,
and so around every state, as graph inputs and outputs are plain. Here its own optimiser lays out the whole step, with a
stand-in for a blocked producer behind each state; then the stand-ins go, and the states stay in blocks between steps.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from co3d_compile.contract.model_contract import Contract, StateSpec
from co3d_compile.errors import UnsupportedError
from co3d_compile.native.blocked_tensors import BLOCKED, in_blocks, keep_blocked
from co3d_compile.support.machine import block_channels

ALIGNED = 4  # channels of a depthwise convolution that the blocked kernels take are a multiple of this
_PROBE, _STAND_IN = "co3d.probe.", "co3d.ones."


@dataclass
class _Place:
    """Where a state enters or leaves the optimised graph.

    Attributes:
        value: What stands for the state in its plain layout: read by the graph, or computed by it.
        blocked: The same in blocks, if that is how the graph has it.
    """

    value: ir.Value
    blocked: ir.Value | None


def to_native(model: ir.Model, contract: Contract) -> tuple[ir.Model, Contract]:
    """Lays the model out as ONNX Runtime does on this machine, states in blocks too, and changes its contract.

    Raises:
        UnsupportedError: ONNX Runtime has no blocked layout here.
    """
    native, info, _ = in_native_layout(model, contract)
    return native, info


def in_native_layout(model: ir.Model, contract: Contract) -> tuple[ir.Model, Contract, frozenset[str]]:
    """Does as ``to_native``, and names the states whose channels are in blocks."""
    block = block_channels()
    if block == 1:
        hint = "Compile without --native."
        raise UnsupportedError("ONNX Runtime has no blocked layout for convolutions on this machine.", hint=hint)
    chains = [chain for chain in contract.chains() if all(_can_be_blocked(s, block) for s in chain)]
    states = [s for chain in chains for s in chain]
    marked = ir.from_proto(ir.to_proto(model))
    for state in states:
        _mark_input(marked.graph, state)
    for chain in chains:
        _mark_output(marked.graph, chain[0].output)
    native = _optimised(marked)
    graph = native.graph
    graph.opset_imports.setdefault(BLOCKED, 1)
    named = {str(v.name): v for v in [*graph.inputs, *graph.outputs]}
    inputs = {s.input: _entry(named[s.input], named[f"{_PROBE}{s.input}"]) for s in states}
    del graph.outputs[len(graph.outputs) - len(states) :]
    results = {chain[0].output: _exit(named[chain[0].output]) for chain in chains}
    done = _settle(graph, chains, inputs, results, block)
    keep_blocked(graph)
    RemoveUnusedNodesPass()(native)
    native.metadata_props.update(model.metadata_props)
    widened = tuple(_in_blocks(s, block) if s.input in done else s for s in contract.states)
    return native, dataclasses.replace(contract, states=widened, native=block), frozenset(done)


def _can_be_blocked(state: StateSpec, block: int) -> bool:
    """Says whether a state is images whose channels the kernels take. What pads them to whole blocks must be finite."""
    shape = state.shape
    if len(shape) != 4 or state.dtype != "float32" or "N" in shape[1:] or int(shape[1]) % ALIGNED:
        return False
    return np.isfinite(state.initial) or int(shape[1]) % block == 0


def _in_blocks(state: StateSpec, block: int) -> StateSpec:
    batch, channels, *space = state.shape
    return dataclasses.replace(state, shape=(batch, in_blocks(int(channels), block), *space))


def _stand_in(graph: ir.Graph, x: ir.Value, channels: int) -> ir.Node:
    """Writes a convolution that changes nothing, which the optimiser takes to blocks."""
    name = f"{_STAND_IN}{channels}"
    if name not in graph.initializers:
        ones = ir.tensor(np.ones((channels, 1, 1, 1), np.float32), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape([channels, 1, 1, 1]), type=ir.TensorType(ones.dtype), const_value=ones)
        )
    weight = graph.initializers[name]
    return ir.node("Conv", [x, weight], {"group": channels, "kernel_shape": [1, 1]})


def _mark_input(graph: ir.Graph, state: StateSpec) -> None:
    """Makes everything read the state through a stand-in. A second one behind it finds it again, as an output;
    two readers also keep the optimiser from fusing what follows into the first."""
    x = next(v for v in graph.inputs if v.name == state.input)
    uses = list(x.uses())
    first = _stand_in(graph, x, int(state.shape[1]))
    second = _stand_in(graph, first.outputs[0], int(state.shape[1]))
    for user, index in uses:
        user.replace_input_with(index, first.outputs[0])
    graph.insert_before(graph[0], [first, second])
    probe = second.outputs[0]
    probe.name, first.outputs[0].name = f"{_PROBE}{state.input}", f"{state.input}.read"
    probe.shape, probe.type = x.shape, x.type
    graph.outputs.append(probe)


def _mark_output(graph: ir.Graph, name: str) -> None:
    """Makes the state leave the graph through a stand-in."""
    index, old = next((i, v) for i, v in enumerate(graph.outputs) if v.name == name)
    assert old.shape is not None
    node = _stand_in(graph, old, int(old.shape[1]))  # type: ignore[arg-type]
    graph.append(node)
    new = node.outputs[0]
    old.name, new.name = f"{name}.plain", name
    new.shape, new.type = old.shape, old.type
    graph.outputs[index] = new


def _optimised(model: ir.Model) -> ir.Model:
    """Reads what ONNX Runtime makes of a model on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that the result belongs to this kind of machine
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(Path(folder, "native.onnx"))
        plain = Path(folder, "plain.onnx")
        ir.save(model, plain, external_data="plain.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "native.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        ort.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
        return ir.external_data.load_to_model(ir.load(options.optimized_model_filepath))


def _entry(x: ir.Value, probe: ir.Value) -> _Place:
    """Finds how the optimised graph reads a state: the stand-in's result, and the reorder in front of it."""
    last = _producer(probe)
    blocked = last.op_type == "ReorderOutput"
    second = _producer(last.inputs[0]) if blocked else last
    first = _producer(second.inputs[0])
    reorder = _producer(first.inputs[0]) if blocked else None
    ir.convenience.replace_all_uses_with(first.outputs[0], reorder.outputs[0] if reorder is not None else x)
    return _Place(x, reorder.outputs[0] if reorder is not None else None)


def _exit(output: ir.Value) -> _Place:
    """Finds how the optimised graph computes a state: what its stand-in reads."""
    last = _producer(output)
    blocked = last.op_type == "ReorderOutput"
    stand_in = _producer(last.inputs[0]) if blocked else last
    computed = stand_in.inputs[0]
    assert computed is not None
    if blocked:
        last.replace_input_with(0, computed)
        return _Place(output, computed)
    return _Place(computed, None)


def _settle(
    graph: ir.Graph,
    chains: list[tuple[StateSpec, ...]],
    inputs: dict[str, _Place],
    results: dict[str, _Place],
    block: int,
) -> set[str]:
    """Decides for each chain of states, in blocks or plain, and connects it. Returns the names of those in blocks."""
    whole = [c for c in chains if all(p.blocked for p in (results[c[0].output], *(inputs[s.input] for s in c)))]
    done = {s.input for chain in whole for s in chain}
    entered = {inputs[name].blocked: inputs[name].value for name in done}
    for blocked, x in entered.items():
        assert blocked is not None
        ir.convenience.replace_all_uses_with(blocked, x)
        x.shape = _shape_in_blocks(x, block)
    for chain in chains:
        name = chain[0].output
        result = results[name]
        if chain in whole:
            _leave(graph, name, entered.get(result.blocked, result.blocked), block)
        else:
            _leave(graph, name, result.value, 1)
    return done


def _leave(graph: ir.Graph, name: str, source: ir.Value | None, block: int) -> None:
    """Makes a value the output of this name."""
    index = next(i for i, v in enumerate(graph.outputs) if v.name == name)
    old = graph.outputs[index]
    assert source is not None
    if source is not old:
        old.name = f"{name}.plain"
        if not _can_be_named(source):
            copy = ir.node("Identity", [source])
            graph.append(copy)
            source = copy.outputs[0]
        source.name, source.type = name, old.type
        graph.outputs[index] = source
    source.shape = _shape_in_blocks(old, block)


def _shape_in_blocks(value: ir.Value, block: int) -> ir.Shape:
    shape = value.shape
    assert shape is not None
    return ir.Shape([shape[0], in_blocks(int(shape[1]), block), *shape[2:]])  # type: ignore[arg-type]


def _can_be_named(value: ir.Value) -> bool:
    """Says whether a value can be an output of the graph under another name."""
    return value.producer() is not None and not value.is_graph_output()


def _producer(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None, value
    return node
