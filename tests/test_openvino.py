"""What the example for OpenVINO refuses. Its numbers, and those of ONNX Runtime's provider: test_targets."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from target_kinds import compiled_kind


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_files_that_the_example_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import onnx
    from openvino_stateful import OpenVINOStream

    path = compiled_kind("renamed").save(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="paired"):
        OpenVINOStream(path)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(ValueError, match="not compiled"):
        OpenVINOStream(path)
