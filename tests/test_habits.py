"""What people expect of a Python package: it logs, warns, has types, works optimised, leaves the process alone."""

from __future__ import annotations

import importlib.resources
import logging
import os
import pickle
import random
import subprocess
import sys
import threading
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import co3d_compile as co3d

ROOT = Path(__file__).parents[1]
CLIP = torch.zeros(1, 3, 8, 16, 16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    ).eval()


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_done_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="co3d_compile"):
        co3d.compile(network(), (CLIP,))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("co3d_compile")]
    assert lines[0].startswith("captured Sequential, ") and lines[-1].startswith("exported ")
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"pass {p.name}" for p in co3d.default_passes()]
    caplog.clear()
    co3d.compile(network(), (CLIP,))
    said = [record for record in caplog.records if record.name.startswith("co3d_compile")]
    assert not said, "nothing is said unless asked for"


QUIET = """
import sys, torch, warnings, co3d_compile as co3d
from torch import nn
from chunk_nets import CHUNKED, Chunked
from local_networks import CLIP, LOCAL, Global, network
from loop_nets import CASES
from loop_network import Network

class Branch(nn.Module):
    def __init__(self, decides):
        super().__init__()
        self.conv, self.decides = nn.Conv3d(3, 4, 3, padding=1), decides

    def forward(self, x):
        y = self.conv(x)
        value = y.mean() if self.decides else torch.arange(x.shape[2]).sum()
        return (y * 2 if value > 0 else y).mean((2, 3, 4))

for model in (Branch(True), Branch(False), nn.Sequential(nn.Conv3d(4, 4, 3))):
    try:
        co3d.compile(model.eval(), (torch.zeros(1, 3, 8, 16, 16),))
        print("compiled")
    except co3d.CaptureError as error:
        print(error)
try:
    co3d.compile(nn.Linear(8, 8), torch.zeros(1, 4, 8), time_dim=2, window=16)
except co3d.UnsupportedError as error:
    print(error)
warnings.simplefilter("ignore", co3d.Co3dWarning)  # that nothing is gained
for part in (LOCAL["band"][0](), Global("sort"), Global("learned positions")):
    co3d.compile(network(part), CLIP)
co3d.compile(Network(CASES["gru_cell"].forward).eval(), torch.zeros(CASES["gru_cell"].shape), time_dim=1)
co3d.compile(Chunked(CHUNKED["doubled"][0]).eval(), torch.zeros(1, 4, 13))
"""


