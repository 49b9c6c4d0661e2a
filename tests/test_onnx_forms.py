"""Forms that an ONNX file may have: control flow, functions, old versions, recurrent layers, half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from marks import long, slow
from onnx import TensorProto, helper
from onnx_files import FEATURES, FRAMES, SERIES, convolution, model, single, value, weights, with_opset

import co3d_compile as co3d
from co3d_compile.capture.onnx_reader.node_call import TABLE

SIZE = 4  # of the state of a recurrent layer
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def chosen() -> onnx.ModelProto:
    """``If`` with a condition that is a constant; each branch reads what lies around it."""
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [value(name)])
        for name, op in (("then", "Relu"), ("else", "Sigmoid"))
    }
    nodes = [*convolution("x", "a"), helper.make_node("If", ["yes"], ["y"], **branches)]
    return model(nodes, {**weights(w=(5, 3, 3)), "yes": np.array(True)}, SERIES)


def functions() -> onnx.ModelProto:
    """A function of the file's own, called twice, the second time on what the first gave."""
    network = model([helper.make_node("Twice", ["x", "w"], ["y"], domain="own")], weights(w=(3, 3, 3)), SERIES)
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("own", 1)]
    once = helper.make_function("own", "Once", ["x", "w"], ["y"], convolution("x", "y"), imports)
    calls = [helper.make_node("Once", ["x", "w"], ["a"], domain="own"),
             helper.make_node("Once", ["a", "w"], ["y"], domain="own")]  # fmt: skip
    network.functions.extend([once, helper.make_function("own", "Twice", ["x", "w"], ["y"], calls, imports)])
    network.opset_import.append(imports[1])
    return network


def weights_as_inputs() -> onnx.ModelProto:
    """IR version 3, in which every weight is an input, too."""
    network = with_opset(model(convolution("x", "y"), weights(w=(5, 3, 3)), SERIES), 8, 3)
    network.graph.input.append(value("w", 5, 3, 3))
    return network


def old_softmax() -> onnx.ModelProto:
    """Before operator set 13 a softmax is over all dims from ``axis`` on: here over the features."""
    nodes = [*convolution("x", "a"), helper.make_node("Softmax", ["a"], ["y"], axis=2)]
    return with_opset(model(nodes, weights(w=(5, 3, 3)), SERIES), 11)


START = [
    helper.make_node("Shape", ["x"], ["shape"]),
    helper.make_node("Gather", ["shape", "rows_and_features"], ["sizes"]),
    helper.make_node("Expand", ["zero", "sizes"], ["start"]),
]
"""Zeros for each clip, as exporters write them."""
CONSTANTS = {
    "rows_and_features": np.array([0, 2]),
    "zero": np.zeros((1, 1), np.float32),
    "half": np.array(0.5, np.float32),
}


def looped() -> onnx.ModelProto:
    """``Loop`` over frames: a running average, collected."""
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "turn"], ["frame"], axis=1),
            helper.make_node("Mul", ["before", "half"], ["old"]),
            helper.make_node("Add", ["old", "frame"], ["state"]),
            helper.make_node("Tanh", ["state"], ["row"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "body",
        [single("turn", TensorProto.INT64), single("going", TensorProto.BOOL), value("before")],
        [single("on", TensorProto.BOOL), value("state"), value("row")],
    )
    nodes = [
        *START,
        helper.make_node("Loop", ["turns", "", "start"], ["last", "rows"], body=body),
        helper.make_node("Transpose", ["rows"], ["y"], perm=[1, 0, 2]),
    ]
    return model(nodes, {**CONSTANTS, "turns": np.array(FRAMES)}, SERIES)


def scanned() -> onnx.ModelProto:
    """``Scan`` over frames: the same running average."""
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["before", "half"], ["old"]),
            helper.make_node("Add", ["old", "frame"], ["state"]),
            helper.make_node("Tanh", ["state"], ["row"]),
        ],
        "body",
        [value("before"), value("frame")],
        [value("state"), value("row")],
    )
    axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
    nodes = [*START, helper.make_node("Scan", ["start", "x"], ["last", "y"], body=body, num_scan_inputs=1, **axes)]
    return model(nodes, CONSTANTS, SERIES)


