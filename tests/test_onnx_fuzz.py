"""Damaged and senseless ONNX files: each is compiled, or refused with an error that people can read."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import co3d_compile as co3d

FEW, MANY = 60, 2000
Change = Callable[[onnx.ModelProto, random.Random], None]


def network() -> onnx.ModelProto:
    """A small file with convolutions, a norm, a reshape, a gate and a linear layer."""
    generator = np.random.default_rng(0)
    constants = {
        "w1": generator.standard_normal((4, 3, 3, 3, 3)), "b1": generator.standard_normal(4),
        "w2": generator.standard_normal((4, 1, 3, 1, 1)), "scale": np.ones(2), "bias": np.zeros(2),
        "fc": generator.standard_normal((5, 4)),
    }  # fmt: skip
    initializers = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    shapes = {"to": [0, 2, -1], "back": [1, 4, 6, 4, 4], "axes": [2, 3, 4]}
    initializers += [onnx.numpy_helper.from_array(np.array(v, np.int64), k) for k, v in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="/stem/Conv", pads=[1] * 6),
        helper.make_node("Reshape", ["a", "to"], ["r"]),
        helper.make_node("InstanceNormalization", ["r", "scale", "bias"], ["n"], epsilon=1e-5),
        helper.make_node("Reshape", ["n", "back"], ["g"]),
        helper.make_node("Conv", ["g", "w2"], ["d"], group=4, pads=[1, 0, 0, 1, 0, 0]),
        helper.make_node("Sigmoid", ["d"], ["s"]),
        helper.make_node("Mul", ["d", "s"], ["m"]),
        helper.make_node("Add", ["m", "a"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "axes"], ["p"], keepdims=0),
        helper.make_node("Gemm", ["p", "fc"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "clip",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def rename_an_operator(model: onnx.ModelProto, chance: random.Random) -> None:
    names = [
        "Relu",
        "Conv",
        "Softmax",
        "Loop",
        "If",
        "Scan",
        "Shape",
        "Gather",
        "LSTM",
        "Resize",
        "TopK",
        "Attention",
        "",
    ]
    chance.choice(model.graph.node).op_type = chance.choice(names)


def rewire(model: onnx.ModelProto, chance: random.Random) -> None:
    node = chance.choice([n for n in model.graph.node if n.input])
    values = [
        "",
        "nothing",
        "x",
        *(o for n in model.graph.node for o in n.output),
        *(i.name for i in model.graph.initializer),
    ]
    node.input[chance.randrange(len(node.input))] = chance.choice(values)


def drop_a_node(model: onnx.ModelProto, chance: random.Random) -> None:
    del model.graph.node[chance.randrange(len(model.graph.node))]


def change_an_attribute(model: onnx.ModelProto, chance: random.Random) -> None:
    node = chance.choice([n for n in model.graph.node if n.attribute])
    attribute = chance.choice(node.attribute)
    value = chance.choice([0, 1, -1, 7, 2**40, "same", [], [0], [-1] * 6, [2**31] * 3, 0.5, float("nan")])
    node.attribute.remove(attribute)
    new = helper.make_attribute(attribute.name, value, attr_type=onnx.AttributeProto.INTS if value == [] else None)
    node.attribute.append(new)


def change_a_weight(model: onnx.ModelProto, chance: random.Random) -> None:
    weight = chance.choice(model.graph.initializer)
    dims = chance.choice([[], [0], [1], [-1], [4, 4], [2**20, 2**20], [2**40]])
    del weight.dims[:]
    weight.dims.extend(dims)


def change_numbers(model: onnx.ModelProto, chance: random.Random) -> None:
    weight = chance.choice(model.graph.initializer)
    try:
        array = onnx.numpy_helper.to_array(weight).copy().reshape(-1)
    except (ValueError, TypeError):  # an earlier change has made it unreadable
        return
    if array.size:
        array[chance.randrange(array.size)] = chance.choice([0, -1, 3, 2**30])
        weight.CopyFrom(onnx.numpy_helper.from_array(array.reshape(tuple(weight.dims)), weight.name))


def change_a_dtype(model: onnx.ModelProto, chance: random.Random) -> None:
    chance.choice(model.graph.initializer).data_type = chance.choice([0, 2, 7, 8, 10, 11, 16, 99])


def change_the_input(model: onnx.ModelProto, chance: random.Random) -> None:
    shape = model.graph.input[0].type.tensor_type.shape
    chance.choice(shape.dim).dim_value = chance.choice([0, -1, 1, 2, 10**9])


def change_the_opset(model: onnx.ModelProto, chance: random.Random) -> None:
    model.opset_import[0].version = chance.choice([-1, 0, 1, 6, 7, 9, 13, 25, 10**6])


CHANGES: list[Change] = [
    rename_an_operator, rewire, drop_a_node, change_an_attribute, change_a_weight, change_numbers, change_a_dtype,
    change_the_input, change_the_opset,
]  # fmt: skip


def mutated(seed: int) -> bytes:
    """One file: the network with one to three changes, or with some bytes changed, or cut off."""
    chance, model = random.Random(seed), network()
    if seed % 3:
        for _ in range(chance.randint(1, 3)):
            chance.choice(CHANGES)(model, chance)
        return model.SerializeToString()
    content = bytearray(model.SerializeToString())
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content[: chance.randrange(len(content))] if chance.random() < 0.2 else content)


def outcome(seed: int, folder: Path) -> str:
    """What comes of one file: compiled, or the kind of the error.

    Raises:
        Exception: Any that is not one of the package's own.
    """
    path = folder / f"{seed}.onnx"
    path.write_bytes(mutated(seed))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            co3d.compile(path)
    except co3d.Co3dError as error:
        assert str(error).strip()
        return type(error).__name__
    finally:
        path.unlink()
    return "compiled"


@pytest.mark.parametrize("seed", [1435], ids=["a Scan without the number of its inputs"])
def test_files_that_were_not_refused(seed: int, tmp_path: Path) -> None:
    assert outcome(seed, tmp_path) == "UnsupportedError"


@pytest.mark.slow
def test_damaged_files_are_refused_with_an_error_of_ours(tmp_path: Path) -> None:
    outcomes = [outcome(seed, tmp_path) for seed in range(FEW)]
    assert "compiled" in outcomes and len(set(outcomes)) > 2


@pytest.mark.long
def test_very_many_damaged_files(tmp_path: Path) -> None:
    for seed in range(FEW, MANY):
        outcome(seed, tmp_path)
