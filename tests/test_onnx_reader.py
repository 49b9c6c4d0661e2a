"""ONNX clip models in: operators by ONNX's own tests, networks by a round trip through both of PyTorch's exporters."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from marks import few, slow
from onnx import TensorProto, helper
from onnx_cases import node_tests, operator_of, run
from torch import nn
from zoo import Entry
from zoo.real import REAL
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.capture.onnx_reader.onnx_file import read_onnx

PAGE = Path(__file__).parents[1] / "docs" / "onnx.md"
SHARE = 0.95  # of ONNX's own tests of the operators that are claimed
NETWORKS = ["c3d", "lstm_head", "r2plus1d"]
EXPORTS = {
    "old exporter 13": {"dynamo": False, "opset_version": 13},
    "old exporter 17": {"dynamo": False, "opset_version": 17},
    "new exporter 18": {"dynamo": True, "opset_version": 18},
    "new exporter 20": {"dynamo": True, "opset_version": 20},
}
"""Both of PyTorch's exporters, each with two operator sets."""
FROM_OLD = ["band_attention", "cumulative_average", "group_norm-window", "st_gcn"]
"""What the old exporter writes in smaller operators, or with the batch fixed."""
FROM_NEW = [
    *(
        "attention_grouped",
        "class_token",
        "filtered",
        "module_unfold",
        "mirrored_ends",
        "resized_pictures",
        "rows_lstm",
    ),
    *("running_mean_per_frequency", "scatter_add", "shift_in_place", "stft_centred", "unet_linear", "unfold_mean"),
    "written",
]
"""What the new exporter writes as indices, as blocks that overlap, as other operators, or with sizes of one clip.

``make test-long`` runs all others, too.
"""
OTHERWISE = {
    "old exporter": {
        "adaptive_to_four": "an adaptive pool is written as a pool with strides",
        "codebook": "an index below zero is written as if it were counted from the front",
        "index_put": "blocks that overlap are written one by one",
        "overlapping_blocks": "blocks are written with sizes of one clip",
        "unfold_mean": "sliding windows are written as a list of slices: states of other shapes",
        "zeros_beside": "what is read as .data is stored: the numbers of the example clip",
    },
    "new exporter": {
        "adaptive_to_four": "an adaptive pool is written as a pool with strides",
        "bilinear_layer": "a layer is written as an einsum",
        "overlapping_blocks": "blocks are written with sizes of one clip",
        "cnn_rnn": "an RNN is written as a loop: a state of another shape",
        "in_memory": "the strides of memory are written as indices into one clip",
        "rows_projected": "an LSTM with projections is written as an LSTM without, whose weights do not fit",
        "rows_relu": "an RNN is written step by step",
        "rows_rnn": "an RNN is written step by step",
    },
}
"""Networks of which an exporter writes down less than the network says, or something else."""
OTHERWISE_IN_13 = {
    "videomae": "norms are written in smaller operators: states of another shape",
    "scatter_add": "what is written twice is not added up",
}
"""Those of the old exporter that say more in newer operator sets."""


def is_written(name: str, exporter: str) -> bool:
    """Whether an exporter writes down all that a network says."""
    in_13 = OTHERWISE_IN_13 if exporter.endswith("13") else {}
    return name not in OTHERWISE[exporter.rpartition(" ")[0]] | in_13


EVERY = [(n, e) for n in SMALL for e in EXPORTS if is_written(n, e)]


@pytest.mark.slow
def test_operators_pass_the_tests_of_onnx_itself() -> None:
    """What does not pass is named on the page, operator by operator."""
    outcomes = [run(test) for test in node_tests()]
    failed = {o.name.removeprefix("test_") for o in outcomes if not o.passed}
    assert len(failed) <= (1 - SHARE) * len(outcomes)
    named = set(
        re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8").partition("## Tests that fail")[2], re.M)
    )
    assert failed == named, "run benchmarks/onnx_operators.py"


