"""``verify`` on frames of one's own, on videos and over long runs, and what it shows of the error over time."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from compiled import compiled
from film import Brightness, video
from marks import long
from onnx import numpy_helper
from torch import nn
from verified_networks import build, contract, rewrite, saved
from zoo import randomise
from zoo.real import REAL

import co3d_compile as co3d
from co3d_compile.cli.main import main as group
from co3d_compile.media.frame_source import Source
from co3d_compile.media.video_steps import Feed
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow


def frames_of(shapes: list[tuple[int, ...]], steps: int) -> list[tuple[Any, ...]]:
    generator = np.random.default_rng(0)
    return [tuple(generator.random(shape, dtype=np.float32) for shape in shapes) for _ in range(steps)]


@pytest.mark.parametrize("network", ["residual", "strides", "dense", "two rates", "mean head", "lstm", "folded time"])
def test_given_frames(network: str, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    info = contract(path)
    shapes = [tuple(len(example[0]) if s == "N" else s for s in spec.shape) for spec in info.inputs]
    steps = info.warmup_steps + 20
    result = verify(path, module, example, frames=frames_of(shapes, steps))
    assert result.passed, result
    assert result.streamed == steps and result.errors[-1].step == steps - 1
    assert result.steps == len(result.errors) == (20 if network != "lstm" else steps - info.warmup_steps)


def test_given_frames_end_early_or_do_not_fit(tmp_path: Path) -> None:
    path, module, example = saved("residual", tmp_path)
    warmup = contract(path).warmup_steps
    result = verify(path, module, example, frames=iter(frames_of([(1, 4)], warmup + 1)), steps=500)
    assert result.passed and [e.step for e in result.errors] == [warmup]
    with pytest.raises(co3d.UsageError, match=f"from step {warmup} on"):
        verify(path, module, example, frames=frames_of([(1, 4)], warmup))
    with pytest.raises(co3d.UsageError, match=r"Step 0: the frames for '.*' are torch.float32 \(1, 5\)"):
        verify(path, module, example, frames=frames_of([(1, 5)], 9))
    with pytest.raises(co3d.UsageError, match="frames for 2 inputs, and the model has 1"):
        verify(path, module, example, frames=frames_of([(1, 4), (1, 4)], 9))


def test_wrong_frames_alone_show_what_random_ones_do_not(tmp_path: Path) -> None:
    """A clamp that random frames never reach: real frames are worth comparing on."""
    torch.manual_seed(0)
    example = (torch.randn(1, 4, 8),)
    network = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Hardtanh(-100, 100), nn.Conv1d(4, 4, 3, padding=1)).eval()
    path = co3d.compile(network, example).save(tmp_path / "model.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if np.all(np.abs(numpy_helper.to_array(tensor)) == 100):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 2, tensor.name))
    onnx.save(model, path)
    rewrite(path, weights_sha256=None)
    assert verify(path, network, example).passed
    result = verify(path, network, example, frames=[300 * frame for (frame,) in frames_of([(1, 4)], 20)])
    assert not result.passed and result.bisection is not None and result.bisection.difference is not None
    assert result.bisection.difference.operator == "aten.hardtanh"


def test_errors_of_every_step(tmp_path: Path) -> None:
    path, module, example = saved("mean head", tmp_path)
    result = verify(path, module, example, steps=20)
    warmup = contract(path).warmup_steps
    assert [e.step for e in result.errors] == list(range(warmup, warmup + 20))
    assert max(e.relative for e in result.errors) == result.relative_error
    assert max(e.absolute for e in result.errors) == result.max_error
    assert json.loads(json.dumps(result.to_dict()))["errors"][0] == {
        "step": warmup, "absolute": result.errors[0].absolute, "relative": result.errors[0].relative,
    }  # fmt: skip


# --- the start


@pytest.mark.parametrize("network", ["residual", "strides", "mean gate, window", "attention"])
def test_a_warm_up_stated_one_too_short_fails_for_that_reason(network: str, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    right = verify(path, module, example)
    warmup = contract(path).warmup_steps
    assert right.nan_states == len(contract(path).states) and right.finite_from == warmup
    rewrite(path, warmup_steps=warmup - 1)
    result = verify(path, module, example)
    assert not result.passed and result.finite_from == warmup and result.bisection is None
    assert f"The result at step {warmup - 1} still depends on what the states held at the start" in result.reason
    assert f"from step {warmup - 1} on (warmup_steps)" in result.reason


def test_a_warm_up_stated_far_too_short_blames_no_operator(tmp_path: Path) -> None:
    example = (torch.randn(1, 4, 8),)
    layers = [layer for _ in range(8) for layer in (nn.Conv1d(4, 4, 5, padding=2), nn.ReLU())]
    network = randomise(nn.Sequential(*layers), *example)
    path = co3d.compile(network, example).save(tmp_path / "model.onnx")
    rewrite(path, warmup_steps=1)
    result = verify(path, network, example)
    assert not result.passed and result.bisection is None and "warmup_steps" in result.reason


def test_recurrent_states_do_not_start_at_nan(tmp_path: Path) -> None:
    path, module, example = saved("lstm", tmp_path)
    assert verify(path, module, example).nan_states == 0


# --- long runs


@pytest.mark.parametrize(
    "network", ["residual", "strides", "dense", "two rates", "mean gate, window", "four frames a step"]
)
def test_a_long_run_is_compared_at_points_spread_over_it(network: str, tmp_path: Path) -> None:
    path, module, example = saved(network, tmp_path)
    seen: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    result = verify(path, module, example, steps=400, progress=progress)
    assert result.passed, result
    warmup = contract(path).warmup_steps
    steps = [e.step for e in result.errors]
    assert result.streamed == warmup + 400 and steps[0] == warmup and steps[-1] == warmup + 399
    starts = [s for s in steps if s - 1 not in steps]
    assert len(starts) == 9 and max(np.diff(starts)) - min(np.diff(starts)) <= 1
    assert result.memory is None or min(result.memory) > 1e6
    assert seen[0][0] == "stream" and all(0 < done <= total for _, done, total in seen)


def test_a_long_run_sees_what_builds_up(tmp_path: Path) -> None:
    """A state that counts steps, and adds a little more to the output at each."""
    path, module, example = saved("residual", tmp_path)
    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = ["inner" if output == "output" else output for output in node.output]
        node.input[:] = ["inner" if value == "output" else value for value in node.input]
    for name, value in (("little", 1e-7), ("one", 1.0), ("nothing", 0.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.full(1, value, np.float32), name))
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    model.graph.node.extend([
        make("IsNaN", ["steps"], ["began"]), make("Where", ["began", "nothing", "steps"], ["count"]),
        make("Add", ["count", "one"], ["more"]), make("Mul", ["count", "little"], ["off"]),
        make("Add", ["inner", "off"], ["output"]),
    ])  # fmt: skip
    model.graph.input.append(info("steps", onnx.TensorProto.FLOAT, ["N", 1]))
    model.graph.output.append(info("more", onnx.TensorProto.FLOAT, ["N", 1]))
    onnx.save(model, path)
    states = contract(path).states
    more = type(states[0])("steps", "more", ("N", 1), "float32", 0.0, 0)
    rewrite(path, states=(*states, more), weights_sha256=None)
    assert verify(path, module, example).passed
    result = verify(path, module, example, steps=5000)
    assert not result.passed
    assert result.errors[-1].relative > 100 * result.errors[0].relative
    assert result.bisection is not None and "agree with the model when streamed afresh" in result.bisection.message


def test_a_long_run_of_a_model_that_remembers_all_is_refused(tmp_path: Path) -> None:
    path, module, example = saved("lstm", tmp_path)
    assert verify(path, module, example, steps=60).steps == 60
    with pytest.raises(co3d.UsageError, match="remembers all frames"):
        verify(path, module, example, steps=10_000)


@pytest.mark.parametrize(("network", "steps"), [("x3d_s", 1_000), long("x3d_s", 10_000)])
def test_many_steps_of_x3d(network: str, steps: int) -> None:
    """Memory does not grow, and neither does the error."""
    entry = REAL[network].entry(small=True)
    model = compiled(entry)
    result = verify(model, entry.build(), entry.examples(), steps=steps)
    assert result.passed, result
    assert result.streamed == steps + model.info.warmup_steps
    first, last = result.errors[:10], result.errors[-10:]
    assert max(e.relative for e in last) < result.tolerance and max(e.relative for e in first) < result.tolerance
    if result.memory is not None:
        start, end = result.memory
        assert end < start + 200e6


# --- videos and the command


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its file and a video that is faster than the model wants."""
    folder = tmp_path_factory.mktemp("film")
    network, clip = Brightness().eval(), (torch.rand(1, 3, 8, 16, 16),)
    preprocess = {"size": 20, "mean": 0.45, "std": 0.225, "fps": 10}
    co3d.compile(network, clip, preprocess=preprocess).save(folder / "model.onnx")
    torch.export.save(torch.export.export(network, clip), folder / "model.pt2")
    video(folder / "video.mp4", count=46, fps=20)
    return folder


