"""``co3d bench``: every side is timed in a process of its own, and what cannot be timed is named."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import co3d_compile as co3d
from co3d_compile.bench.bench_model import bench
from co3d_compile.bench.one_tap_floor import floor_passes
from co3d_compile.bench.timing import SIDES
from co3d_compile.cli.bench import command
from co3d_compile.user_operators.declare_rule import scope

pytestmark = pytest.mark.slow

CLIP = torch.zeros(1, 3, 8, 12, 12)
QUICK = ["--rounds", "1", "--seconds", "0.01", "--threads", "1"]


def network(stride: int = 1, padding: int = 1) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 16, 3, stride=(stride, 1, 1), padding=(padding, 1, 1))
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5)).eval()


def run(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.pt2"
    torch.export.save(torch.export.export(network(), (CLIP,)), path)
    return path


@pytest.mark.parametrize("kind", ["archive", "ONNX"])
def test_every_side(kind: str, archive: Path, tmp_path: Path) -> None:
    if kind == "ONNX":
        torch.onnx.export(network(), (CLIP,), str(tmp_path / "clip.onnx"), dynamo=False, opset_version=17)
        archive = tmp_path / "clip.onnx"
    result = run(archive, *QUICK, "--json", "--chart", tmp_path / "times.svg")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    openvino = find_spec("openvino") is not None
    there = {"openvino": openvino, "openvino32": openvino}
    assert list(data["sides"]) == [side for side in SIDES if there.get(side, True)]
    assert list(data["left_out"]) == [side for side in SIDES if not there.get(side, True)]
    assert all(side["median"] > 0 and side["calls"] >= 3 and side["memory"] > 1e6 for side in data["sides"].values())
    assert {"clip/step", "step/floor", "pytorch/step", "window/step", "fastest clip/step"} <= set(data["ratios"])
    assert data["machine"]["threads"] == 1 and data["gmac_ratio"] > 1
    assert (tmp_path / "times.svg").read_text().lstrip().startswith("<?xml")


def test_compiled_file_alone(archive: Path, tmp_path: Path) -> None:
    path = co3d.compile(network(), (CLIP,)).save(tmp_path / "model.onnx")
    result = run(path, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "step" in result.stdout and "Milliseconds per frame" in result.stdout
    assert result.stderr == "time step\n"


def test_strides_count_as_frames() -> None:
    """A clip model answers once per step; times are per frame on every side."""
    result = bench(network(stride=2), (CLIP,), sides=["clip", "step"], rounds=1, seconds=0.01, threads=1)
    assert list(result["sides"]) == ["clip", "step"]
    assert list(result["frames_per_step"].values()) == [2]


def test_floor_has_no_state() -> None:
    for stride in (1, 2):
        whole = co3d.compile(network(stride), (CLIP,))
        floor = co3d.compile(network(stride), (CLIP,), window=1, passes=floor_passes())
        assert not floor.info.states
        ratio = whole.report().to_dict()["gmac_frame"] / floor.report().to_dict()["gmac_frame"]
        assert ratio == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("frames", [7, 8])
def test_the_floor_of_a_pool_keeps_its_space(frames: int) -> None:
    pools = nn.Sequential(nn.MaxPool3d(3, 2, 1), nn.AvgPool3d(3, 2, 1), nn.Flatten(3), nn.Unflatten(3, (3, 3)))
    compiled = co3d.compile(pools, (torch.zeros(1, 3, frames, 12, 12),), passes=floor_passes())
    assert not compiled.info.states


def test_a_clip_model_that_cannot_be_exported_is_named() -> None:
    """PyTorch's exporter has no adaptive pool that leaves a dim as it is."""
    model = nn.Sequential(network()[0], nn.AdaptiveAvgPool3d((None, 1, 1)))
    result = bench(model, (CLIP,), sides=["clip", "step"], rounds=1, seconds=0.01, threads=1)
    assert list(result["sides"]) == ["step"]
    assert "adaptive_avg_pool3d" in result["left_out"]["clip"]


def test_a_side_that_cannot_be_timed_is_named() -> None:
    """The floor of a convolution without padding is not known: the rest is timed."""
    result = bench(network(padding=0), (CLIP,), sides=["step", "floor"], rounds=1, seconds=0.01, threads=1)
    assert list(result["sides"]) == ["step"]
    assert "conv3d" in result["left_out"]["floor"]


@torch.library.custom_op("co3d_test_bench::half", mutates_args=())
def half(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5


@half.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halved: torch.Tensor = half(x)
        return halved


def test_an_operator_that_only_the_compiler_knows() -> None:
    """PyTorch's exporter does not know it, nor does the process that times the clip model in PyTorch."""
    with scope():
        co3d.rule(half, pointwise=True)(lambda x: x * 0.5)
        model = nn.Sequential(network(), Halved()).eval()
        result = bench(model, (CLIP,), sides=["pytorch", "clip", "step"], rounds=1, seconds=0.01, threads=1)
    assert list(result["sides"]) == ["step"]
    assert "exporter" in result["left_out"]["clip"] and "Timing clip.pt2 failed" in result["left_out"]["pytorch"]


MISTAKES = {
    "an unknown side": (["--sides", "clip,fastest"], "fastest"),
    "only a side that cannot be": (["--sides", "openvino"], "[openvino]"),
    "no round": (["--rounds", "0"], "--rounds"),
    "a folder that is not there": (["--chart", "nowhere/times.svg"], "nowhere"),
    "no kind of picture": (["--chart", "times.txt"], "must end with .svg"),
    "a chart on the model": (["--chart", "model.svg"], "the model itself"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(what: str, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, named = MISTAKES[what]
    model = archive.with_suffix(".svg")
    model.write_bytes(archive.read_bytes())
    monkeypatch.chdir(archive.parent)
    monkeypatch.setattr("co3d_compile.bench.bench_model.find_spec", lambda _: None)
    result = run("model.svg", *QUICK, *words)
    assert result.exit_code in (2, 6) and named in result.stderr
    assert [named in line for line in result.stderr.splitlines() if line.startswith("error: ")] == [True]
