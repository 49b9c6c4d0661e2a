"""The commands as a user calls them: exit codes, what stands on stdout and stderr, what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from model_files import FACTORY, cut, files, save_export, save_labels, save_pickle, save_script, tiny, use_folder, write

import co3d_compile as co3d
from co3d_compile.cli.common import Stopped, explain
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.errors import OutputError, UnsupportedError

SHAPE = ["--shape", "1x3x4x8x8"]
OUT = ["-o", "out.onnx"]
VERIFIED = {
    "passed": True, "max_error": 1e-6, "relative_error": 1e-6, "tolerance": 1e-4, "worst": "y[0]", "steps": 9,
    "reason": "It is larger than the file says.",
    "compared_with": "the untouched network", "replaced_distance": None,
}  # fmt: skip
REPORT = {
    "model": "Sequential",
    "operators": 2,
    "inputs": [{"name": "x", "shape": ["N", 3, 8, 8], "dtype": "float32", "frames_per_step": 1}],
    "outputs": [{"name": "y", "shape": ["N", 4, 8, 8], "has_time": True, "delay": 1, "entries_per_step": 1}],
    "receptive_field": 3,
    "warmup_steps": 2,
    "frames_per_step": {"x": 1},
    "window": None,
    "state_count": 1,
    "state_bytes": 1536,
    "taken_for_time": "",
    "gmac_clip": 8.3e-5,
    "gmac_step": 2.1e-5,
    "gmac_frame": 2.1e-5,
    "gmac_ratio": 4.0,
    "actions": [{"operator": "aten.conv3d", "count": 1, "action": "continual"}],
    "delays": [{"operator": "aten.conv3d", "module_path": "body", "frames": 1}],
    "recomputed": [{"operator": "aten.flip", "module_path": "head", "reason": "no extension", "bytes": 100}],
    "gates": [{"module_path": "se", "scope": "frame"}],
    "warnings": ["the window is shorter than the receptive field"],
    "seconds": {"capture": 0.1, "export": 0.2},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


class FakeCore:
    """Stands in for the compiler, where a test is about the command and not about what is compiled."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.save_error: BaseException | None = None
        self.passed = True
        self.calls: list[dict[str, Any]] = []

    def compile(self, program: object, inputs: tuple[Any, ...], *, progress: Any, **options: Any) -> Any:
        self.calls.append(options)
        progress("capture", 0, 1)
        print("a library prints")
        if self.error:
            raise self.error
        return SimpleNamespace(save=self.save, report=lambda: SimpleNamespace(to_dict=lambda: dict(REPORT)))

    def save(self, path: Path) -> None:
        path.write_bytes(b"onnx")
        Path(f"{path}.data").write_bytes(b"weights")
        if self.save_error:
            raise self.save_error

    def verify(self, path: Path, program: object, inputs: object, *, progress: Any) -> Any:
        assert path.read_bytes() == b"onnx"
        assert path.parent.name.startswith(".")
        progress("steps", 1, 9)
        return SimpleNamespace(to_dict=lambda: {**VERIFIED, "passed": self.passed})


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    fake = FakeCore()
    monkeypatch.setattr(co3d, "compile", fake.compile, raising=False)
    monkeypatch.setitem(sys.modules, "co3d_compile.verification.verify_model", SimpleNamespace(verify=fake.verify))  # type: ignore[arg-type]
    return fake


def call(*args: str) -> Result:
    return CliRunner().invoke(compile_command, list(args))


def one_line(result: Result) -> str:
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr


def test_a_person_reads_a_table(core: FakeCore) -> None:
    result = call(f"{FACTORY}:tiny", *OUT, *SHAPE)
    assert (result.exit_code, result.stderr) == (0, "")
    for words in (
        "Receptive field",
        "3 frames",
        "4.0 times fewer",
        "1.54 kB",
        "aten.conv3d",
        "continual",
        "passed",
        "compared with the untouched network",
        "aten.flip",
        "no extension",
        "delay 1",
        "shorter than the receptive field",
        "out.onnx, 11 B",
    ):
        assert words in " ".join(result.stdout.split())
    assert files() == {"out.onnx", "out.onnx.data"}  # fmt: skip


def test_prints_are_shown_on_stderr_when_asked_for(core: FakeCore) -> None:
    result = call(save_export(), *OUT, "-v", "--json")
    assert "a library prints\n" in result.stderr
    json.loads(result.stdout)