def listed() -> onnx.ModelProto:
    """Lists of tensors: features apart, each frame's tanh put at the end of a list in a loop, and joined again."""
    body = helper.make_graph(
        [
            helper.make_node("SequenceAt", ["frames", "turn"], ["frame"]),
            helper.make_node("Tanh", ["frame"], ["row"]),
            helper.make_node("SequenceInsert", ["before", "row"], ["after"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "body",
        [single("turn", TensorProto.INT64), single("going", TensorProto.BOOL), rows("before")],
        [single("on", TensorProto.BOOL), rows("after")],
    )
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=2),
        helper.make_node("SequenceAt", ["parts", "first"], ["a"]),
        helper.make_node("SequenceErase", ["parts", "first"], ["others"]),
        helper.make_node("SequenceAt", ["others", "first"], ["b"]),
        helper.make_node("SequenceConstruct", ["b", "a"], ["turned"]),
        helper.make_node("ConcatFromSequence", ["turned"], ["c"], axis=2),
        *convolution("c", "d"),
        helper.make_node("SplitToSequence", ["d"], ["frames"], axis=1, keepdims=0),
        helper.make_node("SequenceLength", ["frames"], ["turns"]),
        helper.make_node("SequenceEmpty", [], ["none"]),
        helper.make_node("Loop", ["turns", "", "none"], ["all"], body=body),
        helper.make_node("ConcatFromSequence", ["all"], ["y"], axis=1, new_axis=1),
    ]
    constants = {**weights(w=(5, 3, 3)), "sizes": np.array([1, 2]), "first": np.array(0)}
    return model(nodes, constants, SERIES)


def rows(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)


def spectra() -> onnx.ModelProto:
    """The power of each frame's frequencies, filtered, and back."""
    frames = [1, FRAMES, 8]
    nodes = [
        helper.make_node("Unsqueeze", ["x", "last"], ["signal"]),
        helper.make_node("DFT", ["signal", "", "axis"], ["spectrum"], onesided=1),
        helper.make_node("Mul", ["spectrum", "filter"], ["kept"]),
        helper.make_node("DFT", ["kept", "size", "axis"], ["back"], onesided=1, inverse=1),
        helper.make_node("Squeeze", ["back", "last"], ["smooth"]),
        *convolution("smooth", "y"),
    ]
    constants = {**weights(w=(5, 8, 3), filter=(5, 1)), "last": np.array([-1]), "axis": np.array(-2)}
    return with_opset(model(nodes, {**constants, "size": np.array(8)}, ["N", *frames[1:]]), 20)


FORMS: dict[str, tuple[Callable[[], onnx.ModelProto], int | None]] = {
    "If": (chosen, 3),
    "functions": (functions, 5),
    "IR 3": (weights_as_inputs, 3),
    "Softmax of opset 11": (old_softmax, 3),
    "Loop": (looped, None),
    "Scan": (scanned, None),
    "lists of tensors": (listed, 3),
    "Fourier transforms": (spectra, 3),
}
"""What builds a file, and the receptive field of its network."""


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_file_streams(form: str) -> None:
    build, receptive_field = FORMS[form]
    network = build()
    compiled = co3d.compile(network, time_dim=1)
    assert compiled.info.receptive_field == receptive_field and not compiled.info.recomputed
    assert co3d.verify(compiled, network).passed


def test_a_view_of_memory_is_for_several_streams() -> None:
    """As PyTorch's newer exporter writes a pool to one entry: indices into all entries of one clip, flattened."""
    nodes = [
        *convolution("x", "a"),
        helper.make_node("ReduceMean", ["a"], ["m"], axes=[1]),
        helper.make_node("Reshape", ["m", "flat"], ["f"]),
        helper.make_node("Gather", ["f", "places"], ["y"], axis=0),
    ]
    constants = {**weights(w=(5, 3, 3)), "flat": np.array([-1]), "places": np.arange(5).reshape(1, 5)}
    network = onnx.shape_inference.infer_shapes(model(nodes, constants, [1, *SERIES[1:]]))
    compiled = co3d.compile(network, time_dim=1)
    assert {state.shape[0] for state in compiled.info.states} == {"N"}
    with co3d.StreamSession(compiled, batch=2) as session:
        assert session.step(np.zeros((2, FEATURES), np.float32)).shape == (2, 5)
    assert co3d.verify(compiled, network).passed


def test_a_list_of_tensors_as_an_output_is_refused() -> None:
    network = model([helper.make_node("SplitToSequence", ["x"], ["y"], axis=1)], {}, SERIES)
    network.graph.output[0].CopyFrom(rows("y"))
    with pytest.raises(co3d.UnsupportedError, match="The output y of the ONNX file is no tensor"):
        co3d.compile(network, time_dim=1)


def test_a_state_as_an_input_becomes_a_constant() -> None:
    """As a detector of voices that takes and gives the state of its layers: their number is no number of clips."""
    nodes = [*convolution("x", "a"), helper.make_node("ReduceSum", ["h", "layers"], ["last"], keepdims=1),
             helper.make_node("Add", ["a", "last"], ["y"])]  # fmt: skip
    network = model(nodes, {**weights(w=(5, 3, 3)), "layers": np.array([0])}, SERIES)
    network.graph.input.append(value("h", 2, 1, 5))
    with pytest.raises(co3d.UsageError, match=r"input h \(2, 1, 5\) has no clips in dim 0(.|\n)*an initializer"):
        co3d.compile(network, time_dim=[1, None])
    network.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 1, 5), np.float32), "h"))
    compiled = co3d.compile(network, time_dim=1)
    assert compiled.info.receptive_field == 3 and co3d.verify(compiled, network).passed