@pytest.mark.parametrize("exporter", EXPORTS)
@pytest.mark.parametrize("name", [slow(n) if n == "c3d" else n for n in NETWORKS if n in SMALL])
def test_a_network_is_the_same_from_onnx(name: str, exporter: str, tmp_path: Path) -> None:
    is_the_same(SMALL[name], exporter, tmp_path)


@pytest.mark.parametrize(
    ("name", "exporter"),
    few(
        [*((n, "old exporter 17") for n in FROM_OLD), *((n, "new exporter 20") for n in FROM_NEW)],
        *(("cumulative_average", "old exporter 17"), ("group_norm-window", "old exporter 17")),
        ("unfold_mean", "new exporter 20"),
    ),
)
def test_what_an_exporter_writes_out_is_found_again(name: str, exporter: str, tmp_path: Path) -> None:
    is_the_same(SMALL[name], exporter, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("name", "exporter"), EVERY)
def test_every_small_network_is_the_same_from_onnx(name: str, exporter: str, tmp_path: Path) -> None:
    is_the_same(SMALL[name], exporter, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("name", "exporter"), [(n, e) for n in REAL for e in EXPORTS if is_written(n, e)])
def test_every_real_network_is_the_same_from_onnx(name: str, exporter: str, tmp_path: Path) -> None:
    is_the_same(REAL[name].entry(), exporter, tmp_path)


def is_the_same(entry: Entry, exporter: str, folder: Path) -> None:
    """Delay, receptive field, warm-up, states, work and every number of a stream are those of the PyTorch network."""
    network, clip = entry.build().eval(), tuple(entry.examples())
    try:
        path = exported(network, clip, folder / "clip.onnx", EXPORTS[exporter])
    except Exception as error:  # what the exporter raises is its own affair
        pytest.skip(f"the {exporter} refuses it: {next(iter(str(error).splitlines()), type(error).__name__)}")
    of_torch = co3d.compile(network, clip, time_dim=entry.time_dim, **entry.options)
    of_onnx = co3d.compile(path, time_dim=entry.time_dim, **entry.options)
    assert facts(of_onnx) == facts(of_torch)
    generator = np.random.default_rng(0)
    with co3d.StreamSession(of_torch) as one, co3d.StreamSession(of_onnx) as other:
        for _ in range(20):
            frames = [generator.standard_normal((1, *i.shape[1:])).astype(np.float32) for i in of_torch.info.inputs]
            for a, b in zip(results(one.step(*frames)), results(other.step(*frames)), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * float(np.abs(a).max()) + 1e-6)


def results(found: Any) -> list[Any]:
    """All results of a step, in their order."""
    if isinstance(found, dict):
        return list(found.values())
    return list(found) if isinstance(found, (tuple, list)) else [found]


def exported(network: nn.Module, clip: tuple[torch.Tensor, ...], path: Path, how: dict[str, Any]) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(network, clip, str(path), **how)
    return path


def facts(compiled: co3d.CompiledModel) -> dict[str, Any]:
    info, report = compiled.info, compiled.report()
    return {
        "delays": list(info.delays.values()),
        "receptive field": info.receptive_field,
        "warm-up": info.warmup_steps,
        "frames per step": list(info.frames_per_step.values()),
        "states": sorted(tuple(str(size) for size in s.shape if size != 1) for s in info.states),
        "multiply-adds": round(report.gmac_frame * 1e9),
        "recomputed": len(info.recomputed),
    }