def test_a_machine_reads_json(core: FakeCore) -> None:
    result = call(f"{FACTORY}:tiny", *OUT, *SHAPE, "--kwargs", '{"training": true}', "--json")
    report = json.loads(result.stdout)
    assert {name: report[name] for name in REPORT if name != "seconds"} == {
        name: value for name, value in REPORT.items() if name != "seconds"
    }
    assert report["verification"] == VERIFIED
    assert (report["output"], report["file_bytes"]) == ("out.onnx", 11)
    assert report["source"]["kind"] == f"factory {FACTORY}:tiny"
    assert "training mode" in report["source"]["notes"][0]
    assert set(report["seconds"]) == {"capture", "export", "load", "write", "verify"}


def test_no_verify(core: FakeCore) -> None:
    result = call(save_export(), *OUT, "--no-verify", "--json")
    assert json.loads(result.stdout)["verification"] is None
    assert "out.onnx" in files()


def test_options_reach_the_compiler(core: FakeCore) -> None:
    options = ["--window", "8", "--frames-per-step", "2", "--pool-scope", "window", "--stride-mode", "dense"]
    more = ["--boundary", "exact", "--unsupported", "error", "--state-io", "renamed", "--time-dim", "1", "--tune"]
    more += ["--dump", "d", "--recurrence", "window", "--max-delay", "3", "--delay-by", "shift", "--also", "a.b"]
    more += ["--box-frame", "newest"]
    assert call(save_export(), *OUT, *options, *more).exit_code == 0
    assert core.calls[0] == {
        "window": 8, "frames_per_step": 2, "pool_scope": "window", "stride_mode": "dense", "boundary": "exact",
        "unsupported": "error", "state_io": "renamed", "time_dim": 1, "dump": Path("d"), "tune": True,
        "recurrence": "window", "max_delay": 3, "delay_by": "shift", "also": ("a.b",), "box_frame": "newest",
    }  # fmt: skip
    call(save_export(), *OUT, "--time-dim", "2", "--time-dim", "none")
    assert core.calls[1]["time_dim"] == [2, None]


@pytest.mark.parametrize("keep", [False, True])
def test_verification_fails(core: FakeCore, keep: bool) -> None:
    core.passed = False
    result = call(save_export(), *OUT, *["--keep"] * keep)
    assert result.exit_code == 3
    assert "FAILED" in result.stdout
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: The compiled model differs from m.bin: It is larger than the file says."), error
    assert ("out.onnx" in files()) is keep


def test_an_old_output_stays_when_the_new_one_fails(core: FakeCore) -> None:
    write(b"old", "out.onnx")
    core.passed = False
    assert call(save_export(), *OUT).exit_code == 3
    assert Path("out.onnx").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UnsupportedError("no meaning", operator="aten.flip", module_path="head"), 5, "[aten.flip in head]"),
        (ValueError("two\nlines"), 1, "internal: ValueError: two lines"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_the_compiler_fails(core: FakeCore, error: BaseException, code: int, says: str) -> None:
    core.error = error
    result = call(save_export(), *OUT)
    assert result.exit_code == code
    assert says in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert files() == {"m.bin"}


def test_a_traceback_only_when_asked_for(core: FakeCore) -> None:
    core.error = ValueError("why")
    assert "Traceback" in call(save_export(), *OUT, "-v", "-v").stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "No space left on device"), 6), (OutputError("cannot"), 6), (KeyError("bug"), 1)],
)
def test_writing_fails(core: FakeCore, error: BaseException, code: int) -> None:
    core.save_error = error
    assert call(save_export(), *OUT).exit_code == code
    assert files() == {"m.bin"}


def factory(name: str) -> Callable[[], str]:
    return lambda: f"{FACTORY}:{name}"


def in_the_way() -> str:
    Path("out.onnx").mkdir()
    return save_export()


def a_socket() -> str:
    os.mkfifo("out.onnx")
    return save_export()


