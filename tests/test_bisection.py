"""A file that is wrong somewhere: ``verify`` names the operator, and names none where it cannot know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled import compiled as zoo_compiled
from marks import long
from onnx import numpy_helper
from torch import nn
from verified_networks import build, contract, rewrite, saved
from zoo import Graph, randomise
from zoo.real import REAL

import co3d_compile as co3d
from co3d_compile.contract.model_contract import REPORT_KEY
from co3d_compile.ir.graph_edits import insert, insert_constant, replace
from co3d_compile.ir.node_reading import module_path
from co3d_compile.support.machine import block_channels
from co3d_compile.verification import first_difference as bisection
from co3d_compile.verification.findings import Bisection, Difference
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow

aten = torch.ops.aten


def perturb(path: Path, start: str, number: float | None = None) -> None:
    """Puts another number into the weights of the first node of this name, or this one everywhere."""
    model = onnx.load(path)
    floats = {i.name: i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1}
    node = next(n for n in model.graph.node if n.name.startswith(start) and set(n.input) & set(floats))
    weight = floats[next(name for name in node.input if name in floats)]
    values = numpy_helper.to_array(weight).copy()
    if number is None:
        values.flat[values.size // 3] += 0.3 * values.std() + 1e-2
    else:
        values[...] = number
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)


def found(path: Path, module: nn.Module, example: Any, **options: Any) -> Bisection:
    result = verify(path, module, example, **options)
    assert not result.passed and result.bisection is not None, result
    assert result.to_dict()["bisection"]["message"] == result.bisection.message
    return result.bisection


def difference(path: Path, module: nn.Module, example: Any, **options: Any) -> Difference:
    what = found(path, module, example, **options)
    assert what.difference is not None, what.message
    assert str(what.difference) in what.message and 0 < what.compared <= what.operators
    assert what.difference.after > 100 * what.difference.before
    return what.difference


# Network, the node whose weights are changed, the operator and module that must be named.
SMALL = [
    ("residual", "a/", "aten.conv1d", "a"),
    ("residual", "b/", "aten.conv1d", "b"),
    ("batch norm", "0/", "aten.conv3d", "0"),
    ("mean gate, frame", "f/", "aten.conv3d", "f"),
    ("mean gate, frame", "b/", "aten.conv3d", "b"),
    ("mean gate, window", "f/", "aten.conv3d", "f"),
    ("mean gate, recompute", "b/", "aten.conv3d", "b"),
    ("max gate, window", "a/", "aten.conv3d", "a"),
    ("flat gate", "f/", "aten.linear", "f"),
    ("strides", "s/", "aten.conv1d", "s"),
    ("strides", "l/", "aten.linear", "l"),
    ("dense", "2/", "aten.conv1d", "2"),
    ("dense head", "a/", "aten.conv1d", "a"),
    ("mean head", "l/", "aten.linear", "l"),
    ("whole kernel head, window 20", "a/", "aten.conv1d", "a"),
    ("linear over time", "l/", "aten.linear", "l"),
    ("attention", "q/", "aten.linear", "q"),
    ("two rates", "b/", "aten.conv1d", "b"),
    ("two outputs", "b/", "aten.conv1d", "b"),
    ("lstm", "r/", "aten.lstm", "r"),
    ("lstm, last hidden", "a/", "aten.conv1d", "a"),
    ("up and down", "0/", "aten.conv1d", "0"),
    ("folded time", "l/", "aten.linear", "l"),
    ("four frames a step", "2/", "aten.conv1d", "2"),
]


@pytest.mark.parametrize(
    ("network", "node", "operator", "module"), SMALL, ids=[f"{n}, {at[:-1]}" for n, at, *_ in SMALL]
)
def test_names_the_operator_whose_weights_were_changed(
    network: str, node: str, operator: str, module: str, tmp_path: Path
) -> None:
    path, clip_model, example = saved(network, tmp_path)
    perturb(path, node)
    what = difference(path, clip_model, example)
    assert (what.operator, what.module_path) == (operator, module)


@pytest.mark.parametrize("options", [{"boundary": "exact"}, {"state_io": "renamed"}])
def test_other_forms_of_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    example = (torch.randn(2, 3, 8, 6, 6),)
    layers = [nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1), nn.MaxPool3d(3, 1, 1)]
    network = randomise(nn.Sequential(*layers), *example)
    path = co3d.compile(network, example, **options).save(tmp_path / "model.onnx")
    assert verify(path, network, example).passed
    perturb(path, "2/")
    assert difference(path, network, example).module_path == "2"


REALS = {
    "x3d_xs": ["blocks.0.conv.conv_t", "blocks.4.res_blocks.1.branch2.conv_c", "blocks.5.proj"],
    "r2plus1d_18": ["layer3.0.downsample.0"],
}


@pytest.mark.parametrize("network", ["x3d_xs", long("r2plus1d_18")])
def test_real_networks_first_layer_deep_branch_and_head(network: str, tmp_path: Path) -> None:
    entry = REAL[network].entry(small=True)
    model, clip_model = zoo_compiled(entry), entry.build()
    for module in REALS[network]:
        path = model.save(tmp_path / "model.onnx")
        perturb(path, f"{module}/")
        assert difference(path, clip_model, entry.examples()).module_path == module


def test_looks_at_few_operators_at_a_time_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [layer for _ in range(12) for layer in (nn.Conv1d(4, 4, 3, padding=1), nn.Tanh())]
    example = (torch.randn(1, 4, 8),)
    network = randomise(nn.Sequential(*layers), *example)
    path = co3d.compile(network, example).save(tmp_path / "model.onnx")
    perturb(path, "6/")
    monkeypatch.setattr(bisection, "BYTES", 1)
    what = found(path, network, example)
    assert what.difference is not None and what.difference.module_path == "6"
    assert what.compared < what.operators / 2


class Wrong(co3d.Pass):
    """A pass that breaks one module, in the way it is told."""

    requires = frozenset({"canonical"})

    def __init__(self, module: str, how: Callable[[Any, Any], None]) -> None:
        self.module, self.how = module, how

    def run(self, program: Any) -> bool:
        node = next(n for n in program.graph.nodes if n.op == "call_function" and module_path(n) == self.module)
        self.how(program, node)
        return True


def other_operator(program: Any, node: Any) -> None:
    replace(node, insert(program, node, aten.hardtanh.default, *node.args))


def other_weight(program: Any, node: Any) -> None:
    weight = program.constant(node.args[1])
    node.args = (node.args[0], insert_constant(program, node, "other", weight * 1.01), *node.args[2:])


def one_more_operator(program: Any, node: Any) -> None:
    with program.graph.inserting_after(node):
        after = program.graph.call_function(aten.mul.Tensor, (node, 1.01))
    after.meta = dict(node.meta)
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)


@pytest.mark.parametrize(
    ("module", "how", "named", "through"),
    [
        ("1", other_operator, "1", ()),
        ("2", other_weight, "2", ()),
        ("2", one_more_operator, "3", ("aten.mul in 2",)),
    ],
)
@pytest.mark.parametrize("after", ["canonicalize", "fold_batch_norm"])
def test_names_what_a_wrong_pass_has_done(
    module: str, how: Any, named: str, through: tuple[str, ...], after: str, tmp_path: Path
) -> None:
    example = (torch.randn(1, 3, 8, 6, 6),)
    layers = [nn.Conv3d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 4, 3, padding=1), nn.Sigmoid()]
    network = randomise(nn.Sequential(*layers, nn.Conv3d(4, 2, 3, padding=1)), *example)
    passes = co3d.default_passes().after(after, Wrong(module, how))
    path = co3d.compile(network, example, passes=passes).save(tmp_path / "model.onnx")
    what = difference(path, network, example)
    assert (what.module_path, what.through) == (named, through)


def test_a_delay_that_is_stated_wrong_is_no_operators_fault(tmp_path: Path) -> None:
    path, network, example = saved("mean head", tmp_path)
    output = contract(path).outputs[0]
    rewrite(path, outputs=(type(output)(**{**fields(output), "delay": output.delay + 1}),))
    what = found(path, network, example)
    assert what.difference is None
    assert f"the file says that 'output' has a delay of {output.delay + 1}, and it is {output.delay}" in what.message


def fields(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__slots__}


def forget(path: Path, rename: bool = False) -> None:
    """Takes the report out of a file, as a tool that rewrites it may."""
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != REPORT_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if rename:
        model.graph.node[0].name = "something_else"
    onnx.save(model, path)


def test_without_a_report_the_model_is_compiled_again(tmp_path: Path) -> None:
    path, network, example = saved("strides", tmp_path)
    perturb(path, "s/")
    forget(path)
    assert difference(path, network, example).module_path == "s"


def test_says_that_it_does_not_know(tmp_path: Path) -> None:
    path, network, example = saved("strides", tmp_path)
    perturb(path, "s/")
    forget(path, rename=True)
    what = found(path, network, example)
    assert what.difference is None
    assert "not known" in what.message and "node by node" in what.message


def test_a_file_of_another_network_is_not_matched(tmp_path: Path) -> None:
    path, _, example = saved("residual", tmp_path)
    other = randomise(Graph(lambda m, x: x * m.a(x).sigmoid() + x, a=nn.Conv1d(4, 4, 3, padding=1)), *example)
    what = found(path, other, example)
    assert what.difference is None and "the model has no operator" in what.message


def test_every_operator_agrees_where_only_the_start_is_wrong(tmp_path: Path) -> None:
    """A state that multiplies by zero is as good as none, and never lets go of NaN."""
    path, network, example = saved("residual", tmp_path)
    model = onnx.load(path)
    state = contract(path).states[0]
    name = next(o.name for o in model.graph.output if o.name == "output")
    for node in model.graph.node:
        node.output[:] = ["inner" if output == name else output for output in node.output]
        node.input[:] = ["inner" if value == name else value for value in node.input]
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    model.graph.initializer.append(zero)
    make = onnx.helper.make_node
    model.graph.node.extend([make("Mul", ["held", "zero"], ["nothing"]), make("Add", ["inner", "nothing"], [name])])
    shape = ["N", *state.shape[1:]]
    model.graph.input.append(onnx.helper.make_tensor_value_info("held", onnx.TensorProto.FLOAT, shape))
    model.graph.node.append(make("Identity", ["held"], ["still"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("still", onnx.TensorProto.FLOAT, shape))
    onnx.save(model, path)
    more = type(state)(**{**fields(state), "input": "held", "output": "still"})
    rewrite(path, states=(*contract(path).states, more))
    result = verify(path, network, example)
    assert not result.passed and result.finite_from is None and result.bisection is None
    assert "depends on what the states held at the start" in result.reason


def test_only_on_request(tmp_path: Path) -> None:
    path, network, example = saved("residual", tmp_path)
    perturb(path, "a/")
    assert verify(path, network, example, bisect=False).bisection is None
    module, clip, options = build("residual")
    assert verify(co3d.compile(module, clip, **options), module, clip).bisection is None


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    path, network, example = saved("strides", tmp_path)
    perturb(path, "b/", np.nan)
    result = verify(path, network, example)
    assert result.finite_from is None and result.bisection is not None and result.bisection.difference is not None
    assert result.bisection.difference.module_path == "b"


@pytest.mark.skipif(block_channels() == 1, reason="ONNX Runtime has no blocked layout here")
def test_values_in_blocks_are_not_compared(tmp_path: Path) -> None:
    example = (torch.randn(1, 3, 8, 8, 8),)
    network = randomise(nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3)), *example)
    path = co3d.compile(network, example).to_native().save(tmp_path / "model.onnx")
    assert verify(path, network, example).passed
    with torch.no_grad():
        network[0].weight *= 1.1
    what = found(path, network, example)
    assert what.difference is None and "--native" in what.message