def test_a_softmax_over_features_and_time_is_a_window() -> None:
    """In operator set 11 ``axis=1`` of (N, T, C) is over both."""
    nodes = [*convolution("x", "a"), helper.make_node("Softmax", ["a"], ["y"], axis=1)]
    network = with_opset(model(nodes, weights(w=(5, 3, 3)), SERIES), 11)
    assert co3d.compile(network, time_dim=1).info.recomputed


@pytest.mark.parametrize(
    ("kind", "direction", "started"),
    [
        *((kind, "forward", False) for kind in GATES),
        *(slow(kind, "forward", True) for kind in GATES),
        *(slow(kind, "bidirectional", True) for kind in ("LSTM", "RNN")),
        *(slow("RNN", "reverse", True), long("GRU", "reverse", True), long("GRU", "bidirectional", True)),
        long("LSTM", "reverse", True),
    ],
)
def test_recurrent_layers(kind: str, direction: str, started: bool) -> None:
    """One direction is a state, whatever it starts from; what comes from the end of a clip is a window."""
    count, gates = 2 if direction == "bidirectional" else 1, GATES[kind]
    shapes = {
        "w": (count, gates * SIZE, FEATURES), "r": (count, gates * SIZE, SIZE), "b": (count, 2 * gates * SIZE),
        "h": (count, 1, SIZE), "c": (count, 1, SIZE),
    }  # fmt: skip
    inputs = ["frames", "w", "r", "b", *(["", "h"] if started else []), *(["c"] if started and kind == "LSTM" else [])]
    extra = {"linear_before_reset": 1} if kind == "GRU" else {}
    nodes = [
        helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 2]),
        helper.make_node(kind, inputs, ["rows"], hidden_size=SIZE, direction=direction, **extra),
        helper.make_node("ReduceSum", ["rows", "axis"], ["all"], keepdims=0),
        helper.make_node("Transpose", ["all"], ["y"], perm=[1, 0, 2]),
    ]
    network = model(
        nodes, {**weights(**{k: s for k, s in shapes.items() if k in inputs}), "axis": np.array([1])}, [1, *SERIES[1:]]
    )
    compiled = co3d.compile(network, time_dim=1)
    assert bool(compiled.info.recomputed) == (direction != "forward")
    assert co3d.verify(compiled, network).passed


