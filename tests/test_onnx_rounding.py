"""ONNX files whose numbers are rounded: half precision and 8 bits, which are read as float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import FEATURES, FRAMES, SERIES, convolution, model, weights

import co3d_compile as co3d
from co3d_compile.capture.onnx_reader.node_call import TABLE


def test_half_precision_is_read_as_float32() -> None:
    """Inputs, weights and casts."""
    network = model(convolution("x", "y"), {"w": weights(w=(5, 3, 3))["w"].astype(np.float16)}, SERIES)
    for v in (*network.graph.input, *network.graph.output):
        v.type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.warns(co3d.Co3dWarning, match="half precision"):
        compiled = co3d.compile(network, time_dim=1)
    assert compiled.info.inputs[0].dtype == "float32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert co3d.verify(compiled, network).passed


def in_half_precision() -> onnx.ModelProto:
    half = {k: v.astype(np.float16) for k, v in weights(w=(4, FEATURES, 3)).items()}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], pads=[2, 0]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    return model(nodes, half, ["N", FEATURES, FRAMES])


def in_eight_bits() -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["v"]),
        helper.make_node("Conv", ["d", "v"], ["c"], pads=[2, 0]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    stored = (weights(w=(4, FEATURES, 3))["w"] * 100).astype(np.int8)
    scales = {"s": np.float32(0.05), "z": np.uint8(128), "sw": np.float32(0.01), "zw": np.int8(0)}
    return model(nodes, {"w": stored, **{k: np.asarray(v) for k, v in scales.items()}}, ["N", FEATURES, FRAMES])


@pytest.mark.parametrize("network", [in_half_precision, in_eight_bits])
def test_a_rounded_file_is_compared_without_its_rounding(
    network: Callable[[], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read wrongly must not pass for rounding."""
    with pytest.warns(co3d.Co3dWarning):
        compiled = co3d.compile(network(), time_dim=2)
    found = co3d.verify(compiled, network())
    assert found.passed and "cast to float32" in found.notes[0] and "from the file as it is" in found.notes[0]
    monkeypatch.setitem(TABLE, "Relu", replace(TABLE["Relu"], compute=lambda call, x: x.abs()))
    with pytest.raises(co3d.VerificationError, match="cast to float32"):
        co3d.verify(compiled, network())