@pytest.fixture
def film(filmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, in which the test runs."""
    shutil.copytree(filmed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(group, ["verify", "model.onnx", "--against", "model.pt2", *args])


def test_the_frames_of_a_video_are_those_that_run_feeds(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[Any] = []
    step = co3d.StreamSession.step

    def noting(self: Any, *frames: Any, **options: Any) -> Any:
        fed.append(np.asarray(frames[0][0] if isinstance(frames[0], tuple) else frames[0]))
        return step(self, *frames, **options)

    monkeypatch.setattr(co3d.StreamSession, "step", noting)
    list(co3d.predict("model.onnx", co3d.read_source("video.mp4")))
    run, fed = fed, []
    answer = call("--video", "video.mp4", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert len(run) == 23 == len(fed)
    for a, b in zip(run, fed, strict=True):
        np.testing.assert_array_equal(a, b.reshape(a.shape))
    report = json.loads(answer.stdout)
    assert report["passed"] and report["video"] == "video.mp4" and report["streamed"] == 23
    with Source("video.mp4") as source:
        steps = list(Feed(contract(film / "model.onnx")).steps(source))
    np.testing.assert_array_equal(steps[7][0], run[7])


def test_the_command_shows_the_error_over_time(film: Path) -> None:
    answer = call("--video", "video.mp4", "--steps", "5")
    assert answer.exit_code == 0, answer.stderr
    text = answer.stdout
    warmup = contract(film / "model.onnx").warmup_steps
    assert "video.mp4" in text and "passed" in text and f"outputs finite from step {warmup} on" in text
    assert all(f"  {step}  " in text for step in range(warmup, warmup + 5))
    assert "Drift" in call("--steps", "40").stdout


def test_the_commands_on_the_page_run(film: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "verify.md").read_text(encoding="utf-8")
    lines = re.findall(r"^co3d verify model.onnx --against model.pt2(.*)$", text, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        answer = call(*line.split())
        assert answer.exit_code == 0 and "passed" in answer.stdout, (line, answer.stderr)
    assert "<svg" in Path("errors.svg").read_text()


@pytest.mark.parametrize("name", ["errors.svg", "errors.png", "errors.html"])
def test_plots(name: str, film: Path) -> None:
    Path(name).write_text("an older one")
    answer = call("--plot", name)
    assert answer.exit_code == 0, answer.stderr
    content = Path(name).read_bytes()
    assert content[:4] == b"\x89PNG" if name.endswith("png") else b"<svg" in content
    assert f"{name} written" in answer.stdout
    assert sorted(os.listdir()) == sorted(["model.onnx", "model.pt2", "video.mp4", name])


def test_a_file_that_differs_is_plotted_and_explained(film: Path) -> None:
    model = onnx.load("model.onnx")
    weight = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.1, weight.name))
    onnx.save(model, "model.onnx")
    answer = call("--plot", "errors.html")
    assert answer.exit_code == 3
    for text in (answer.stdout.replace("\n", " "), answer.stderr, Path("errors.html").read_text()):
        assert "aten.conv3d in conv" in " ".join(text.split())
    answer = call("--no-bisect", "--json")
    assert answer.exit_code == 3 and json.loads(answer.stdout)["bisection"] is None
    answer = call("--json")
    found = json.loads(answer.stdout)["bisection"]["difference"]
    assert (found["operator"], found["module_path"]) == ("aten.conv3d", "conv")
    assert found["before"] < 1e-6 < 1e-2 < found["after"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--plot", "errors.pdf"], 2, "must end with .svg, .png, .html"),
        (["--plot", "no/such/errors.svg"], 6, "no directory"),
        (["--plot", "short.mp4", "--video", "short.mp4"], 2, "the video itself"),
        (["--long", "--steps", "5"], 2, "Give one of them"),
        (["--video", "none.mp4"], 4, "none.mp4"),
        (["--video", "short.mp4"], 2, "no more frames"),
        (["--steps", "0"], 2, "--steps"),
    ],
)
def test_mistakes(args: list[str], code: int, says: str, film: Path) -> None:
    video(film / "short.mp4", count=6)
    answer = call(*args)
    assert answer.exit_code == code, answer.stderr
    assert says in answer.stderr and answer.stderr.count("\n") == 1 and answer.stdout == ""
    assert not Path("errors.pdf").exists()


def test_a_model_that_takes_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, example, _ = build("residual")
    co3d.compile(module, example).save("model.onnx")
    torch.export.save(torch.export.export(module, example), "model.pt2")
    video(tmp_path / "video.mp4", count=6)
    answer = call("--video", "video.mp4")
    assert answer.exit_code == 5 and "no sequence of pictures" in answer.stderr


def test_a_plot_says_what_it_lacks(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = call("--plot", "errors.svg")
    assert answer.exit_code == 1 and "[plot]" in answer.stderr and not Path("errors.svg").exists()


def test_help_teaches() -> None:
    text = CliRunner().invoke(group, ["verify", "--help"]).stdout
    assert all(word in text for word in ("--video", "--long", "--plot", "--bisect", "NaN", "Exit codes", "Examples"))
