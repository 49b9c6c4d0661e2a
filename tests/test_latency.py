"""How late an answer is: in frames and seconds, by every command that says it, and which modules make it so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from film import Brightness, compiled, frames, video
from model_files import save_export, use_folder
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.main import main as group
from co3d_compile.contract.model_contract import Contract
from co3d_compile.report.latency import frames_behind, latency_texts


class Branches(nn.Module):
    """A fast and a slow branch that meet, behind a layer that waits for two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, (5, 1, 1), padding=(2, 0, 0))
        self.fast = nn.Conv3d(4, 4, 1)
        self.slow = nn.Sequential(
            nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)), nn.Conv3d(4, 4, (7, 1, 1), padding=(3, 0, 0))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return torch.mean(self.fast(y) + self.slow(y), (2, 3, 4))


def causal(taps: int) -> nn.Module:
    return nn.Sequential(nn.ConstantPad3d((0, 0, 0, 0, taps - 1, 0), 0.0), nn.Conv3d(3, 2, (taps, 1, 1)))


def strided() -> nn.Module:
    layers = nn.Conv3d(3, 4, (3, 1, 1), (2, 1, 1), (1, 0, 0)), nn.Conv3d(4, 2, (3, 1, 1), (2, 1, 1), (1, 0, 0))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())


CLIP = torch.rand(1, 3, 16, 4, 4)


@pytest.mark.parametrize(
    ("network", "added"),
    [
        (Branches(), [("stem", 2), ("slow.0", 1), ("slow.1", 3)]),
        (causal(5), []),
        (nn.Sequential(nn.Conv3d(3, 2, 3, padding=1), nn.Conv3d(2, 2, (3, 1, 1))), [("0", 1), ("1", 2)]),
        (strided(), None),
    ],
    ids=["branches", "causal", "unpadded", "strided"],
)  # fmt: skip
def test_the_modules_that_add_delay(network: nn.Module, added: list[tuple[str, int]] | None) -> None:
    """Their frames add up to the delay; a branch that waits for another one adds none."""
    made = co3d.compile(network.eval(), (CLIP,))
    rows = made.report().delays
    (output,) = made.report().outputs
    newest, _ = frames_behind(output, made.report().frames_per_step)
    assert sum(row["frames"] for row in rows) == newest
    if added is not None:
        assert [(row["module_path"], row["frames"]) for row in rows] == added


@pytest.mark.parametrize(
    "network", [Brightness(5), Brightness(5, 2, dense=True), Brightness(5, 4)], ids=["1", "2", "4"]
)
def test_it_is_where_the_predictor_places_its_answers(network: nn.Module) -> None:
    model = compiled(network, (1, 3, 16, 16, 16), frames_per_step=4)
    with co3d.Predictor(model) as predictor:
        made = [(p.newest_frame - p.frame, p.warmup) for p in predictor.predict(frames())]
        said = frames_behind(json.loads(predictor.info.to_json())["outputs"][0], dict(predictor.info.frames_per_step))
    behind = [frames for frames, warmup in made if not warmup]
    assert (min(behind), max(behind)) == said


def info(made: bytes) -> Contract:
    return co3d.StreamSession(made).info


def test_sentences() -> None:
    def said(fps: float | None, **changes: object) -> list[str]:
        return latency_texts({**json.loads(info(compiled()).to_json()), **changes}, fps)

    assert said(None) == ["an answer is about what happened 2 frames ago, and sees 5 frames"]
    assert said(10) == ["an answer is about what happened 2 frames = 0.2 s ago, and sees 5 frames = 0.5 s"]
    assert said(0.1)[0].endswith("sees 5 frames = 50.0 s")
    assert said(10, receptive_field=None)[0].endswith("and sees all that came before")
    output = {"name": "y", "delay": 0, "has_time": True, "entries_per_step": 1, "frames_per_entry": 1.0}
    assert said(10, outputs=[output])[0].startswith("an answer is about the newest frame, and sees")
    later = {**output, "name": "z", "delay": 30}
    assert said(25, outputs=[output, later])[1].startswith(
        "an answer of z is about what happened 30 frames = 1.2 s ago"
    )
    many = {**output, "entries_per_step": 4, "delay": 1}
    first = said(10, outputs=[many], frames_per_step={"x": 4})[0]
    assert first.startswith("an answer is about what happened 1 to 4 frames = 0.1 to 0.4 s ago")
    two = said(8, outputs=[later], frames_per_step={"slow": 1, "fast": 4})[0]
    assert "30 frames of slow = 15.0 s ago" in two


def test_every_command_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folder(tmp_path, monkeypatch)
    archive = save_export(model=Brightness().eval(), clip=torch.rand(1, 3, 8, 16, 16))
    sentence = "an answer is about what happened 2 frames = 0.2 s ago, and sees 5 frames = 0.5 s"
    args = [archive, "-o", "m.onnx", "--fps", "10", "--report", "page.html"]
    made = CliRunner().invoke(compile_command, args)
    assert made.exit_code == 0, made.output
    assert sentence in made.stdout and "in all 2 frames = 0.2 s" in made.stdout
    shown = CliRunner().invoke(group, ["inspect", "m.onnx"]).stdout
    assert sentence in shown and "+2  aten.conv3d  conv" in shown
    assert "2 frames = 0.08 s ago" in CliRunner().invoke(group, ["inspect", "m.onnx", "--fps", "25"]).stdout
    page = Path("page.html").read_text()
    assert f"A{sentence[1:]}." in page and "2 frames = 0.2 s</b>" in page
    video(tmp_path / "v.mp4")
    assert f"A{sentence[1:]}." in CliRunner().invoke(group, ["run", "m.onnx", "--source", "v.mp4"]).stdout
    report = json.loads(CliRunner().invoke(compile_command, [*args[:3], "--json", "--fps", "10"]).stdout)
    assert report["delays"] == [{"operator": "aten.conv3d", "module_path": "conv", "frames": 2}] and report["fps"] == 10
