"""The exporter: from the threaded step graph to an ONNX model with explicit state inputs and outputs."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module

import onnx_ir as ir
from torch.fx import Node

from co3d_compile import onnx_export
from co3d_compile.ir.node_reading import returned
from co3d_compile.ir.program import Program
from co3d_compile.onnx_export.batch_dims import free_rows, grown_dims
from co3d_compile.onnx_export.by_torch_exporter import OPSET
from co3d_compile.onnx_export.emitter import DTYPES, Emitter

for _module in pkgutil.iter_modules(onnx_export.__path__, f"{onnx_export.__name__}."):
    if _module.name.endswith("_operators"):
        import_module(_module.name)  # fills the emitter's table: new translations are a new file, in no list


def export(program: Program) -> ir.Model:
    """Writes a threaded program as an ONNX model; metadata is added by the caller.

    Inputs are the model's own, then one per state; outputs the model's own, then the next states.
    """
    emitter, inputs = Emitter(program), []
    rows = free_rows(program) if any(i.boxes is not None for i in program.inputs) else {}
    valid = [program.step.valid] if program.step.valid is not None else []
    names = [i.name for i in program.inputs] + valid + [s.input for s in program.step.states]
    for node, name in zip(program.placeholders(), names, strict=True):
        shape = ["K" if rows.get(node) else "N", *node.meta["val"].shape[1:]]
        value = ir.Value(
            name=name, shape=_shape(program, name, shape), type=ir.TensorType(DTYPES[node.meta["val"].dtype])
        )
        emitter.values[node] = value
        inputs.append(value)
    for node in program.graph.nodes:
        if node.op == "call_function":
            emitter.emit(node)
    if emitter.single:
        single = ", ".join(sorted(emitter.single))
        program.notes.warnings.append(
            f"ONNX Runtime computes {single} in float32 alone: casts stand around them, and all else stays in float64."
        )
    states = program.placeholders()[len(names) - len(program.step.states) :]
    for node, state in zip(states, program.step.states, strict=True):
        state.shape[0] = "K" if rows.get(node) else state.shape[0]
    results = _outputs(program, emitter, returned(program.graph), rows)
    program.notes.values = emitter.holders()
    graph = ir.Graph(
        inputs,
        results,
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": OPSET},
        name=program.name,
    )
    return ir.Model(graph, ir_version=10, producer_name="co3d-compile")


def _shape(program: Program, name: str, shape: Sequence[int | str]) -> ir.Shape:
    """Writes a shape as ONNX has it.

    Each tensor has a number of boxes of its own: with one name it would be one size.
    """
    return ir.Shape([f"K.{name}" if size == "K" else size for size in program.shape(shape)])


def _outputs(program: Program, emitter: Emitter, nodes: list[Node], rows: Mapping[Node, list[int]]) -> list[ir.Value]:
    """Gives the graph outputs their names; a value that already has another name goes through an Identity."""
    names = [o.name for o in program.outputs] + [s.output for s in program.step.states]
    for result, node in zip(program.outputs, nodes, strict=False):  # behind them are the states
        grown = grown_dims(node, emitter.larger)
        free = dict.fromkeys(grown, "N") | dict.fromkeys(rows.get(node, ()), "K")
        result.shape = [free.get(d, int(size)) for d, size in enumerate(node.meta["val"].shape)]
    shapes = [o.shape for o in program.outputs] + [s.shape for s in program.step.states]
    results: list[ir.Value] = []
    placeholders = program.placeholders()
    inputs = {id(emitter.values[n]) for n in placeholders}
    by_input = {
        id(emitter.values[n]): s
        for n, s in zip(placeholders[len(placeholders) - len(program.step.states) :], program.step.states, strict=True)
    }
    own = len(program.outputs)
    for i, (node, name, shape) in enumerate(zip(nodes, names, shapes, strict=True)):
        value = emitter.value(node)
        if i >= own and program.options.state_io == "renamed" and id(value) in by_input:
            program.step.states[i - own].output = by_input[id(value)].input
            continue
        taken = id(value) in inputs or any(value is r for r in results) or value.name in emitter.initializers
        if taken:
            emitter.scope = name
            value = emitter.op("Identity", value)
        value.name = name
        value.type = ir.TensorType(DTYPES[node.meta["val"].dtype])
        value.shape = _shape(program, name, shape)
        results.append(value)
    return results
