"""Where things are: the places that a max pool of an ONNX file gives, what is put back there, rows of a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_files import convolution, model, weights
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.capture.onnx_reader.onnx_file import read_onnx

POOLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "series": ((2, 3, 9), {"kernel_shape": [3], "strides": [2]}),
    "pictures": ((2, 3, 6, 8), {"kernel_shape": [2, 3], "strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "column by column": ((2, 3, 6, 8), {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}),
    "uneven padding": ((2, 3, 6, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 2, 0]}),
    "padding, column by column": (
        (2, 3, 6, 8), {"kernel_shape": [3, 3], "strides": [2, 1], "auto_pad": "SAME_UPPER", "storage_order": 1}),
    "videos": ((2, 2, 4, 6, 5), {"kernel_shape": [2, 2, 2], "strides": [1, 2, 2], "ceil_mode": 1, "storage_order": 1}),
    "dilation": ((1, 2, 9, 9), {"kernel_shape": [2, 2], "dilations": [3, 2]}),
    "each entry": ((2, 3, 4, 5), {"kernel_shape": [1, 1], "strides": [1, 2]}),
}  # fmt: skip
"""The shape of what is pooled, and the attributes of the pool."""


@pytest.mark.parametrize("pool", POOLS)
def test_places_of_maxima_are_those_of_onnx_runtime(pool: str) -> None:
    shape, attributes = POOLS[pool]
    network = model([helper.make_node("MaxPool", ["x"], ["y", "places"], **attributes)], {}, list(shape))
    network.graph.output.append(helper.make_tensor_value_info("places", TensorProto.INT64, None))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    session = ort.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        results = read_onnx(network).module(torch.from_numpy(x)).values()
    for result, expected in zip(results, session.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.slow
def test_maxima_are_put_back_frame_by_frame() -> None:
    """Frames in the batch: the places count through all of them."""
    nodes = [
        helper.make_node("Reshape", ["x", "frames"], ["f"]),
        helper.make_node("Conv", ["f", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["c"], ["p", "places"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Relu", ["p"], ["r"]),
        helper.make_node("MaxUnpool", ["r", "places"], ["u"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["u", "clips"], ["y"]),
    ]
    constants = {**weights(w=(4, 3, 3, 3)), "frames": np.array([5, 3, 6, 6]), "clips": np.array([1, 5, 4, 6, 6])}
    network = model(nodes, constants, [1, 5, 3, 6, 6])
    compiled = co3d.compile(network, time_dim=1)
    assert compiled.info.receptive_field == 1 and not compiled.info.recomputed
    with co3d.StreamSession(compiled, batch=2) as session:
        assert session.step(np.zeros((2, 3, 6, 6), np.float32)).shape == (2, 4, 6, 6)
    assert co3d.verify(compiled, network).passed


def test_rows_of_tables_by_computed_numbers() -> None:
    """A table with a row for each of two numbers, flattened, and one by its last dim, as an exporter writes them."""
    nodes = [
        *convolution("x", "a"),
        helper.make_node("Unsqueeze", ["a", "last"], ["apart"]),
        helper.make_node("Sub", ["apart", "levels"], ["off"]),
        helper.make_node("Abs", ["off"], ["far"]),
        helper.make_node("ArgMin", ["far"], ["level"], axis=-1, keepdims=0),
        helper.make_node("Gather", ["turned", "level"], ["t"], axis=1),
        helper.make_node("Transpose", ["t"], ["rows"], perm=[1, 2, 3, 0]),
        helper.make_node("ArgMax", ["a"], ["best"], axis=2, keepdims=1),
        helper.make_node("Mul", ["best", "levels_of_each"], ["row"]),
        helper.make_node("Add", ["row", "level"], ["place"]),
        helper.make_node("Gather", ["table", "place"], ["both"], axis=0),
        helper.make_node("Add", ["rows", "both"], ["y"]),
    ]
    constants = {**weights(w=(5, 3, 3), levels=(4,), turned=(2, 4), table=(20, 2)), "last": np.array([-1])}
    network = model(nodes, {**constants, "levels_of_each": np.array(4)}, [1, 6, 3])
    compiled = co3d.compile(network, time_dim=1)
    assert compiled.info.receptive_field == 3 and not compiled.info.recomputed
    assert co3d.verify(compiled, network).passed


class InAllRows(nn.Module):
    """Places that count through all rows of a batch of frames, flattened: of pixels, and of the channels of pixels."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1)
        _, where = F.max_pool2d(y, 2, return_indices=True)
        pooled = y.flatten()[where + torch.arange(y.shape[0] * 4).view(-1, 4, 1, 1) * 36]
        points = y.flatten(2).transpose(1, 2)
        strongest = points[..., 0].topk(3).indices + torch.arange(len(y)).unsqueeze(1) * 36
        taken = points.flatten(0, 1)[strongest].mean(1)
        return (pooled.amax((2, 3)) + taken).view(x.shape[0], -1, 4)


def test_places_in_all_rows_are_of_each_row() -> None:
    network, clip = InAllRows().eval(), (torch.randn(1, 5, 4, 6, 6),)
    compiled = co3d.compile(network, clip, time_dim=1)
    assert compiled.info.receptive_field == 1 and not compiled.info.recomputed and not compiled.info.regions
    assert co3d.verify(compiled, network, clip).passed