# Name, model, more arguments, exit code, what the line says. None of them reaches the compiler.
BAD: list[tuple[str, Callable[[], str], list[str], int, str]] = [
    ("no model", lambda: write(b"hello"), [], 4, "no model"),
    ("no such file", lambda: "nothing.pt2", [], 4, "no file nothing.pt2"),
    ("truncated archive", lambda: cut(save_export()), [], 4, "truncated"),
    ("state dict", lambda: save_pickle(content=tiny().state_dict()), [], 4, "package.module:factory --weights"),
    ("pickle", save_pickle, [], 4, "--trust-pickle"),
    ("refused clip", factory("tiny"), ["--shape", "1x4x4x8x8"], 4, "expected input[1, 4, 4, 8, 8] to have 3 channels"),
    ("short clip", factory("Short"), SHAPE, 4, "smaller than kernel size"),
    ("half precision", factory("tiny"), [*SHAPE, "--kwargs", '{"dtype": "float16"}'], 4, "model.float()"),
    ("other device", factory("tiny"), [*SHAPE, "--kwargs", '{"device": "meta"}'], 4, "on device meta"),
    ("factory raises", factory("fails"), SHAPE, 4, "no such checkpoint"),
    ("factory prints a number", factory("number"), SHAPE, 4, "not a torch.nn.Module"),
    ("no shape", save_script, [], 2, "--shape"),
    ("bad shape", factory("tiny"), ["--shape", "1x3xTx8x8"], 2, "no shape such as"),
    ("huge shape", factory("tiny"), ["--shape", "1x3x999999x9999x9999"], 2, "4 GiB"),
    ("bad kwargs", factory("tiny"), [*SHAPE, "--kwargs", "{width: 3}"], 2, "not JSON"),
    ("kwargs of another kind", factory("tiny"), [*SHAPE, "--kwargs", "[3]"], 2, "a JSON object"),
    ("bad time dim", save_export, ["--time-dim", "two"], 2, "neither a dim"),
    ("bad window", save_export, ["--window", "0"], 2, "--window"),
    ("bad choice", save_export, ["--pool-scope", "frames"], 2, "--pool-scope"),
    ("an argument too many", save_export, ["more"], 2, "(more). Try"),
    ("no such option", save_export, ["--fast"], 2, "--fast"),
    ("output directory missing", save_export, ["-o", "a/b/out.onnx"], 6, "no directory"),
    ("output is standard output", save_export, ["-o", "-"], 2, "not standard output"),
    ("output is a directory", in_the_way, [], 6, "is a directory"),
    ("output is no file", a_socket, [], 6, "not an ordinary file"),
    ("output is the model", save_export, ["-o", "m.bin"], 2, "the model itself"),
    ("report is the model", save_export, ["--report", "m.bin"], 2, "the model itself"),
    ("report is the output", save_export, ["--report", "out.onnx"], 2, "same name"),
    ("report is the labels", save_labels, ["--labels", "l.txt", "--report", "l.txt"], 2, "the labels itself"),
    ("two shapes, one input", save_script, ["--shape", "1x3x4x8x8", *SHAPE], 4, "takes (input), not 2 clip"),
    ("dump is a file", save_export, ["--dump", "m.bin"], 2, "--dump"),
    ("dump cannot be made", save_export, ["--dump", "m.bin/d"], 6, "--dump"),
]


@pytest.mark.parametrize(("make", "more", "code", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(core: FakeCore, make: Callable[[], str], more: list[str], code: int, says: str) -> None:
    model = make()
    before = files()
    result = call(model, *OUT, *more)
    assert says in one_line(result)
    assert result.exit_code == code
    assert files() == before
    assert core.calls == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_refuses(core: FakeCore) -> None:
    Path("d").mkdir(mode=0o500)
    assert call(save_export(), "-o", "d/out.onnx").exit_code == 6


def test_a_signal_that_falls_into_code_in_c() -> None:
    """Python then raises SystemError, with what the handler raised as its cause."""
    error = SystemError("<method> returned a result with an exception set")
    error.__cause__ = Stopped(signal.SIGINT)
    assert explain(error) == ("stopped by SIGINT; nothing was written", 130)


def test_a_read_only_file_system(core: FakeCore) -> None:
    result = call(save_export(), "-o", "/proc/out.onnx")
    assert result.exit_code == 6
    one_line(result)


def test_an_output_that_is_a_link(core: FakeCore) -> None:
    Path("there").mkdir()
    os.symlink("there/real.onnx", "out.onnx")
    assert call(save_export(), *OUT).exit_code == 0
    assert Path("out.onnx").is_symlink()
    assert set(os.listdir("there")) == {"real.onnx", "real.onnx.data"}


@pytest.mark.parametrize("args", [["--help"], ["--version"]])
def test_help_does_not_wait_for_torch(args: list[str]) -> None:
    code = (
        "import sys; from co3d_compile.cli.compile import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert "co3d-compile" in result.stdout


def test_help_teaches() -> None:
    text = call("--help").stdout
    for words in ("Examples:", "Exit codes:", "--trust-pickle", "How time is treated:", "--window N"):
        assert words in text


def test_threads_of_torch_are_left_alone(core: FakeCore) -> None:
    before = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    call(save_export(), *OUT)
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == before
