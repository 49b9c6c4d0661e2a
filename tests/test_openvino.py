"""A compiled file in OpenVINO: by ONNX Runtime's provider, and with OpenVINO's own form of state."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from target_rows import TARGET_ROWS, compiled_row

import co3d_compile as co3d

PROVIDER = "OpenVINOExecutionProvider"
ROWS = [row for row in TARGET_ROWS if row != "states that only move"]  # OpenVINO's own form of state has no such


def expected_of(row: str) -> tuple[list[list[Any]], list[tuple[Any, ...]]]:
    """Inputs and results of each step, in ONNX Runtime on the CPU."""
    session = co3d.StreamSession(compiled_row(row), batch=TARGET_ROWS[row][2], threads=1)
    generator = np.random.default_rng(0)
    steps, results = [], []
    for _ in range(session.info.warmup_steps + 4):
        shapes = [(session.batch, *item.shape[1:]) for item in session.info.inputs]
        steps.append([generator.standard_normal(shape, dtype=np.float32) for shape in shapes])
        result = session.step(steps[-1])
        results.append(result if isinstance(result, tuple) else (result,))
    return steps, results


def assert_equal(actual: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    for rows, wanted in zip(actual, expected, strict=True):
        for one, other in zip(rows, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4 * (float(np.std(other)) or 1.0))


@pytest.mark.skipif(PROVIDER not in ort.get_available_providers(), reason="needs onnxruntime-openvino")
@pytest.mark.parametrize("row", TARGET_ROWS)
def test_the_provider(row: str) -> None:
    steps, expected = expected_of(row)
    options = {"device_type": "CPU", "precision": "FP32"}
    session = co3d.StreamSession(compiled_row(row), batch=TARGET_ROWS[row][2], providers=[(PROVIDER, options)])
    for _ in range(2):
        session.reset()
        results = [session.step(frames) for frames in steps]
        assert_equal([r if isinstance(r, tuple) else (r,) for r in results], expected)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("stateful", [True, False], ids=["stateful", "states as inputs"])
@pytest.mark.parametrize("row", ROWS)
def test_the_stateful_example(row: str, stateful: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    from openvino_stateful import OpenVINOStream

    steps, expected = expected_of(row)
    path = compiled_row(row).save(tmp_path / "model.onnx")
    stream = OpenVINOStream(path, batch=TARGET_ROWS[row][2], threads=1, stateful=stateful)
    for _ in range(2):
        stream.reset()
        assert_equal([stream.step(*frames) for frames in steps], expected)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_files_that_the_example_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import onnx
    from openvino_stateful import OpenVINOStream

    path = compiled_row("states that only move").save(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="paired"):
        OpenVINOStream(path)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(ValueError, match="not compiled"):
        OpenVINOStream(path)
