"""A profile of a run, and the shares of time that inspect makes of it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.cli.main import main as group
from co3d_compile.errors import Co3dError, LoadError, OutputError, UsageError
from co3d_compile.report import profile_times as kernel_times
from co3d_compile.report.profile_times import read_times, with_shares
from co3d_compile.runtime import step_profile as profiling


class Block(nn.Module):
    """Two convolutions and a gate around which a residual goes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(16, 16, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Conv3d(16, 16, 1), nn.Sigmoid())
        self.last = nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return torch.relu(x + self.last(y * self.gate(y)))


NETWORK = nn.Sequential(
    nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), Block(), Block(),
    nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 4),
).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model, ``m.onnx``, another, ``other.onnx``, and the profile of eight steps of the first."""
    folder = tmp_path_factory.mktemp("profile")
    co3d.compile(NETWORK, (torch.zeros(1, 3, 8, 32, 32),)).save(folder / "m.onnx")
    co3d.compile(nn.Sequential(nn.Identity(), nn.Conv3d(3, 2, 3)), (torch.zeros(1, 3, 8, 32, 32),)).save(
        folder / "other.onnx"
    )
    with co3d.StreamSession(folder / "m.onnx", threads=1, profile=folder / "p.json") as session:
        for _ in range(8):
            session.step(np.zeros((1, 3, 32, 32), np.float32))
        assert not (folder / "p.json").exists()
    assert sorted(os.listdir(folder)) == ["m.onnx", "other.onnx", "p.json"]
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def inspect(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(group, ["inspect", *args])
    assert result.exit_code == code, result.output
    return result


def test_every_module_that_computes_has_its_share_and_nothing_is_dropped() -> None:
    data = json.loads(inspect("m.onnx", "--profile", "p.json", "--json", "-v").stdout)
    rows, time = data["report"]["table"], data["time"]
    assert sum(row["time_share"] for row in rows) + sum(time["elsewhere"].values()) == pytest.approx(1)
    assert {row["module_path"] for row in rows if row["macs_step"]} <= {
        row["module_path"] for row in rows if row["time_share"]
    }
    assert sum(each["time_share"] for each in time["operators"]) == pytest.approx(
        sum(row["time_share"] for row in rows)
    )
    assert time["milliseconds_step"] > 0
    assert sum(each["milliseconds_step"] for each in time["kernels"]) == pytest.approx(time["milliseconds_step"])
    assert {each["operator"]: each["count"] for each in time["kernels"]}["GlobalAveragePool"] == 3


def test_all_of_the_time_is_there() -> None:
    """By hand: what the kernels of all steps but the first took."""
    events = json.loads(Path("p.json").read_text())
    first = min(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    times = read_times(Path("p.json"), Path("m.onnx"))
    assert times.steps == 7
    assert times.total == sum(e["dur"] for e in kernels if e["ts"] >= first) < sum(e["dur"] for e in kernels)


def test_the_tree_and_the_page_say_it() -> None:
    text = inspect("m.onnx", "--profile", "p.json").stdout
    inspect("m.onnx", "--profile", "p.json", "--html", "page.html")
    assert "and what takes time" in text and "ms per step" in text
    assert any("conv3d  continual" in line and "%" in line for line in text.splitlines())
    assert "ONNX Runtime's kernels, one step" in text
    page = Path("page.html").read_text()
    assert "share of the time" in page and "time, %" in page
    assert "share of the time" not in co3d.compile(NETWORK, (torch.zeros(1, 3, 8, 32, 32),)).to_html()
    assert "%" not in inspect("m.onnx").stdout
    os.remove("page.html")


def test_no_torch_is_needed() -> None:
    code = "import sys; sys.modules['torch'] = None; from co3d_compile.cli.main import main; main()"
    command = [sys.executable, "-c", code, "inspect", "m.onnx", "--profile", "p.json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "ms per step" in done.stdout


def chain(*operators: tuple[str, str, str, str]) -> Path:
    """A file of nodes: operator, name, input, output; a second convolution input is a weight."""
    nodes = [
        helper.make_node(op, [*inputs.split(), *(["w"] if op == "Conv" else [])], [output], name=name)
        for op, name, inputs, output in operators
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", operators[-1][3])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:])), "chain.onnx")
    return Path("chain.onnx")


def test_what_the_runtime_has_put_into_a_file_is_of_no_module() -> None:
    """``to_native`` saves the graph as the runtime lays it out."""
    path = chain(*RESIDUAL)
    model = onnx.load(path)
    computes_a_state, fused = "next.state.a.conv.0.plain_nchwc", "a.act/Mul/QuickGeluFusion/"
    blocked = ("ReorderInput_token_3", "ReorderInput"), (computes_a_state, "Conv"), (fused, "QuickGelu")
    for name, operator in blocked:
        domain = "com.microsoft" if operator == "QuickGelu" else "com.microsoft.nchwc"
        model.graph.node.add(op_type=operator, name=name, domain=domain, input=["x"], output=[f"{name}.out"])
    onnx.save(model, path)
    kernels = ("a.side/Conv.out_nchwc", "Conv", 3), (*blocked[0], 4), (*blocked[1], 5), (*blocked[2], 6)
    times = read_times(profile(*kernels), path)
    assert times.by_path == Counter({"a.side": 3, "a.conv": 5, "a.act": 6})
    assert times.unmatched == Counter({"ReorderInput": 4})
    assert times.by_operator == Counter({"Conv": 8, "ReorderInput": 4, "QuickGelu": 6})


def profile(*kernels: tuple[str, str, int]) -> Path:
    """A profile of one step, of names, operators and microseconds."""
    events: list[dict[str, Any]] = [
        {"cat": "Node", "name": f"{name}_kernel_time", "ts": 1, "dur": dur, "args": {"op_name": operator}}
        for name, operator, dur in kernels
    ]
    events += [{"cat": "Node", "name": f"{kernels[0][0]}_fence_before", "ts": 0, "dur": 0, "args": {"op_name": "x"}}]
    Path("hand.json").write_text(json.dumps([*events, {"cat": "Session", "name": "model_run", "ts": 0, "dur": 9}]))
    return Path("hand.json")


RESIDUAL = (
    ("Conv", "a.conv/Conv", "x", "a.conv/Conv.out"),
    ("Conv", "a.side/Conv", "x", "a.side/Conv.out"),
    ("Add", "a/Add", "a.conv/Conv.out a.side/Conv.out", "a/Add.out"),
    ("Relu", "a.act/Relu", "a/Add.out", "next.state.b.0"),
    ("Identity", "next.state.c.d.12/Identity", "x", "next.state.c.d.12"),
    ("Mul", "Mul", "next.state.b.0 next.state.c.d.12", "y"),
)


@pytest.mark.parametrize("own, fused", [("a.side", "a.conv"), ("a.conv", "a.side")])
def test_fused_kernels_stand_at_the_operator_that_does_the_work(own: str, fused: str) -> None:
    """The runtime fuses a sum and an activation into one of the convolutions, and names it after the last result."""
    kernels = profile(
        (f"{own}/Conv.out_nchwc", "Conv", 3),
        ("next.state.b.0_nchwc", "Conv", 5),
        ("next.state.c.d.12/Identity", "Identity", 7),
        ("Mul/QuickGeluFusion/", "QuickGelu", 11),
        ("ReorderInput_token_3", "ReorderInput", 13),
        ("ReorderInput_token_4", "ReorderInput", 4),
    )
    times = read_times(kernels, chain(*RESIDUAL))
    assert times.by_path == Counter({own: 3, fused: 5, "c.d": 7, "": 11})
    assert times.unmatched == Counter({"ReorderInput": 17})
    rows = [
        {"kind": "stream", "module_path": path, "operator": operator}
        for path, operator in (("a", "aten.add"), ("a.conv", "aten.relu"), ("a.conv", "aten.conv3d"))
    ]
    shared, rest = with_shares(rows, times)
    assert [row["time_share"] for row in shared] == [0, 0, times.by_path["a.conv"] / 43]
    assert list(rest) == ["ReorderInput", "the model", "c.d", "a.side"]
    assert sum(rest.values()) + shared[2]["time_share"] == pytest.approx(1)


BAD: dict[str, tuple[str, str, str, type[Co3dError], str]] = {
    "no file": ("m.onnx", "none.json", "", LoadError, "Cannot read the profile"),
    "text": ("m.onnx", "bad.json", "hello", LoadError, "no profile of ONNX Runtime"),
    "cut off": ("m.onnx", "bad.json", "half", LoadError, "or not a whole one"),
    "another JSON": ("m.onnx", "bad.json", '{"a": 1}', LoadError, "no profile"),
    "deep": ("m.onnx", "bad.json", "[" * 100_000, LoadError, "no profile"),
    "no kernels": ("m.onnx", "bad.json", "[]", LoadError, "no times of operators"),
    "another model": ("other.onnx", "p.json", "", UsageError, "profile of another model"),
}


@pytest.mark.parametrize("model, path, text, error, message", BAD.values(), ids=BAD)
def test_profiles_that_are_none(model: str, path: str, text: str, error: type[Co3dError], message: str) -> None:
    if text:
        Path(path).write_text(Path("p.json").read_text()[:-5] if text == "half" else text)
    with pytest.raises(error, match=message):
        read_times(Path(path), Path(model))
    result = inspect(model, "--profile", path, code=error.exit_code)
    assert result.stderr.count("\n") == 1 and "co3d run --profile" in result.stderr


def test_only_a_compiled_file_has_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--profile is of a compiled file" in inspect("a.b:c", "--profile", "p.json", code=2).stderr
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Co3dError, match=r"needs the package onnx\. Install it with pip install onnx"):
        read_times(Path("p.json"), Path("m.onnx"))


def test_a_long_run_has_a_profile_of_its_first_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiling, "STEPS", 4)
    path = tmp_path / "p.json"
    session = co3d.StreamSession("m.onnx", threads=1, profile=path)
    for step in range(6):
        assert path.exists() == (step >= 4)
        session.step(np.zeros((1, 3, 32, 32), np.float32))
    before = path.read_bytes()
    session.close()
    assert path.read_bytes() == before
    assert read_times(path, Path("m.onnx")).steps == 3
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_session_that_is_not_closed_leaves_nothing(tmp_path: Path) -> None:
    session = co3d.StreamSession("m.onnx", profile=tmp_path / "p.json")
    session.step(np.zeros((1, 3, 32, 32), np.float32))
    del session
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_profiles_that_cannot_be_written(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "p.json", "cannot be written")):
        with pytest.raises(OutputError, match=message):
            co3d.StreamSession("m.onnx", profile=path)
    session = co3d.StreamSession("m.onnx", profile=tmp_path / "p.json")
    (tmp_path / "p.json").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        session.close()
    assert os.listdir(tmp_path) == ["p.json"]


def test_kinds_of_heavy_operators_are_told_apart() -> None:
    kinds = [next((kind for kind in kernel_times.HEAVY if kind in name), None) for name in ("FusedConv", "FusedMatMul")]
    assert kinds == ["Conv", "MatMul"]
