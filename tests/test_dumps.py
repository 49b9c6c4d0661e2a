"""Dumps: the graph as text, before the first pass and after each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_passes import NAMES, Nothing, compiles

import co3d_compile as co3d


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump") / "graphs"
    compiles(co3d.default_passes().after("canonicalize", Nothing()), dump=folder)
    return folder


def line(folder: Path, file: str, start: str) -> str:
    return next(text for text in (folder / file).read_text().splitlines() if re.search(start, text))


def test_a_dump_has_the_graph_before_the_first_pass_and_after_each(dump: Path) -> None:
    passes = [NAMES[0], "nothing", *NAMES[1:]]
    assert sorted(p.name for p in dump.iterdir()) == ["00_captured.txt", *(f"{i:02d}_{n}.txt" for i, n in
                                                                           enumerate(passes, 1))]  # fmt: skip


def test_a_dump_goes_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(co3d.OutputError, match=r"Cannot write dumps into .*file: File exists"):
        compiles(None, dump=tmp_path / "file")


def test_a_dump_names_the_module_and_the_shape(dump: Path) -> None:
    text = line(dump, "00_captured.txt", r"aten\.conv3d\(")
    assert "(2, 18, 8, 6, 6)" in text and text.endswith("# conv")
    assert "batch_norm" in (dump / "00_captured.txt").read_text()
    assert "batch_norm" not in (dump / "03_fold_batch_norm.txt").read_text()


def test_a_dump_shows_the_facts_once_they_are_known(dump: Path) -> None:
    assert "stream" not in line(dump, "03_fold_batch_norm.txt", r"aten\.conv3d\(")
    assert "stream (N2, 18, T8, 6, 6) pulse=1 delay=1" in line(dump, "05_annotate_time.txt", r"aten\.conv3d\(")


def test_a_dump_shows_each_step(dump: Path) -> None:
    assert "[1, 1, 1]" in line(dump, "05_annotate_time.txt", r"aten\.conv3d\(")
    assert "[0, 1, 1]" in line(dump, "07_strip_temporal_padding.txt", r"aten\.conv3d\(")
    assert "history" in (dump / "08_continual.txt").read_text()
    assert "window" in (dump / "09_windows_and_gates.txt").read_text()
    before, after = ((dump / name).read_text() for name in ("09_windows_and_gates.txt", "10_delay_residuals.txt"))
    assert after.count("= history(") == before.count("= history(") + 1, "the residual is held back by one entry"
    assert "conv3d" not in (dump / "12_lower.txt").read_text()
    assert "placeholder state_0" in (dump / "14_thread_states.txt").read_text()
