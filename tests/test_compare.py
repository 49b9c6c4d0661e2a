"""``co3d compare``: streams beside the clip model as a sliding window, on really encoded videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from film import Brightness, gray
from marks import slow
from model_files import save_export, use_folder
from test_cli_run import one_line
from torch import nn

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.main import main as group
from co3d_compile.media import write_video
from co3d_compile.side_by_side.comparison import correlation


def without_padding(*, pooled: bool = True, stride: int = 1, taps: int = 1) -> nn.Module:
    """A network whose clips read no zeros beyond their ends, where ``taps`` is 1: both ways give the same numbers."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv3d(3, 4, (taps, 3, 3), (stride, 2, 2), (taps // 2, 0, 0)), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool3d((None, 1, 1) if not pooled else 1), nn.Flatten(2 if not pooled else 1)]
    return nn.Sequential(*layers, *([nn.Linear(4, 3)] if pooled else [])).eval()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark, bright from frame 30 to 49 (1.5 s to 2.5 s), dark, with some movement."""
    levels = [(220 if 30 <= index < 50 else 30) + 7 * (index % 4) for index in range(80)]
    return write_video(tmp_path_factory.mktemp("compare") / "v.mp4", [gray(level) for level in levels], 20)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, film: Path) -> None:
    use_folder(tmp_path, monkeypatch)
    (tmp_path / "v.mp4").symlink_to(film)


def made(network: nn.Module, *options: str, frames: int = 8) -> str:
    archive = save_export(model=network, clip=torch.rand(1, 3, frames, 16, 16))
    result = CliRunner().invoke(compile_command, [archive, "-o", "m.onnx", *options])
    assert result.exit_code == 0, result.output
    return archive


def compare(archive: str, *args: str) -> Result:
    return CliRunner().invoke(group, ["compare", "m.onnx", "--against", archive, "--source", "v.mp4", *args])


@pytest.mark.parametrize(
    ("network", "options"),
    [
        slow(without_padding(), []),
        slow(without_padding(pooled=False), []),
        (without_padding(stride=2), []),
        slow(without_padding(), ["--frames-per-step", "4"]),
        slow(without_padding(), ["--fps", "10"]),
    ],
    ids=["pooled", "every frame", "strided", "several frames", "rate"],
)
def test_answers_about_the_same_frames_meet(network: nn.Module, options: list[str]) -> None:
    """Without padding over time both ways compute the same, so any shift would show."""
    archive = made(network, *options)
    result = json.loads(compare(archive, "--json").stdout)
    window, stream = result["runs"]
    assert result["answers"] > 12 and window["agreement"] is None and stream["agreement"] == 1.0
    assert stream["correlation"] == pytest.approx(1, abs=1e-5) and stream["milliseconds"] > 0 < window["milliseconds"]
    assert json.loads(compare(archive, "--json", "--every", "3").stdout)["answers"] <= result["answers"] // 3 + 1


def test_the_clip_is_that_of_the_file() -> None:
    Path("co3d_test_made.py").write_text("from test_compare import without_padding\n")
    made(without_padding())
    result = compare("co3d_test_made:without_padding", "--json")
    assert result.exit_code == 0, result.output
    assert "1x3x8x16x16" in json.loads(result.stdout)["notes"][0]


def test_scores_are_equal_where_they_must_be() -> None:
    from co3d_compile.side_by_side.streams_on_video import run_side_by_side

    network, clip = without_padding(), (torch.rand(1, 3, 8, 16, 16),)
    model = co3d.compile(network, clip)
    found = run_side_by_side({"stream": model}, network, clip, co3d.read_source("v.mp4"), activation="none")
    np.testing.assert_allclose(found.tracks[1].scores, found.tracks[0].scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.diff(found.times), 1 / 20, atol=1e-3)
    assert found.times[0] == pytest.approx(7 / 20, abs=1e-3)


def test_labels_say_how_often_each_is_right() -> None:
    names = Path("names.txt")
    names.write_text("bright\ndark\n")
    archive = made(Brightness(5).eval(), "--labels", "names.txt", "--size", "16")
    Path("truth.csv").write_text("label,begin,end\ndark,0,1.5\nbright,1.5,2.5\ndark,2.5,3.2\nbright,3.2,4\n")
    args = ["--labels", "truth.csv", "--plot", "scores.png", "--window", "16"]
    result = compare(archive, *args)
    assert result.exit_code == 0, result.output
    assert "frames right" in result.stdout and "scores.png written" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert Path("scores.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads(compare(archive, *args[:2], "--json").stdout)["runs"]
    assert [run["name"] for run in runs] == ["sliding window", "stream"]
    assert (runs[1]["segments_right"], runs[1]["segments"]) == (3, 4) and 0.7 < runs[1]["frames_right"] < 0.9


def test_another_window_is_compiled_as_the_file_was(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = made(without_padding(taps=3), "--max-delay", "0", "--delay-by", "shift", "--recurrence", "window")
    seen: list[dict[str, object]] = []
    compile_as_before = co3d.compile
    monkeypatch.setattr(co3d, "compile", lambda *args, **how: seen.append(how) or compile_as_before(*args, **how))
    result = compare(archive, "--json", "--window", "16", "--frames", "40")
    assert result.exit_code == 0, result.output
    (how,) = seen
    assert (how["window"], how["max_delay"], how["delay_by"], how["recurrence"]) == (16, 0, "shift", "window")


def test_windows_side_by_side() -> None:
    archive = made(without_padding(taps=3))
    runs = json.loads(compare(archive, "--json", "--window", "8", "--window", "16", "--frames", "60").stdout)["runs"]
    assert [run["name"] for run in runs] == ["sliding window", "stream, window 8", "stream, window 16"]
    assert runs[1]["correlation"] > runs[2]["correlation"] > 0


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--frames", "5"], 2, "too short"),
        (["--labels", "missing.csv"], 4, "missing.csv"),
        (["--labels", "bad.csv"], 4, "line 3"),
        (["--labels", "classes.csv"], 4, "The model has no class 'run'"),
        (["--labels", "v.mp4"], 4, "segments"),
        (["--plot", "scores.txt"], 2, ".svg, .png"),
        (["--plot", "m.onnx"], 2, "itself"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(args: list[str], code: int, says: str) -> None:
    archive = made(without_padding())
    Path("bad.csv").write_text("label,begin,end\n0,1,2\n1,x,3\n")
    Path("classes.csv").write_text("label,begin,end\nrun,1,2\n")
    result = compare(archive, *args)
    assert result.exit_code == code and says in one_line(result), result.output


def test_a_model_with_other_inputs_is_refused() -> None:
    made(without_padding())

    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.mean(x + y, (2, 3, 4))

    clip = torch.rand(1, 3, 8, 16, 16)
    torch.export.save(torch.export.export(Two(), (clip, clip)), "two.pt2")
    result = compare("two.pt2")
    assert result.exit_code == 2 and "The file takes 1 inputs, and the model 2" in one_line(result)


def test_correlation_of_what_never_changes_is_unknown() -> None:
    still = np.full((5, 3), 0.2, np.float32)
    assert correlation(still, still) is None
    ramp = np.linspace(0, 1, 5, dtype=np.float32)[:, None]
    assert correlation(ramp, ramp) == pytest.approx(1) and correlation(ramp, np.zeros_like(ramp)) is None