def test_weights_beside_the_file(tmp_path: Path) -> None:
    network = model(convolution("x", "y"), weights(w=(5, 3, 3)), SERIES)
    onnx.save(network, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    compiled = co3d.compile(tmp_path / "m.onnx", time_dim=1)
    assert co3d.verify(compiled, tmp_path / "m.onnx").passed


def test_a_file_with_one_number_as_its_answer_is_verified() -> None:
    """One number does not vary within a clip: it is measured by its size, and by other clips."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["m"], axes=[1, 2], keepdims=1),
        helper.make_node("Mul", ["m", "h"], ["s"]),
        helper.make_node("Add", ["s", "h"], ["y"]),
    ]
    network = model(nodes, {**weights(w=(4, 3, 3)), "h": np.float32(100)}, ["N", FEATURES, FRAMES])
    assert co3d.verify(co3d.compile(network, time_dim=2), network).passed


def test_a_file_that_the_runtime_cannot_open_is_told() -> None:
    sizes = np.array([1, 1, 2], np.float32)
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="cubic")]
    network = with_opset(model(nodes, {"scales": sizes}, ["N", FEATURES, FRAMES]), 13)
    with pytest.raises(co3d.VerificationError, match="cannot open the clip model itself"):
        co3d.verify(co3d.compile(network, time_dim=2), network)


def test_a_branch_that_an_input_decides_becomes_a_constant() -> None:
    """As a detector of voices that takes the rate of samples with each chunk."""
    network = chosen()
    network.graph.initializer.remove(next(v for v in network.graph.initializer if v.name == "yes"))
    network.graph.input.append(single("yes", TensorProto.BOOL))
    with pytest.raises(co3d.UnsupportedError, match=r"decided by the input yes(.|\n)*add an initializer"):
        co3d.compile(network, time_dim=1)
    network.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    compiled = co3d.compile(network, time_dim=1)
    assert [i.name for i in compiled.info.inputs] == ["x"] and co3d.verify(compiled, network).passed


def with_a_pointwise_operator() -> onnx.ModelProto:
    nodes = [*convolution("x", "a"), helper.make_node("Relu", ["a"], ["y"], name="/head/Relu")]
    nodes[1].name = "/stem/Conv"
    return model(nodes, weights(w=(5, 3, 3)), SERIES)


def test_a_node_that_is_read_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "Relu", replace(TABLE["Relu"], compute=lambda call, x: x.abs()))
    network = with_a_pointwise_operator()
    with pytest.raises(co3d.VerificationError, match=r"first at the node /head/Relu \(Relu\)"):
        co3d.verify(co3d.compile(network, time_dim=1), network)


def test_both_steps_of_a_verification_are_told_and_a_wrong_operator_by_its_node(tmp_path: Path) -> None:
    network = with_a_pointwise_operator()
    path = co3d.compile(network, time_dim=1).save(tmp_path / "step.onnx")
    found = co3d.verify(path, network)
    assert found.passed and found.notes[0].startswith("The network that was read is ")
    assert found.notes[0].endswith(" standard deviations from the ONNX file in ONNX Runtime.")
    step = onnx.load(path)
    weight = next(i for i in step.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) > 1)
    weight.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(step, path)
    found = co3d.verify(path, network)
    assert not found.passed and found.bisection is not None and found.bisection.difference is not None
    assert found.bisection.difference.module_path == "stem"
