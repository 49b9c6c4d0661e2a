"""ONNX's own node tests, which its package carries, through the reader: a graph of one operator, inputs, outputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import TensorProto, TypeProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase

from co3d_compile.capture.onnx_reader.control_flow import CONTROL
from co3d_compile.capture.onnx_reader.node_call import TABLE, TensorList
from co3d_compile.capture.onnx_reader.onnx_file import prepared
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule
from co3d_compile.errors import Co3dError

KINDS = (1, 2, 3, 5, 6, 7, 9, 11)  # float32, uint8, int8, int16, int32, int64, bool, float64
LEFT_OUT = {
    "_expanded": "the function body of an operator that is tested by itself",
    "quantizelinear": "8 bits are read as the floats that they stand for (docs/onnx.md)",
    "training": "a clip model is not in training mode",
}
"""Tests that are not those of an operator that is claimed, by a part of their name, with the reason."""


@dataclass(frozen=True)
class Outcome:
    """What came of one test: ``passed``, or the reason why not."""

    operator: str
    name: str
    passed: bool
    reason: str = ""


def node_tests() -> list[TestCase]:
    """The tests of operators that the reader claims, with float or integer tensors."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    return [t for t in tests if _is_claimed(t)]


def operator_of(test: TestCase) -> str:
    """The operator that a test is about."""
    assert test.model is not None
    return str(test.model.graph.node[0].op_type)


def _is_claimed(test: TestCase) -> bool:
    if test.model is None:
        return False
    graph = test.model.graph
    names = {f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in graph.node}
    plain = all(_tensor_of(v.type).elem_type in KINDS for v in [*graph.input, *graph.output])
    left_out = any(part in test.name for part in LEFT_OUT)
    return plain and not left_out and len(graph.node) == 1 and names <= {*TABLE, *CONTROL}


def _tensor_of(kind: TypeProto) -> TypeProto.Tensor:
    """The kind of a tensor, or of those in a list."""
    return kind.sequence_type.elem_type.tensor_type if kind.HasField("sequence_type") else kind.tensor_type


def run(test: TestCase) -> Outcome:
    """Runs one test: every output in value, shape and kind."""
    operator = operator_of(test)
    assert test.model is not None and test.data_sets is not None
    try:
        model = prepared(ir.serde.deserialize_model(test.model))
        module = OnnxModule(model)
        for inputs, outputs in test.data_sets:
            given = [_array(x) for x in inputs]
            values = {v: x if module.reads_numbers(v) else _tensors(x) for v, x in _pairs(model, given)}
            with torch.no_grad():
                results = module.run(model.graph, values)
            for result, expected in zip(results, outputs, strict=True):
                _compare(result, _array(expected), test)
    except (AssertionError, Co3dError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Outcome(operator, test.name, False, lines[0] if lines else type(error).__name__)
    return Outcome(operator, test.name, True)


def _array(value: Any) -> Any:
    if isinstance(value, list):
        return [_array(v) for v in value]
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _tensors(value: Any) -> Any:
    if isinstance(value, list):
        return TensorList(tuple(_tensors(v) for v in value))
    return torch.from_numpy(np.array(value))


def _pairs(model: ir.Model, given: list[Any]) -> Iterator[tuple[ir.Value, Any]]:
    return zip(model.graph.inputs, given, strict=True)


def _compare(result: Any, expected: Any, test: TestCase) -> None:
    if isinstance(expected, list):
        for a, b in zip(result.entries, expected, strict=True):
            _compare(a, b, test)
        return
    result = np.asarray(result)
    assert result.shape == expected.shape, f"shape {result.shape}, not {expected.shape}"
    assert result.dtype == expected.dtype, f"{result.dtype}, not {expected.dtype}"
    np.testing.assert_allclose(result, expected, rtol=max(test.rtol, 1e-3), atol=max(test.atol, 1e-5))
