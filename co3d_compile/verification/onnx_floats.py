"""An ONNX file in half precision or in 8 bits (QDQ) as the file in float32 that it approximates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

HALF = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
TYPES = {"to", "dtype"}
"""Attributes that name the type of a result."""


def in_float32(model: ModelProto) -> ModelProto:
    """Casts half precision in a file, and leaves out the rounding to 8 bits on the way."""
    found = ModelProto()
    found.CopyFrom(model)
    for graph in _graphs(found.graph):
        _without_rounding(graph)
        _cast(graph)
        del graph.value_info[:]
    return found


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _without_rounding(graph: GraphProto) -> None:
    """Lets ``QuantizeLinear`` and what turns its result back do nothing; stored weights are turned back as before."""
    rounded: set[str] = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in rounded):
            rounded.update(node.output)
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]


def _cast(graph: GraphProto) -> None:
    for weight in graph.initializer:
        if weight.data_type in HALF:
            weight.CopyFrom(numpy_helper.from_array(_widened(weight), weight.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPES and attribute.i in HALF:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in HALF:
                attribute.t.CopyFrom(numpy_helper.from_array(_widened(attribute.t)))


def _widened(tensor: TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor).astype(np.float32)
