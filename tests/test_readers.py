"""What the contract's readers in other languages refuse, and how short they are. Their numbers: test_targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from target_kinds import compiled_kind
from target_readers import EXAMPLES, Missing, cpp, node, run

READERS = {"node": node, "cpp": cpp}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"no model", None], ids=["empty", "text", "not compiled"])
def test_a_file_that_is_no_compiled_model(reader: str, content: bytes | None, tmp_path: Path) -> None:
    try:
        command = READERS[reader]()
    except Missing as error:
        pytest.skip(str(error))
    path = tmp_path / "model.onnx"
    path.write_bytes(without_metadata() if content is None else content)
    (tmp_path / "frames.bin").write_bytes(b"")
    done = run(command, path, tmp_path / "frames.bin", tmp_path / "results.bin")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and (content is not None or "co3d-compile" in done.stderr)


def without_metadata() -> bytes:
    import onnx

    model = onnx.load_from_string(compiled_kind("past entries").to_bytes())
    del model.metadata_props[:]
    blob: bytes = model.SerializeToString()
    return blob


@pytest.mark.parametrize(
    "path", [*EXAMPLES.glob("node/*.*js"), *EXAMPLES.glob("cpp/*.cpp")], ids=lambda path: path.name
)
def test_a_reader_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 120
