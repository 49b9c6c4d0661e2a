"""``If``, ``Loop`` and ``Scan``: the branch that a constant chooses, and one copy of a body for each turn.

The compiler makes one body of the copies again where it finds that they are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from co3d_compile.capture.onnx_reader.node_call import Host, NodeCall, Value, as_tensor

CONTROL = ("If", "Loop", "Scan")
Values: TypeAlias = "dict[ir.Value, Value]"
Run: TypeAlias = "Callable[[ir.Graph, Values], Sequence[Value]]"
"""Runs a graph on what it is given and what lies around it, and returns its outputs."""


def controlled(run: Run, call: NodeCall, inputs: list[Value], values: Values) -> Sequence[Value]:
    """Computes ``If``, ``Loop`` or ``Scan``."""
    if call.node.op_type == "If":
        return _chosen(run, call, inputs[0], values)
    return _loop(run, call, inputs, values) if call.node.op_type == "Loop" else _scan(run, call, inputs, values)


def _chosen(run: Run, call: NodeCall, condition: Value, values: Values) -> Sequence[Value]:
    if not isinstance(condition, np.ndarray):
        settings = _settings(call.node.inputs[0])
        if not settings:
            raise call.refuse("is decided by the values of frames")
        raise call.refuse(
            f"is decided by the input {' and '.join(settings)}, which is one number for all frames",
            "Make it a constant of the file: add an initializer of that name to its graph "
            "(model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))).",
        )
    branch = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
    return run(call.node.attributes[branch].as_graph(), dict(values))


def _settings(value: ir.Value | None) -> list[str]:
    """Finds the inputs of the file that alone decide a value, if each is a single number; empty for others."""
    found: list[str] = []
    waiting = [value] if value is not None else []
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if producer is not None:
            waiting += [v for v in producer.inputs if v is not None]
        elif value.const_value is None:
            if value.shape is None or any(size != 1 for size in value.shape):
                return []
            found.append(value.name or "")
    return sorted(set(found))


def _loop(run: Run, call: NodeCall, inputs: list[Value], values: Values) -> Sequence[Value]:
    """Runs the body as often as the file says."""
    body = call.node.attributes["body"].as_graph()
    turns, going, *carried = inputs
    if turns is None or not isinstance(turns, np.ndarray) or isinstance(going, Tensor):
        raise call.refuse("ends when the values of frames say so")
    carried = [_as_state(v) for v in carried]
    collected: list[list[Value]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    for turn in range(int(turns.reshape(-1)[0])):
        if isinstance(going, np.ndarray) and not bool(going.reshape(-1)[0]):
            break
        given = [np.array(turn, np.int64), going if going is not None else np.array(True), *carried]
        going, *results = run(body, {**values, **dict(zip(body.inputs, given, strict=True))})
        if isinstance(going, Tensor):
            raise call.refuse("ends when the values of frames say so")
        carried = list(results[: len(carried)])
        for rows, result in zip(collected, results[len(carried) :], strict=True):
            rows.append(result)
    return [*carried, *(_stacked(call, rows, 0) for rows in collected)]


def _scan(run: Run, call: NodeCall, inputs: list[Value], values: Values) -> Sequence[Value]:
    """Runs the body on each entry of the scanned inputs."""
    body = call.node.attributes["body"].as_graph()
    if call.opset < 9:
        raise call.refuse("scans each clip of a batch by itself", "Export the model with opset 9 or newer.")
    scanned = call.integer("num_scan_inputs", 1)
    states, series = [_as_state(v) for v in inputs[: len(inputs) - scanned]], inputs[len(inputs) - scanned :]
    dims = call.integers("scan_input_axes") or [0] * scanned
    backwards = call.integers("scan_input_directions") or [0] * scanned
    collected: list[list[Value]] = [[] for _ in range(len(body.outputs) - len(states))]
    first = series[0]
    assert isinstance(first, Tensor | np.ndarray)
    length = int(first.shape[dims[0]])
    for turn in range(length):
        entries = [
            _entry(x, dim, length - 1 - turn if back else turn)
            for x, dim, back in zip(series, dims, backwards, strict=True)
        ]
        results = run(body, {**values, **dict(zip(body.inputs, [*states, *entries], strict=True))})
        states = list(results[: len(states)])
        for rows, result in zip(collected, results[len(states) :], strict=True):
            rows.append(result)
    out = call.integers("scan_output_axes") or [0] * len(collected)
    turned = call.integers("scan_output_directions") or [0] * len(collected)
    rows_of = [rows[::-1] if back else rows for rows, back in zip(collected, turned, strict=True)]
    return [*states, *(_stacked(call, rows, dim) for rows, dim in zip(rows_of, out, strict=True))]


def _as_state(value: Value) -> Value:
    """Gives what a loop starts from: numbers as a tensor, so that the first turn is captured as the others are."""
    return as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _stacked(call: NodeCall, rows: Sequence[Value], dim: int) -> Tensor | Host:
    if not rows:
        raise call.refuse("has no turns")
    if all(isinstance(r, np.ndarray) for r in rows):
        return np.stack([r for r in rows if isinstance(r, np.ndarray)], dim)
    tensors = [as_tensor(r) if isinstance(r, np.ndarray) else r for r in rows]
    return torch.stack([r for r in tensors if isinstance(r, Tensor)], dim)


def _entry(x: Value, dim: int, index: int) -> Value:
    return np.take(x, index, dim) if isinstance(x, np.ndarray) else x.select(dim, index) if isinstance(x, Tensor) else x
