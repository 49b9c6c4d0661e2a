"""Outputs of modules inside a network beside its own: ``also=`` and ``--also``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_files import save_export, use_folder
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.cli.main import main as group

CLIP = torch.rand(1, 3, 8, 8, 8)


class Shared(nn.Module):
    """A layer that is called twice, a block of two layers, one that returns two tensors, and one that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, (3, 3, 3), padding=1)
        self.block = nn.Sequential(nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU())
        self.twice = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.split = Split()
        self.nothing = nn.Identity()
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.stem(x))
        y = self.twice(self.twice(y))
        a, b = self.split(y)
        y = self.nothing(self.pool(a + b)).flatten(1)
        return torch.softmax(self.head(y), 1)


class Split(nn.Module):
    """Two results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(x), torch.cos(x)


@pytest.mark.parametrize("exported", [False, True], ids=["module", "archive"])
@pytest.mark.parametrize(
    ("also", "names", "delays"),
    [
        (["block"], ["block"], [2]),
        (["stem", "pool", "head"], ["stem", "pool", "head"], [1, 4, 4]),
        (["split"], ["split.0", "split.1"], [4, 4]),
        (["block.0"], ["block.0"], [2]),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_results_of_modules_are_outputs_with_their_delays(
    also: Sequence[str], names: Sequence[str], delays: Sequence[int], exported: bool
) -> None:
    network: nn.Module = Shared().eval()
    given = torch.export.export(network, (CLIP,)) if exported else network
    made = co3d.compile(given, (CLIP,), also=also)
    assert list(made.info.delays.items()) == [("output", 4), *zip(names, delays, strict=True)]
    result = co3d.verify(made, given, (CLIP,))
    assert result.passed, result.reason


def test_they_are_what_the_module_returns_in_the_stream() -> None:
    network = nn.Sequential(nn.Conv3d(3, 4, (3, 1, 1)), nn.ReLU(), nn.Conv3d(4, 2, (3, 1, 1))).eval()
    video = torch.rand(1, 3, 20, 4, 4)
    session = co3d.StreamSession(co3d.compile(network, (CLIP[..., :4, :4],), also=["1"]))
    (name,) = session.info.frames_per_step
    with torch.inference_mode():
        wanted = network[1](network[0](video)).numpy()
    for step in range(20):
        values = session.run({name: video[:, :, step].numpy()})
        if step >= 2:
            np.testing.assert_allclose(values["1"], wanted[:, :, step - 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("also", "says"),
    [
        (["blok"], "No module 'blok' computes something in this network. Did you mean block?"),
        (["nothing"], "No module 'nothing' computes something"),
        (["twice"], "The module 'twice' is called 2 times"),
        (["stem", "stem"], "twice in also. Name each once."),
        ("stem", "no list of module paths. Give a list, such as"),
    ],
    ids=str,
)
def test_modules_that_have_no_output(also: Sequence[str], says: str) -> None:
    with pytest.raises(co3d.UsageError, match=says):
        co3d.compile(Shared().eval(), (CLIP,), also=also)


def test_the_command_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folder(tmp_path, monkeypatch)
    archive = save_export(model=Shared().eval(), clip=CLIP)
    args = [archive, "-o", "m.onnx", "--also", "pool", "--also", "block"]
    result = CliRunner().invoke(compile_command, args)
    assert result.exit_code == 0 and "passed" in result.stdout, result.output
    assert "an answer of block is about what happened 2 frames ago" in " ".join(result.stdout.split())
    info = json.loads(CliRunner().invoke(group, ["inspect", "m.onnx", "--json"]).stdout)
    assert info["options"]["also"] == ["pool", "block"]
    assert CliRunner().invoke(group, ["verify", "m.onnx", "--against", archive]).exit_code == 0