def convolution(opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    """A file of one convolution over time and space."""
    weight = np.random.default_rng(0).standard_normal((2, 3, 3, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="/stem/Conv", **attributes)
    graph = helper.make_graph(
        [node],
        "clip",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize("opset", [7, 11, 17, 22])
@pytest.mark.parametrize(
    "attributes", [{"pads": [1] * 6}, {"auto_pad": "SAME_UPPER"}, {"pads": [2, 0, 0, 0, 0, 0]}, {}]
)
def test_one_convolution_streams(opset: int, attributes: dict[str, Any]) -> None:
    model = convolution(opset, **attributes)
    compiled = co3d.compile(model)
    assert compiled.info.inputs[0].name == "x" and list(compiled.info.delays) == ["y"]
    assert compiled.info.receptive_field == 3
    assert compiled.info.states[0].input == "state.stem.0"


@pytest.mark.parametrize("name", ["model", "graph", "run", "training", "forward", "while", "None"])
def test_scopes_may_have_any_name(name: str) -> None:
    """Also one that a module of PyTorch, or the one that runs the file, has itself."""
    model = convolution()
    model.graph.node[0].name = f"/{name}/Conv"
    model.graph.node[0].input[1] = model.graph.initializer[0].name = f"{name}.weight"
    assert co3d.compile(model).info.receptive_field == 3


def test_models_of_other_libraries_are_taken() -> None:
    for model in (convolution(), ir.serde.deserialize_model(convolution())):
        assert co3d.compile(model).info.receptive_field == 3


@pytest.mark.parametrize("free", [{"dim_param": "height"}, {"dim_value": -1}], ids=["by name", "as Paddle does"])
def test_free_dims_are_asked_for(free: dict[str, Any]) -> None:
    model = convolution()
    model.graph.input[0].type.tensor_type.shape.dim[3].CopyFrom(onnx.TensorShapeProto.Dimension(**free))
    with pytest.raises(co3d.UsageError, match=r"x has the shape \?x3x8x\?x6"):
        co3d.compile(model)
    assert co3d.compile(model, (torch.zeros(1, 3, 8, 6, 6),)).info.receptive_field == 3


def test_all_unknown_operators_are_named_at_once() -> None:
    model = convolution()
    for i, operator in enumerate(["Unique", "NonZero", "NonZero"]):
        model.graph.node.append(helper.make_node(operator, ["y"], [f"z{i}"], name=f"/head/{i}"))
    with pytest.raises(
        co3d.UnsupportedError, match=r"opset 17.*Unique \(1 times.*NonZero \(2 times, first at node /head/1\)"
    ):
        co3d.compile(model)


def test_an_attribute_that_is_not_known_is_refused() -> None:
    with pytest.raises(co3d.UnsupportedError, match="'causal', which is not known"):
        co3d.compile(convolution(causal=1))


def test_a_compiled_file_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    co3d.compile(convolution()).save(path)
    with pytest.raises(co3d.LoadError, match="one at a time already"):
        co3d.compile(path)


def test_a_path_without_a_file_is_told() -> None:
    with pytest.raises(co3d.LoadError, match=r"There is no file model\.onnx"):
        co3d.compile("model.onnx")


@pytest.mark.parametrize(("content", "said"), [(b"", "cannot be read"), (b"\x08\x07garbage", "cannot be read")])
def test_damaged_files_are_told(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(co3d.Co3dError, match=said):
        co3d.compile(tmp_path / "bad.onnx")


def test_weights_from_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(convolution(), folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert read_onnx(folder / "m.onnx").module is not None
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../w.bin"
    (tmp_path / "w.bin").write_bytes((folder / "w.bin").read_bytes())
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(co3d.LoadError, match=r"outside|beside|cannot be read"):
        co3d.compile(folder / "m.onnx")


def test_quantized_models_are_read_as_floats() -> None:
    weight = np.array([[[-2, 4, 6]]], np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"]),
        helper.make_node("Conv", ["d", "wf"], ["y"], pads=[2, 0]),
    ]
    constants = {
        "sx": np.float32(0.1),
        "zx": np.uint8(128),
        "w": weight,
        "sw": np.float32(0.5),
        "zw": np.int8(0),
    }
    graph = helper.make_graph(
        nodes,
        "clip",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 8])],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.warns(co3d.Co3dWarning, match="without rounding to 8 bits"):
        compiled = co3d.compile(model, time_dim=2)
    with co3d.StreamSession(compiled) as session:
        values = [float(session.step(np.array([[v]], np.float32))[0, 0]) for v in (1.0, 2.0, 3.0)]
    assert values == pytest.approx([3.0, 8.0, 12.0])


def test_every_claimed_operator_has_a_test() -> None:
    assert len({operator_of(t) for t in node_tests()}) > 120
