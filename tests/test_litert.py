"""A compiled file as a LiteRT file: its graph, its metadata, and what it is refused for (its numbers: test_targets)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from target_kinds import KINDS, compiled_kind

from co3d_compile.capture.onnx_reader.onnx_file import prepared
from co3d_compile.cli.main import main
from co3d_compile.contract.read_contract import parse
from co3d_compile.targets.litert_graph import PASSES_ON, separated

there = pytest.mark.skipif(importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed")


def export(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("network", [kind for kind in KINDS if kind != "boxes"])
def test_no_output_is_an_input_or_used_or_a_sum_with_a_state(network: str, tmp_path: Path) -> None:
    compiled = compiled_kind(network)
    model = prepared(ir.load(compiled.save(tmp_path / "model.onnx")))
    states = {state.input: state.output for state in compiled.info.states}
    results = [output.name for output in compiled.info.outputs]
    moved = separated(model, len(results), states)
    outputs = list(model.graph.outputs)
    assert [v.name for v in outputs[: len(results)]] == results
    assert len(set(outputs)) == len(outputs)
    for value in outputs:
        node = value.producer()
        assert node is not None and not value.uses() and node.op_type not in PASSES_ON
        assert node.op_type != "Add" or not any(v is not None and v.name in states for v in node.inputs)
    given = {v.name for v in (*model.graph.inputs, *outputs)}
    sources = [moved.get(output, output) for output in states.values()]
    assert given.issuperset(sources) and len(set(sources)) == len(sources)


def test_what_it_refuses(tmp_path: Path) -> None:
    compiled = compiled_kind("past entries")
    half = compiled.with_half_states().save(tmp_path / "half.onnx")
    result = export(half, "--litert", tmp_path / "half.tflite")
    assert result.exit_code == 5 and "reduced precision" in result.output
    assert not (tmp_path / "half.tflite").exists()


@pytest.mark.skipif(importlib.util.find_spec("litert_torch") is not None, reason="litert-torch is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    path = compiled_kind("past entries").save(tmp_path / "model.onnx")
    result = export(path, "--litert", tmp_path / "model.tflite")
    assert result.exit_code == 5 and "[litert]" in result.output, result.output


@there
@pytest.mark.parametrize(("network", "wide"), [("past entries", False), ("recomputed convolutions", True)])
def test_the_file_says_what_it_is(network: str, wide: bool, tmp_path: Path) -> None:
    """Tensors of five dims are left where 3D convolutions run on a window alone, and the command says so."""
    path = compiled_kind(network).save(tmp_path / "model.onnx")
    result = export(path, "--litert", tmp_path / "model.tflite", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["states"] == len(compiled_kind(network).info.states)
    assert ["more than four dims" in note for note in said["notes"]] == [True] * wide


@there
def test_the_contract_in_the_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of states among its counters too."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "litert")
    from stream import contract

    path = compiled_kind("region with a least length").save(tmp_path / "model.onnx")
    result = export(path, "--litert", tmp_path / "model.tflite", "--tensors", "channels-first")
    assert result.exit_code == 0, result.output
    assert len(parse(json.dumps(contract((tmp_path / "model.tflite").read_bytes()))).counters) == 2
