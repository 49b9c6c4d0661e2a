"""ONNX files of a few nodes: an input ``x``, a result ``y``, and the constants that they are given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

FRAMES, FEATURES = 6, 3
SERIES: list[int | str] = ["N", FRAMES, FEATURES]
Weights = Mapping[str, np.ndarray]


def model(nodes: list[onnx.NodeProto], constants: Weights, shape: list[int | str]) -> onnx.ModelProto:
    """A file that takes a video ``x`` and gives ``y``."""
    graph = helper.make_graph(
        nodes,
        "keras",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: (generator.standard_normal(s) * 0.3).astype(np.float32) for name, s in shapes.items()}


def with_opset(network: onnx.ModelProto, opset: int, ir_version: int = 8) -> onnx.ModelProto:
    network.opset_import[0].version = opset
    network.ir_version = ir_version
    return network


def value(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape or None)


def single(name: str, dtype: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, [])


def convolution(series: str, result: str) -> list[onnx.NodeProto]:
    """A causal convolution over the frames of (N, T, C), and back."""
    return [
        helper.make_node("Transpose", [series], [f"{result}_in"], perm=[0, 2, 1]),
        helper.make_node("Conv", [f"{result}_in", "w"], [f"{result}_out"], pads=[2, 0]),
        helper.make_node("Transpose", [f"{result}_out"], [result], perm=[0, 2, 1]),
    ]
