"""The benchmark of sound networks: a small network of each kind that it has is timed and printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import long
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_sound import Codec, Crnn, Separator, Sound, measure, show

SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "crnn": (lambda: Crnn(16, 8, 2, 3), (1, 72), 1, 8 / 16_000),
    "separator": (lambda: Separator(4, 8, 1, 2), (1, 1, 40), 1, 4 / 16_000),
    "codec_encoder": (lambda: Codec(False, 2, (2, 4)), (1, 1, 64), 1, 8 / 16_000),
    "codec_decoder": (lambda: Codec(True, 2, (2, 4)), (1, 128, 8), 8, 8 / 16_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crnn", *map(long, list(SMALL)[1:])])
def test_sound(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    build, clip, samples, step = SMALL[name]
    row = measure(name, Sound(build, clip, samples), rounds=1, seconds=0.01, threads=1)
    assert row["step_seconds"] == step
    assert {"pytorch", "step"} <= set(row["sides"]) and row["ratios"]["pytorch/step"] > 0
    show([row])
    assert name in capsys.readouterr().out
