"""The commands with the compiler behind them: what a user meets, end to end on tiny models."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from marks import slow
from model_files import FACTORY, save_export, save_onnx, save_pickle, save_script, tiny, use_folder

from co3d_compile.cli import doctor
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.features import FEATURES
from co3d_compile.cli.main import main as group
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.install_hint import install_command

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
SHAPE = ["--shape", "1x3x4x8x8"]
OUT = ["-o", "out.onnx"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


def call(*args: str) -> Result:
    return CliRunner().invoke(compile_command, list(args))


def report_of(*args: str) -> dict[str, Any]:
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def files() -> set[str]:
    return {name for name in os.listdir() if not name.startswith(("co3d_test", "__pycache__"))}


SOURCES: dict[str, tuple[Callable[[], str], list[str]]] = {
    "export": (save_export, []),
    "ONNX": (save_onnx, []),
    "script": (save_script, SHAPE),
    "pickle": (save_pickle, [*SHAPE, "--trust-pickle"]),
    "factory": (lambda: f"{FACTORY}:tiny", SHAPE),
    "keyword": (lambda: f"{FACTORY}:ByKeyword", ["--input", "video=1,3,4,8,8"]),
}


@pytest.mark.parametrize(("make", "more"), SOURCES.values(), ids=SOURCES)
def test_every_source_compiles_and_verifies(make: Callable[[], str], more: list[str]) -> None:
    report = report_of(make(), *OUT, *more)
    assert report["verification"]["passed"]
    assert report["receptive_field"] == 3
    assert report["recomputed"] == []
    assert [row["action"] for row in report["actions"]].count("continual") == 1
    assert report["file_bytes"] == Path("out.onnx").stat().st_size
    session = StreamSession("out.onnx")
    assert np.asarray(session.step(np.zeros((1, 3, 8, 8), np.float32))).shape == (1, 4, 8, 8)


def with_weights() -> str:
    torch.save(tiny().state_dict(), "w.pth")
    return f"{FACTORY}:tiny"


def of_any_size() -> str:
    """An ONNX clip model whose file does not say how long its clips are."""
    import onnx

    model = onnx.load(save_onnx())
    for value in (*model.graph.input, *model.graph.output):
        for dim in list(value.type.tensor_type.shape.dim)[2:]:
            dim.dim_param = "any"
    onnx.save(model, "clip.onnx")
    return "clip.onnx"


@pytest.mark.parametrize(
    ("make", "more", "options"),
    [
        (with_weights, ["--weights", "w.pth"], []),
        slow(of_any_size, [], []),
        slow(save_script, [], ["--frames-per-step", "2"]),
        slow(save_pickle, ["--trust-pickle"], ["--window", "8"]),
    ],
    ids=["factory", "ONNX", "script", "pickle"],
)
def test_a_compiled_file_knows_the_clip(make: Callable[[], str], more: list[str], options: list[str]) -> None:
    model = make()
    report_of(model, *OUT, *SHAPE, *more, *options)
    result = CliRunner().invoke(group, ["verify", "out.onnx", "--against", model, *more])
    assert result.exit_code == 0, result.stderr
    assert ("1x3x4x8x8, as the compiled file says" in result.stdout) == (model != "clip.onnx")
    other = CliRunner().invoke(group, ["verify", "out.onnx", "--against", model, *more, "--shape", "1x3x4x8x9"])
    assert other.exit_code != 0


def test_the_step_as_a_torch_export_program() -> None:
    from co3d_compile.verification.exported_step import load_step

    report = report_of(save_export(), "-o", "step.pt2")
    assert report["verification"]["passed"]
    assert report["file_bytes"] == Path("step.pt2").stat().st_size
    assert files() == {"m.bin", "step.pt2"}
    _, info = load_step("step.pt2")
    assert info.receptive_field == 3
    report = report_of(save_export(), "-o", "step.pt2", "--no-verify")
    assert report["verification"] is None and report["output"] == "step.pt2"


def test_a_model_without_time_says_so() -> None:
    report = report_of(f"{FACTORY}:still", *OUT, *SHAPE)
    assert report["state_count"] == 0
    assert any("no temporal operator" in note for note in report["warnings"])
    assert report["verification"]["passed"]


def test_what_falls_back_is_listed() -> None:
    result = call(f"{FACTORY}:Flip", *OUT, *SHAPE)
    assert result.exit_code == 0, result.stderr
    assert "Recomputed on a window" in result.stdout and "aten.flip" in result.stdout


def test_dump() -> None:
    report_of(f"{FACTORY}:tiny", *OUT, *SHAPE, "--dump", "d")
    assert any("strip_temporal_padding" in name for name in os.listdir("d"))


@pytest.mark.parametrize(
    ("factory", "more", "code", "says"),
    [
        ("Flip", ["--unsupported", "error"], 5, "aten.flip"),
        ("tiny", ["--time-dim", "1"], 2, "time_dim=1"),
        ("tiny", ["--time-dim", "7"], 2, "time_dim=7"),
        ("tiny", ["--time-dim", "none"], 2, "time dim"),
        ("DataDependent", [], 4, "line "),
    ],
)
def test_bad_input(factory: str, more: list[str], code: int, says: str) -> None:
    result = call(f"{FACTORY}:{factory}", *OUT, *SHAPE, *more)
    assert result.exit_code == code, result.stderr
    assert says in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert files() == set()


@pytest.mark.parametrize("save", [save_export, save_onnx])
def test_inspect_and_verify_read_what_was_compiled(save: Callable[[], str]) -> None:
    model = save()
    report_of(model, *OUT)
    before = CliRunner().invoke(group, ["inspect", model])
    assert before.exit_code == 0, before.stderr
    shown = CliRunner().invoke(group, ["inspect", "out.onnx"])
    assert shown.exit_code == 0 and "3 frames" in shown.stdout
    checked = CliRunner().invoke(group, ["verify", "out.onnx", "--against", model, "--json"])
    assert checked.exit_code == 0, checked.stderr
    assert json.loads(checked.stdout)["passed"]


def test_brackets_in_names_are_shown() -> None:
    model = save_export("clip[1].pt2")
    text = call(model, "-o", "out[red].onnx").stdout
    assert "clip[1].pt2" in text and "out[red].onnx" in text
    assert "out[red].onnx" in CliRunner().invoke(group, ["inspect", "out[red].onnx"]).stdout


def test_verify_sees_other_weights() -> None:
    report_of(save_export(), *OUT)
    result = CliRunner().invoke(group, ["verify", "out.onnx", "--against", f"{FACTORY}:tiny", *SHAPE])
    assert result.exit_code == 3
    assert "FAILED" in result.stdout
    assert "Without --weights a factory mostly draws new ones" in result.stderr


def test_doctor() -> None:
    result = CliRunner().invoke(group, ["doctor", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["self_test"]["passed"]
    assert "CPUExecutionProvider" in report["providers"]


def test_doctor_knows_every_extra() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    told = {install.rpartition("[")[2].removesuffix("]") for _, _, install in FEATURES if "[" in install}
    assert told == set(extras) - {"demo", "docs", "test", "dev"}


def test_doctor_says_what_is_missing_and_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "FEATURES", (*FEATURES, ("fly", ("no_such_package",), "co3d-compile[wings]")))
    monkeypatch.setattr("co3d_compile.StreamSession", lambda *_: 1 / 0)
    result = CliRunner().invoke(group, ["doctor"])
    assert result.exit_code == 3
    assert f"# fly\n{install_command('co3d-compile[wings]')}\n" in result.stdout
    told = result.stdout.split("To get what is missing\n")[1].splitlines()
    assert all(line.startswith(("# ", "pip install ")) for line in told if line.strip()), "not to be copied as it is"
    assert "FAILED, ZeroDivisionError" in result.stdout
    assert result.stderr == "error: The self-test failed: ZeroDivisionError: division by zero.\n"


def test_weights_over_two_gigabytes_go_into_a_second_file(monkeypatch: pytest.MonkeyPatch) -> None:
    report_of(save_export(), "-o", "one.onnx")
    monkeypatch.setattr("co3d_compile.compiler.compiled_model.LARGE", 0)
    report_of(save_export(), *OUT)
    assert files() >= {"out.onnx", "out.onnx.data"} and not [name for name in files() if name.startswith(".")]
    frames = np.random.default_rng(0).standard_normal((6, 1, 3, 8, 8), dtype=np.float32)
    with StreamSession("one.onnx") as one, StreamSession("out.onnx") as two:
        for frame in frames:
            np.testing.assert_array_equal(one.step(frame), two.step(frame))
