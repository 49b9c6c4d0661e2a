"""A compiled file as a LiteRT file, run by the reader in examples/litert beside the session."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from target_rows import TARGET_ROWS, compiled_row

import co3d_compile as co3d
from co3d_compile.capture.onnx_reader.onnx_file import prepared
from co3d_compile.cli.main import main
from co3d_compile.targets.litert_graph import PASSES_ON, separated

EXAMPLE = Path(__file__).parents[1] / "examples" / "litert"
there = pytest.mark.skipif(importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed")


def export(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@there
@pytest.mark.parametrize("row", TARGET_ROWS)
def test_the_reader_gives_what_the_session_gives(row: str, tmp_path: Path) -> None:
    compiled, batch = compiled_row(row), TARGET_ROWS[row][2]
    path = compiled.save(tmp_path / "model.onnx")
    result = export(path, "--litert", tmp_path / "model.tflite", "--batch", batch, "--tensors", "channels-last")
    assert result.exit_code == 0, result.output
    sys.path.insert(0, str(EXAMPLE))
    from stream import Stream

    stream, session = Stream(str(tmp_path / "model.tflite")), co3d.StreamSession(path, batch, threads=1)
    generator = np.random.default_rng(0)
    last = stream.info["channels_last"]
    for number in range(session.info.warmup_steps + 6):
        frames = [generator.standard_normal((batch, *i.shape[1:]), dtype=np.float32) for i in session.info.inputs]
        expected = session.step(tuple(frames))
        actual = stream.step(*(np.moveaxis(x, 1, -1) if last and x.ndim == 4 else x for x in frames))
        for one, other in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
            turned = np.moveaxis(one, -1, 1) if last and one.ndim == 4 else one
            np.testing.assert_allclose(turned, other, atol=1e-4 * (float(np.std(other)) or 1.0), err_msg=str(number))
    stream.reset()
    again = [generator.standard_normal(stream.shapes[spec["name"]], dtype=np.float32) for spec in stream.info["inputs"]]
    first = stream.step(*again)
    assert all(map(np.array_equal, first, Stream(str(tmp_path / "model.tflite")).step(*again)))


@pytest.mark.parametrize("row", TARGET_ROWS)
def test_no_output_is_an_input_or_used_or_a_sum_with_a_state(row: str, tmp_path: Path) -> None:
    compiled = compiled_row(row)
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
    compiled = compiled_row("past entries")
    half = compiled.with_half_states().save(tmp_path / "half.onnx")
    result = export(half, "--litert", tmp_path / "half.tflite")
    assert result.exit_code == 5 and "reduced precision" in result.output
    assert not (tmp_path / "half.tflite").exists()


@pytest.mark.skipif(importlib.util.find_spec("litert_torch") is not None, reason="litert-torch is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    path = compiled_row("past entries").save(tmp_path / "model.onnx")
    result = export(path, "--litert", tmp_path / "model.tflite")
    assert result.exit_code == 5 and "[litert]" in result.output, result.output


@there
def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = compiled_row("past entries").save(tmp_path / "model.onnx")
    result = export(path, "--litert", tmp_path / "model.tflite", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["states"] == len(compiled_row("past entries").info.states)
