"""The commands of the group ``co3d``, around a compiled model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from model_files import save_export, use_folder, write

from co3d_compile.cli import main as group_module
from co3d_compile.cli.main import main as group
from co3d_compile.support.install_hint import install_command

VERIFIED = {
    "passed": True, "max_error": 1e-6, "relative_error": 1e-6, "tolerance": 1e-4, "worst": "y[0]", "steps": 9,
    "reason": "It is larger than the file says.", "notes": [], "errors": [], "streamed": 20, "nan_states": 0,
    "compared_with": "the untouched network", "replaced_distance": None,
    "finite_from": 0, "warmup_steps": 11, "memory": None, "bisection": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


def one_line(result: Result) -> str:
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_group_lists_every_command() -> None:
    text = CliRunner().invoke(group, []).stdout
    assert all(name in text for name in group_module.NAMES) and "..." not in text.partition("Commands:")[2]


@pytest.mark.parametrize("command", group_module.NAMES)
def test_every_option_says_what_it_takes(command: str) -> None:
    text = CliRunner().invoke(group, [command, "--help"]).stdout
    assert "--help" in text and not any(word in text for word in ("RANGE", "INTEGER", "FLOAT", " TEXT "))


def test_group_knows_no_other_command() -> None:
    result = CliRunner().invoke(group, ["compres"])
    assert result.exit_code == 2
    assert one_line(result)


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda: "nothing.onnx", 4, "no file"),
        (lambda: write(b"hello"), 4, "no ONNX model"),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["verify", "--against", "m.pt2"]])
def test_bad_compiled_models(command: list[str], make: Callable[[], str], code: int, says: str) -> None:
    result = CliRunner().invoke(group, [*command, make()])
    assert result.exit_code == code
    assert says in one_line(result)


def test_a_file_of_another_exporter_is_no_compiled_model() -> None:
    result = CliRunner().invoke(group, ["verify", "--against", "m.pt2", plain_onnx()])
    assert result.exit_code == 4
    assert "not written by co3d-compile" in one_line(result)


def plain_onnx(metadata: dict[str, str] | None = None) -> str:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 8, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, "plain.onnx")
    return "plain.onnx"


def stateless() -> str:
    """A compiled model with no state, written by hand."""
    from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec

    contract = Contract(
        compiler_version="1",
        inputs=(InputSpec("x", ("N", 3, 8, 8), "float32", 1, 2),),
        outputs=(OutputSpec("y", ("N", 3, 8, 8), "float32", 0, True, 2, 1),),
        states=(),
        frames_per_step={"x": 1},
        receptive_field=1,
        warmup_steps=0,
    )
    return plain_onnx({"co3d": contract.to_json()})


def test_verify_wants_the_compiled_file_first() -> None:
    result = CliRunner().invoke(group, ["verify", "--against", "m.pt2", save_export("m.pt2")])
    assert result.exit_code == 4 and "compile it with co3d-compile first" in one_line(result)


def test_inspect() -> None:
    path = stateless()
    text = CliRunner().invoke(group, ["inspect", path]).stdout
    assert "x (N, 3, 8, 8) float32, 1 frame per step" in text
    report = json.loads(CliRunner().invoke(group, ["inspect", path, "--json"]).stdout)
    assert report["inputs"][0]["name"] == "x"


def without_torch(words: list[str]) -> subprocess.CompletedProcess[str]:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
from co3d_compile.cli.main import main
main({words!r})
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["inspect"], ["bench", "--rounds", "1", "--seconds", "0.01"]], ids=lambda w: w[0])
def test_compiled_files_need_no_torch(words: list[str]) -> None:
    result = without_torch([*words, stateless()])
    assert (result.returncode, result.stderr.removesuffix("time step\n")) == (0, "")


@pytest.mark.parametrize("words", [["bench", "m.pt2"], ["inspect", "m.pt2"]], ids=lambda w: w[0])
def test_a_missing_package_is_named_with_what_brings_it(words: list[str]) -> None:
    save_export("m.pt2")
    result = without_torch(words)
    how = install_command("co3d-compile[compile]")
    said = f"error: This needs torch, which is not installed. {how}\n"
    assert (result.returncode, result.stderr) in (
        (1, said),
        (1, said.replace("This needs", "co3d_compile.compile needs")),
    )


@pytest.mark.parametrize("options", [["--window", "4"], ["--shape", "1x3x4x8x8"], ["--stride-mode", "dense"]])
@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_a_compiled_file_takes_no_options_of_compiling(command: str, options: list[str]) -> None:
    """They would do nothing, and what is shown would be taken for what they ask for."""
    if command == "bench" and options[0] == "--window":
        options = ["--sides", "clip"]
    result = CliRunner().invoke(group, [command, stateless(), *options])
    assert result.exit_code == 2
    assert options[0] in one_line(result) and "was compiled from" in result.stderr


def test_stopped_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(group_module.importlib, "import_module", interrupted)
    result = CliRunner().invoke(group, ["doctor"])
    assert (result.exit_code, result.stderr.strip()) == (130, "stopped by SIGINT; nothing was written")


@pytest.mark.parametrize("passed", [True, False])
def test_verify(monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    result = SimpleNamespace(to_dict=lambda: {**VERIFIED, "passed": passed})
    fake = SimpleNamespace(verify=lambda *_, **__: result)
    monkeypatch.setitem(sys.modules, "co3d_compile.verification.verify_model", fake)  # type: ignore[arg-type]
    answer = CliRunner().invoke(group, ["verify", stateless(), "--against", save_export()])
    assert answer.exit_code == (0 if passed else 3)
    assert ("passed" if passed else "FAILED over 9 steps: It is larger than the file says.") in answer.stdout
    assert passed or "It is larger than the file says." in answer.stderr
