"""Reads and extends a LiteRT file (``.tflite``, a FlatBuffer) by the schema that ai-edge-litert carries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

IDENTIFIER = b"TFL3"


def signature_tensors(content: bytes, signature: str) -> dict[str, tuple[list[int], str]]:
    """Lists the shape and dtype of every input and output of a signature, by their names there."""
    runner = Interpreter(model_content=content).get_signature_runner(signature)
    details = {**runner.get_input_details(), **runner.get_output_details()}
    return {n: ([int(s) for s in d["shape"]], np.dtype(d["dtype"]).name) for n, d in details.items()}


def merged_outputs(content: bytes, signature: str) -> list[str]:
    """Names the outputs of a signature that are the same tensor as another one."""
    details = Interpreter(model_content=content).get_signature_runner(signature).get_output_details()
    places = [d["index"] for d in details.values()]
    return [name for name, d in details.items() if places.count(d["index"]) > 1]


def with_metadata(content: bytes, entries: Mapping[str, str], description: str) -> bytes:
    """Adds entries to the file's metadata."""
    model = schema.ModelT.InitFromPackedBuf(content)
    model.description, model.metadata = description, model.metadata or []
    for name, text in entries.items():
        buffer, entry = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(text.encode(), np.uint8)
        entry.name, entry.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(entry)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def transposed_bytes(content: bytes) -> int:
    """Counts the bytes that the file's transposes write in a step, four to a number."""
    return sum(4 * math.prod(shape) for code, shape in _results(content) if code == schema.BuiltinOperator.TRANSPOSE)


def wide_shapes(content: bytes) -> set[tuple[int, ...]]:
    """Lists the shapes of more than four dims that results of operators have."""
    return {shape for _, shape in _results(content) if len(shape) > 4}


def _results(content: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the operator code and the shape of each result."""
    model: Any = schema.Model.GetRootAs(content)
    for at in range(model.SubgraphsLength()):
        graph = model.Subgraphs(at)
        for k in range(graph.OperatorsLength()):
            operator = graph.Operators(k)
            code = model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()
            for i in range(operator.OutputsLength()):
                tensor = graph.Tensors(operator.Outputs(i))
                yield code, tuple(int(tensor.Shape(d)) for d in range(tensor.ShapeLength()))
