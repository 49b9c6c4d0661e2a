"""Operators as older operator sets define them, and in forms that exporters rarely write, beside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

import co3d_compile as co3d
from co3d_compile.capture.onnx_reader.onnx_file import read_onnx

PICTURE, SERIES = (1, 2, 6, 8), (5, 2, 3)
Inputs = list["tuple[int, ...] | np.ndarray | None"]
"""The shape of an input with random numbers, constants, and what is left out."""


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def cell(gates: int, directions: int = 1, peepholes: bool = False) -> Inputs:
    """A series, and the weights of a recurrent layer with 4 features."""
    w, r, b = (weights(directions, gates * 4, n) for n in (3, 4, 2))
    given: Inputs = [SERIES, w, r, b.transpose(0, 2, 1).reshape(directions, -1)]
    return [*given, None, None, None, weights(directions, 12)] if peepholes else given


ASYMMETRIC = {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}
CASES: dict[str, tuple[str, Inputs, dict[str, Any], list[int]]] = {
    "upsample by an attribute": ("Upsample", [PICTURE], {"mode": "linear", "scales": [1.0, 1.0, 2.0, 1.5]}, [7, 8]),
    "upsample by an input": ("Upsample", [PICTURE, floats(1, 1, 2, 1.5)], {"mode": "linear"}, [9]),
    "resize of operator set 10": ("Resize", [PICTURE, floats(1, 1, 2, 0.6)], {"mode": "linear"}, [10]),
    "resize to fewer in operator set 10": ("Resize", [PICTURE, floats(1, 1, 0.6, 0.7)], {}, [10]),
    "resize as TensorFlow does": (
        "Resize", [PICTURE, floats(), floats(1, 1, 2, 0.6)],
        {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}, [11, 13]),
    "resize to as many": ("Resize", [PICTURE, floats(), floats(1, 1, 1.1, 1)], ASYMMETRIC, [11, 19]),
    "resize one dim to as many": ("Resize", [PICTURE, floats(), floats(1, 1, 1.1, 2)], ASYMMETRIC, [11, 19]),
    "resize with corners aligned": (
        "Resize", [PICTURE, floats(), floats(1, 1, 1.6, 0.6)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, [11, 19]),
    "resize by rounding in float32": (
        "Resize", [PICTURE, floats(), floats(1, 1, 1.6, 0.6)],
        {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "floor"}, [11, 19]),
    "no dims, absolute values": ("ReduceL1", [(2, 3)], {"noop_with_empty_axes": 1}, [18]),
    "no dims, squares": ("ReduceSumSquare", [(2, 3)], {"noop_with_empty_axes": 1, "keepdims": 0}, [18]),
    "no dims, product": ("ReduceProd", [(2, 3)], {"noop_with_empty_axes": 1, "keepdims": 0}, [18]),
    "from before the start, backwards": ("Slice", [(2, 6), whole(-9), whole(-20), whole(1), whole(-1)], {}, [10, 13]),
    "wrapped around what is left": ("Pad", [(2, 3, 5), whole(0, -1, -2, 0, 0, 1)], {"mode": "wrap"}, [19]),
    "statistics of each place": (
        "BatchNormalization", [(2, 3, 4), *[weights(3, 4)] * 3, np.abs(weights(3, 4))], {"spatial": 0}, [7]),
    "turned around with the batch first": (
        "ReverseSequence", [(2, 5, 3), whole(5, 5)], {"batch_axis": 0, "time_axis": 1}, [10]),
    "mean with padding, rounded up": (
        "AveragePool", [(1, 3, 8)],
        {"kernel_shape": [3], "strides": [2], "pads": [1, 0], "ceil_mode": 1, "count_include_pad": 1}, [10, 22]),
    "a spectrum of real numbers without a last dim": ("STFT", [(2, 32), np.array(4), weights(8)], {}, [17]),
    "softmax over all that follows": ("Softmax", [(2, 3, 4)], {"axis": 1}, [7, 11, 13]),
    "hard sigmoid in a layer": (
        "LSTM", cell(4), {"hidden_size": 4, "activations": ["HardSigmoid", "Tanh", "Tanh"], "activation_alpha": [0.25],
                          "activation_beta": [0.4]}, [7, 22]),
    "peepholes": ("LSTM", cell(4, peepholes=True), {"hidden_size": 4}, [7, 14]),
    "gates that are tied and limited": ("LSTM", cell(4), {"hidden_size": 4, "clip": 0.5, "input_forget": 1}, [7, 14]),
    "another activation in each direction": (
        "RNN", cell(1, 2), {"hidden_size": 4, "direction": "bidirectional", "activations": ["Relu", "Affine"],
                            "activation_alpha": [0.5], "activation_beta": [0.1]}, [7, 14]),
    "a state that is reset behind the product, limited": (
        "GRU", cell(3), {"hidden_size": 4, "linear_before_reset": 1, "clip": 0.5}, [7, 14]),
    "a state that is reset before the product, backwards": (
        "GRU", cell(3), {"hidden_size": 4, "direction": "reverse"}, [7, 14]),
}  # fmt: skip
"""Operator, inputs, attributes and operator sets."""


def network(operator: str, given: Inputs, attributes: dict[str, Any], opset: int) -> onnx.ModelProto:
    """A file with one operator, whose inputs are called by their positions."""
    names = ["" if v is None else f"i{k}" for k, v in enumerate(given)]
    inputs, constants = [], []
    for name, v in zip(names, given, strict=True):
        if isinstance(v, tuple):
            inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, v))
        elif v is not None:
            constants.append(onnx.numpy_helper.from_array(v, name))
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)],
        "one",
        inputs,
        [onnx.ValueInfoProto(name="y")],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 20 else 10)


@pytest.mark.parametrize(("case", "opset"), [(c, o) for c, (_, _, _, opsets) in CASES.items() for o in opsets])
def test_an_operator_means_what_its_operator_set_says(case: str, opset: int) -> None:
    operator, given, attributes, _ = CASES[case]
    model = network(operator, given, attributes, opset)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal(given[0]).astype(np.float32)
    (expected,) = session.run(None, {"i0": x})
    with torch.no_grad():
        (result,) = read_onnx(model).module(torch.from_numpy(x)).values()
    assert result.shape == expected.shape
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_operator_that_is_not_known_may_compute_constants() -> None:
    """What exporters wrote for a count of frames: the places at which a list of ones is not zero."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "two"], ["frames"]),
        helper.make_node("ConstantOfShape", ["frames"], ["ones"], value=onnx.numpy_helper.from_array(whole(1))),
        helper.make_node("NonZero", ["ones"], ["places"]),
        helper.make_node("Squeeze", ["places"], ["list"], axes=[0]),
        helper.make_node("Gather", ["x", "list"], ["again"], axis=2),
        helper.make_node("Conv", ["again", "w"], ["y"], pads=[2, 0]),
    ]
    graph = helper.make_graph(
        nodes,
        "counted",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 3, 8))],
        [onnx.ValueInfoProto(name="y")],
        [onnx.numpy_helper.from_array(whole(2), "two"), onnx.numpy_helper.from_array(weights(4, 3, 3), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    compiled = co3d.compile(model, time_dim=2)
    assert not compiled.info.recomputed and compiled.info.receptive_field == 3
    assert co3d.verify(compiled, model).passed


def test_a_layer_with_other_gates_is_a_state() -> None:
    operator, given, attributes, _ = CASES["hard sigmoid in a layer"]
    model = network(operator, given, attributes, 14)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value, model.graph.input[0].name = 1, "x"
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 6
    model.graph.node.insert(0, helper.make_node("Transpose", ["x"], ["i0"], perm=[1, 0, 2]))
    compiled = co3d.compile(model, time_dim=1)
    assert not compiled.info.recomputed and compiled.info.receptive_field is None
    assert co3d.verify(compiled, model).passed
