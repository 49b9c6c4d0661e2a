"""Where time is in an ONNX file of which nobody says it, and what a file does to time."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_files import FEATURES, FRAMES, SERIES, model, single, value, weights, with_opset

import co3d_compile as co3d

SIZE = 4  # of the state of a recurrent layer


@pytest.mark.parametrize("layer", ["Loop", "LSTM"])
def test_time_is_where_a_layer_goes_from_frame_to_frame(layer: str) -> None:
    """As TensorFlow writes loops: the file itself counts which frame a turn reads, and whether another one follows."""
    nodes = [helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 2])]
    constants: dict[str, np.ndarray] = {}
    if layer == "LSTM":
        constants = weights(w=(1, 16, FEATURES), r=(1, 16, SIZE))
        nodes += [helper.make_node("LSTM", ["frames", "w", "r"], ["all"], hidden_size=SIZE),
                  helper.make_node("Squeeze", ["all"], ["rows"], axes=[1])]  # fmt: skip
    else:
        constants = {**weights(w=(FEATURES, FEATURES)), "start": np.zeros((1, FEATURES), np.float32)}
        constants |= {"first": np.int32(0), "one": np.int32(1), "most": np.int64(FRAMES), "end": np.float32(FRAMES)}
        turn = [
            helper.make_node("Gather", ["frames", "count"], ["frame"], axis=0),
            helper.make_node("MatMul", ["before", "w"], ["product"]),
            helper.make_node("Add", ["frame", "product"], ["sum"]),
            helper.make_node("Tanh", ["sum"], ["after"]),
            helper.make_node("Add", ["count", "one"], ["next"]),
            helper.make_node("Cast", ["next"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Less", ["number", "end"], ["more"]),
            helper.make_node("Identity", ["after"], ["row"]),
        ]
        inputs = [single("i", TensorProto.INT64), single("c", TensorProto.BOOL), single("count", TensorProto.INT32)]
        outputs = [single("more", TensorProto.BOOL), single("next", TensorProto.INT32), value("after"), value("row")]
        body = helper.make_graph(turn, "turn", [*inputs, value("before", 1, FEATURES)], outputs)
        nodes += [helper.make_node("Less", ["end", "limit"], ["begin"])]
        nodes += [helper.make_node("Loop", ["most", "begin", "first", "start"], ["n", "h", "rows"], body=body)]
        constants["limit"] = np.float32(100)
    nodes += [helper.make_node("Transpose", ["rows"], ["y"], perm=[1, 0, 2])]
    network = with_opset(model(nodes, constants, [1, FRAMES, FEATURES]), 11)
    compiled = co3d.compile(network)
    assert compiled.info.inputs[0].time_dim == 1
    assert not compiled.info.recomputed and compiled.info.receptive_field is None
    assert co3d.verify(compiled, network).passed


def test_time_is_asked_for_where_the_last_dim_is_mixed_first() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["t", "keep"], ["r"]),
        helper.make_node("Conv", ["r", "k"], ["y"], pads=[2, 0]),
    ]
    constants = {**weights(w=(FEATURES, 4), k=(2, 4, 3)), "keep": np.array([0, 0, -1], np.int64)}
    network = model(nodes, constants, SERIES)
    with pytest.raises(co3d.UsageError, match=r"last dim.*\n?.*--time-dim 1"):
        co3d.compile(network)
    assert co3d.compile(network, time_dim=1).info.receptive_field == 3


RESIZED = {
    "linear, from the entry's own place": ({"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, 2.0, 2),
    "nearest, rounded up": ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil"}, 3.0, 3),
    "linear, to half": ({"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, 0.5, 0),
    "as TensorFlow did": ({"mode": "linear", "coordinate_transformation_mode": "tf_half_pixel_for_nn"}, 2.0, 2),
}


@pytest.mark.parametrize("how", RESIZED)
def test_resizing_time_by_a_whole_factor_streams(how: str) -> None:
    attributes, factor, delay = RESIZED[how]
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["y"], **attributes)]
    network = model(nodes, {"scales": np.array([1, 1, factor], np.float32)}, ["N", FEATURES, 2 * FRAMES])
    compiled = co3d.compile(network, time_dim=2)
    assert not compiled.info.recomputed and compiled.info.delays == {"y": delay}
    assert co3d.verify(compiled, network).passed


def test_a_crop_in_front_of_frames_is_no_time() -> None:
    """As MMDeploy writes recognizers of MMAction2: (N, crops, C, T, H, W)."""
    nodes = [helper.make_node("Constant", [], ["to"], value_ints=[-1, 3, 8, 4, 4]),
             helper.make_node("Reshape", ["x", "to"], ["r"]),
             helper.make_node("Conv", ["r", "w"], ["y"], pads=[1] * 6)]  # fmt: skip
    network = model(nodes, weights(w=(2, 3, 3, 3, 3)), [1, 1, 3, 8, 4, 4])
    compiled = co3d.compile(network)
    assert compiled.info.inputs[0].time_dim == 3 and not compiled.info.recomputed
    assert compiled.info.receptive_field == 3 and co3d.verify(compiled, network).passed
