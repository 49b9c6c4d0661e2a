"""``co3d run --features``: outputs for every frame in numbered parts, also of a run that was broken off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from film import gray
from test_cli_run import one_line
from torch import nn

import co3d_compile as co3d
from co3d_compile.cli.main import main as group
from co3d_compile.media import VideoFrame, write_video
from co3d_compile.media.feature_parts import FeatureRun

FRAMES = 60


def network(stride: int = 1, taps: int = 3) -> nn.Module:
    torch.manual_seed(3)
    trunk = nn.Sequential(
        nn.Conv3d(3, 4, (taps, 3, 3), (stride, 2, 2), (taps // 2, 0, 0)), nn.AdaptiveAvgPool3d((None, 1, 1))
    )
    return nn.Sequential(trunk, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def compiled(stride: int = 1, **options: object) -> co3d.CompiledModel:
    clip = (torch.rand(1, 3, 8, 16, 16),)
    return co3d.compile(network(stride), clip, also=["0"], **options)  # type: ignore[arg-type]


def film() -> Iterator[VideoFrame]:
    for index in range(FRAMES):
        yield VideoFrame(gray(20 + 37 * index % 190), index / 20, index)


def read(folder: Path, name: str = "0") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [np.load(path) for path in sorted(folder.glob("part_*.npz"))]
    kept = [part for part in parts if name in part]
    return tuple(np.concatenate([part[key] for part in kept]) for key in (name, f"{name}.frame", f"{name}.time"))  # type: ignore[return-value]


@pytest.mark.parametrize("options", [{}, {"frames_per_step": 4}, {"boundary": "exact"}, {"stride": 2}], ids=str)
def test_features_are_those_of_the_frames_that_they_name(options: dict[str, int], tmp_path: Path) -> None:
    made = compiled(**options)
    with co3d.StreamSession(made) as session:
        run = FeatureRun(session, tmp_path / "f", "film", rows=10)
        for frame in film():
            run.add(frame)
        run.finish()
    values, frames, times = read(tmp_path / "f")
    stride = options.get("stride", 1)
    prepare = co3d.Preprocess(16)
    clip = torch.from_numpy(np.stack([prepare(frame.image)[0] for frame in film()], 1)[None])
    with torch.inference_mode():
        wanted = network(stride)[0](clip)[0].movedim(1, 0).numpy()
    np.testing.assert_allclose(times, frames / 20, atol=1e-6)
    assert len(set(frames)) == len(frames) >= (FRAMES - 12) // stride
    for value, frame in zip(values, frames, strict=True):
        if 2 <= frame < FRAMES - 2 or options.get("boundary"):
            np.testing.assert_allclose(value.reshape(-1), wanted[frame // stride].reshape(-1), rtol=1e-4, atol=1e-5)
    if options.get("boundary"):
        assert list(frames) == list(range(FRAMES))


@pytest.mark.parametrize("fps", [None, 13])
def test_a_run_that_was_broken_off_goes_on_with_the_same_numbers(tmp_path: Path, fps: int | None) -> None:
    made = compiled(frames_per_step=2, preprocess={"fps": fps} if fps else None)
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(folder: Path, last: int) -> FeatureRun:
        with co3d.StreamSession(made) as session:
            work = FeatureRun(session, folder, "film", rows=5, every=2)
            for frame in film():
                if frame.index == last:
                    return work
                work.add(frame)
            work.finish()
            return work

    run(whole, -1)
    begun = [run(broken, last).begun for last in (3, 30, 33, 50)]
    assert begun == sorted(begun) and begun[-1] > 20
    assert run(broken, -1).complete and not list(broken.glob("state_*"))
    for a, b in zip(read(whole), read(broken), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(read(whole)[1] % 2) == {0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "v.mp4", [frame.image for frame in film()], 20)
    compiled().save("m.onnx")
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(group, ["run", "m.onnx", "--source", "v.mp4", *args])


def test_the_command(here: Path) -> None:
    result = run("--features", "f", "--every", "3")
    assert result.exit_code == 0 and " in 1 part Written f" in " ".join(result.stdout.split()), result.output
    index = json.loads((here / "f" / "features.json").read_text())
    assert index["complete"] and list(index["outputs"]) == ["0"] and index["every"] == 3
    values, frames, _ = read(here / "f")
    assert values.shape[1:] == (4, 1, 1) and set(frames % 3) == {0}
    again = json.loads(run("--features", "f", "--every", "3", "--json").stdout)
    assert again["complete"] and again["features"] == len(frames)
    for args, says in (
        (["--features", "f"], "other options"),
        (["--features", "."], "holds other files"),
        (["--features", "g", "--csv", "x"], "--features goes alone, without --csv"),
        (["--features", "g", "--output-name", "z"], "no output 'z'"),
    ):
        result = run(*args)
        assert result.exit_code == 2 and says in one_line(result), result.output
