"""ONNX files with channels last, as tf2onnx writes them of Keras and TensorFlow networks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import FRAMES, model, weights

import co3d_compile as co3d


def convolution(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    """A 3D convolution of NDHWC: a Transpose on both of its sides."""
    return [
        helper.make_node("Transpose", [x], [f"{y}_in"], perm=[0, 4, 1, 2, 3]),
        helper.make_node("Conv", [f"{y}_in", weight], [f"{y}_out"], auto_pad="SAME_UPPER", kernel_shape=[3, 3, 3]),
        helper.make_node("Transpose", [f"{y}_out"], [y], perm=[0, 2, 3, 4, 1]),
    ]


def residual_network() -> onnx.ModelProto:
    nodes = [
        *convolution("x", "w1", "a"),
        helper.make_node("Add", ["a", "b"], ["biased"]),
        helper.make_node("Relu", ["biased"], ["r"]),
        *convolution("r", "w2", "c"),
        helper.make_node("Add", ["c", "r"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["m"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "fc"], ["y"]),
    ]
    constants = weights(w1=(4, 3, 3, 3, 3), w2=(4, 4, 3, 3, 3), b=(4,), fc=(4, 5))
    return model(nodes, constants, ["N", FRAMES, 4, 4, 3])


def frame_by_frame() -> onnx.ModelProto:
    """As Keras writes TimeDistributed layers: one copy for each frame, from a time-major video, twice."""
    nodes, constants = [], weights(w=(4, 3, 3, 3), t=(5, 4, 3))
    nodes += [helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 2, 3, 4])]
    layers = {
        "conv": lambda i, o: [
            helper.make_node("Transpose", [i], [f"{o}_in"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", [f"{o}_in", "w"], [f"{o}_out"]),
            helper.make_node("Transpose", [f"{o}_out"], [o], perm=[0, 2, 3, 1]),
        ],
        "pool": lambda i, o: [helper.make_node("ReduceMean", [i], [o], axes=[1, 2], keepdims=0)],
    }
    constants |= {"zero": np.array([0], np.int64)}
    source = "frames"
    for name, layer in layers.items():
        for t in range(FRAMES):
            constants |= {f"{t}": np.array([t], np.int64), f"{t + 1}": np.array([t + 1], np.int64)}
            cut, frame, result = f"{name}{t}_cut", f"{name}{t}_frame", f"{name}{t}"
            nodes += [
                helper.make_node("Slice", [source, f"{t}", f"{t + 1}", "zero"], [cut]),
                helper.make_node("Squeeze", [cut, "zero"], [frame]),
                *layer(frame, result),
                helper.make_node("Unsqueeze", [result, "zero"], [f"{result}_one"]),
            ]
        nodes += [helper.make_node("Concat", [f"{name}{t}_one" for t in range(FRAMES)], [f"{name}s"], axis=0)]
        source = f"{name}s"
    nodes += [
        helper.make_node("Transpose", [source], ["series"], perm=[1, 2, 0]),
        helper.make_node("Conv", ["series", "t"], ["z"], pads=[2, 0]),
        helper.make_node("Transpose", ["z"], ["y"], perm=[0, 2, 1]),
    ]
    return model(nodes, constants, ["N", FRAMES, 4, 4, 3])


def test_time_is_where_the_first_convolution_has_it() -> None:
    network = residual_network()
    compiled = co3d.compile(network)
    assert compiled.info.inputs[0].time_dim == 1 and compiled.info.inputs[0].shape == ("N", 4, 4, 3)
    assert not compiled.info.recomputed and compiled.info.delays == {"y": 2}
    assert co3d.verify(compiled, network).passed


def test_transposes_around_convolutions_cancel() -> None:
    """One is left: a frame has its channels last, the first convolution takes them first."""
    compiled = co3d.compile(residual_network())
    assert sum(node.op_type == "Transpose" for node in compiled.model.graph) <= 1


def test_time_is_asked_for_where_no_layer_says_it() -> None:
    with pytest.raises(co3d.UsageError, match=r"channels last.*\n?.*--time-dim 1"):
        co3d.compile(frame_by_frame())


def test_layers_on_each_frame_are_one_layer() -> None:
    network = frame_by_frame()
    compiled = co3d.compile(network, time_dim=1)
    assert not compiled.info.recomputed and compiled.info.receptive_field == 3
    assert sum(node.op_type == "Conv" for node in compiled.model.graph) <= 4
    assert co3d.verify(compiled, network).passed


def test_frames_of_one_clip_as_rows_of_a_batch() -> None:
    """A single clip's batch goes with the dims of space that are reduced: an entry is a row all the same."""
    nodes = [helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 4, 2, 3])]
    for t in range(FRAMES):
        nodes += [
            helper.make_node("Gather", ["frames", f"{t}"], [f"frame{t}"], axis=0),
            helper.make_node("Conv", [f"frame{t}", "w"], [f"conv{t}"]),
            helper.make_node("Transpose", [f"conv{t}"], [f"row{t}"], perm=[0, 2, 3, 1]),
        ]
    nodes += [
        helper.make_node("Concat", [f"row{t}" for t in range(FRAMES)], ["rows"], axis=0),
        helper.make_node("ReduceMean", ["rows"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Gather", ["means", "first"], ["one"], axis=1),
        helper.make_node("Concat", ["means", "one"], ["y"], axis=1),
    ]
    constants = weights(w=(4, 3, 3, 3)) | {f"{t}": np.array(t, np.int64) for t in range(FRAMES)}
    network = model(nodes, constants | {"first": np.array([0], np.int64)}, [1, FRAMES, 4, 4, 3])
    compiled = co3d.compile(network, time_dim=1)
    assert not compiled.info.recomputed and compiled.info.receptive_field == 1
    assert co3d.verify(compiled, network).passed