@pytest.mark.slow
def test_attempts_that_fail_are_not_printed() -> None:
    """PyTorch prints a graph, or a traceback, at each: of a capture, of a longer clip, of a region, of a loop."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{QUIET}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
    first, second, third, *_ = done.stdout.splitlines()
    assert first.startswith("Branch chooses in Python by the values of a tensor") and second == "compiled"
    assert third.startswith("Sequential cannot be captured")
    assert "does not accept a window of 16 frames" in done.stdout


def test_what_a_user_should_know_is_a_warning_of_a_kind_of_its_own() -> None:
    assert issubclass(co3d.Co3dWarning, UserWarning)
    with pytest.warns(co3d.Co3dWarning, match="no temporal operator") as caught:
        co3d.compile(nn.Conv3d(3, 4, (1, 3, 3)), (CLIP,))
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        co3d.compile(network(), (CLIP,))
        co3d.compile(nn.LSTM(4, 5, batch_first=True), (torch.zeros(1, 8, 4),), time_dim=1)  # PyTorch has one of its own


class Texts(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class Named(nn.Module):
    """Parts and constants with names that PyTorch's graph modules have for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.graph_, self.code = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 1), nn.Linear(2, 2)
        self.register_buffer("meta", torch.full((2, 1), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self.graph_(self.graph(x)).transpose(1, 2)).transpose(1, 2) * self.meta


@pytest.mark.parametrize("exported", [False, True])
def test_parts_may_have_the_names_of_a_graph_module(exported: bool) -> None:
    torch.manual_seed(0)
    model, clip = Named().eval(), (torch.randn(1, 2, 8),)
    compiled = co3d.compile(torch.export.export(model, clip) if exported else model, clip)
    assert co3d.verify(compiled, model, clip).passed


def test_a_notebook_shows_a_summary() -> None:
    compiled = co3d.compile(network(), (CLIP,))
    shown = Texts(compiled._repr_html_())
    assert shown.open == []
    fold = shown.texts.index("what was done")
    table = dict(zip(shown.texts[:fold:2], shown.texts[1:fold:2], strict=True))
    assert table["model"].startswith("Sequential, ") and table["receptive field"] == "10 frames"
    assert table["input"].endswith(", 1 frame per step") and table["output"].endswith("newest window, delay 1")
    assert (
        table["warm-up"].startswith(f"{compiled.info.warmup_steps} steps ")
        and table["recomputed on a window"] == "nothing"
    )
    assert table["state"].endswith("B per stream") and " 0 " not in table["multiply-adds"]
    assert "continual" in shown.texts[fold + 1 :]
    assert repr(compiled).startswith("<CompiledModel Sequential, ")


def surroundings(model: nn.Module) -> dict[str, Any]:
    """What a library could change behind its user's back."""
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "nnpack": torch._C._get_nnpack_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "chance": (torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "streams": (sys.stdout, sys.stderr),
        "threads running": {t.name for t in threading.enumerate()},
        "training": [m.training for m in model.modules()],
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
    }


def test_the_process_and_the_model_are_left_as_they_were(tmp_path: Path) -> None:
    from co3d_compile.verification.verify_model import verify

    model = network().train()
    co3d.compile(model, (CLIP,))  # the first call imports
    before = surroundings(model)
    compiled = co3d.compile(model, (CLIP,), boundary="exact")
    compiled.save(tmp_path / "m.onnx")
    assert verify(tmp_path / "m.onnx", model, (CLIP,)).passed
    with co3d.StreamSession(compiled) as session:
        session.step(np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(co3d.Co3dError):
        co3d.compile(model, (CLIP[:, :, :, :2, :2],), window=-1)
    after = surroundings(model)
    for name, value in before.items():
        if name == "weights":
            assert all(torch.equal(value[key], after[name][key]) for key in value)
        else:
            assert after[name] == value, name


MISTAKES: dict[str, tuple[Any, ...]] = {
    "a number": (3, (CLIP,), {}, "A int is no model"),
    "no clip": (nn.Conv3d(3, 4, 3), None, {}, "example_inputs is needed"),
    "a dim as text": (nn.Conv3d(3, 4, 3), (CLIP,), {"time_dim": "2"}, "nor a list of them. Give the dim that counts"),
    "a dim with a fraction": (nn.Conv3d(3, 4, 3), (CLIP,), {"time_dim": 2.0}, "neither a dim"),
    "a window as text": (nn.Conv3d(3, 4, 3), (CLIP,), {"window": "3"}, "whole number"),
    "a window without end": (nn.Conv3d(3, 4, 3), (CLIP,), {"window": 10**9}, "at most 100000"),
}


@pytest.mark.parametrize(("model", "clip", "options", "says"), MISTAKES.values(), ids=MISTAKES)
def test_arguments_of_a_wrong_kind(model: Any, clip: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(co3d.UsageError, match=says):
        co3d.compile(model, clip, **options)


@pytest.mark.parametrize("shape", [(3, 8, 16, 16), (1, 4, 8, 16, 16)], ids=["no batch", "other channels"])
def test_a_clip_that_is_refused_prints_nothing(shape: tuple[int, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch logs a trace at each attempt."""
    model = nn.Sequential(network(), nn.Linear(4, 2))
    with pytest.raises(co3d.CaptureError):
        co3d.compile(model, (torch.zeros(shape),))
    assert capfd.readouterr() == ("", "")


def test_nothing_is_carried_from_one_model_to_the_next() -> None:
    first = co3d.compile(network(), (CLIP,)).to_bytes()
    co3d.compile(nn.Conv3d(3, 4, (3, 1, 1), 2), (CLIP,), stride_mode="dense", state_io="renamed")
    with pytest.raises(co3d.Co3dError):
        co3d.compile(network(), (CLIP,), time_dim=1)
    assert co3d.compile(network(), (CLIP,)).to_bytes() == first


def test_each_thread_has_a_session_of_its_own() -> None:
    compiled = co3d.compile(network(), (CLIP,))
    frames = np.random.default_rng(0).random((4, 20, 1, 3, 16, 16), dtype=np.float32)
    found: dict[int, list[Any]] = {}

    def work(index: int) -> None:
        with co3d.StreamSession(compiled, threads=1) as session:
            found[index] = [session.step(frame) for frame in frames[index]]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        with co3d.StreamSession(compiled, threads=1) as alone:
            np.testing.assert_array_equal(found[index], [alone.step(frame) for frame in frames[index]])


WITHOUT_ASSERTIONS = """
from importlib.machinery import SourceFileLoader
own = SourceFileLoader.get_code

def get_code(self, name):  # python -O would compile all of PyTorch anew
    if not name.startswith("co3d_compile"):
        return own(self, name)
    return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)

SourceFileLoader.get_code = get_code
"""

OPTIMISED = """
import sys, torch, numpy as np
from torch import nn
import co3d_compile as co3d
from co3d_compile.verification.verify_model import verify
from co3d_compile.ir.node_reading import whole
print(whole(torch.fx.symbolic_trace(nn.Identity()).graph.output_node(), 0))
clip = torch.zeros(1, 3, 8, 16, 16)
trunk = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.MaxPool3d(3, 1, 1))
model = nn.Sequential(trunk, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
compiled = co3d.compile(model, (clip,), state_io="renamed", boundary="exact")
compiled.save(sys.argv[1])
print(verify(sys.argv[1], model, (clip,)).passed)
for bad in ({"window": 0}, {"window": 10**9}, {"time_dim": 7}, {"boundary": "soft"}):
    try:
        co3d.compile(model, (clip,), **bad)
    except co3d.UsageError:
        print(True)
session = co3d.StreamSession(sys.argv[1])
for call in (lambda: session.step(1), lambda: session.restore(b""), lambda: session.set_state({})):
    try:
        call()
    except co3d.SessionError:
        print(True)
"""


@pytest.mark.slow
def test_without_assertions_all_is_the_same(tmp_path: Path) -> None:
    """As in ``python -O``: what a user does wrong is told by errors, and nothing that is done hides in an assertion."""
    code = WITHOUT_ASSERTIONS + OPTIMISED.replace("sys.argv[1]", repr(str(tmp_path / "m.onnx")))
    assert python(code).split() == ["input_1"] + ["True"] * 8  # the first is what an assertion refuses


def test_running_needs_numpy_and_onnxruntime_alone(tmp_path: Path) -> None:
    """And of the package only what runs is imported."""
    co3d.compile(network(), (CLIP,)).save(tmp_path / "m.onnx")
    others = ["torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "safetensors"]  # [compile]
    others += ["click", "rich", "av", "PIL", "jinja2"]  # [video], [report]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others}))
import numpy as np
import co3d_compile as co3d
with co3d.StreamSession({str(tmp_path / "m.onnx")!r}) as session:
    print(session.step(np.zeros((1, 3, 16, 16), np.float32)).shape)
co3d.Predictor, co3d.Preprocess, co3d.read_source, co3d.Contract, co3d.Co3dError
print(sorted(name for name in sys.modules if name.startswith("co3d_compile.")))
"""
    shape, modules = python(code).splitlines()
    assert shape == "(1, 4)"
    assert not {"co3d_compile.compiler", "co3d_compile.capture", "co3d_compile.rules"} & set(eval(modules))


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("co3d_compile").joinpath("py.typed").is_file()
