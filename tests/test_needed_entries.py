"""Verification computes no other entries than the compared ones need, and finds what it finds with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from verified_networks import build, compiled, contract, rewrite, saved

import co3d_compile as co3d
from co3d_compile.verification.needed_entries import NeededEntries, NotCovered


def errors(network: str) -> list[tuple[float, bool]]:
    module, example, _ = build(network)
    result = co3d.verify(compiled(network), module, example, bisect=False)
    return [(step.relative, result.passed) for step in result.errors]


@pytest.mark.parametrize(
    "network",
    [
        "residual",
        "mean head",
        "mean gate, frame",
        "two rates",
        "folded time",
        "batch norm",
        "max gate, window",
        "flat gate",
    ],
)
def test_the_rest_of_the_entries_changes_nothing(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_entries = errors(network)
    monkeypatch.setattr(NeededEntries, "parts", lambda needed, results: {})
    for (own, passed), (all_of_them, still) in zip(few_entries, errors(network), strict=True):
        assert own == pytest.approx(all_of_them, abs=1e-6) and passed == still


def test_entries_that_are_not_needed_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 convolutions in a row the last ones have a few entries to compute, and the first ones most."""
    layers = [nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()) for _ in range(12)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1)).eval()
    clip = torch.randn(1, 4, 6, 4, 4)
    model = co3d.compile(network, clip)
    work = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            assert co3d.verify(model, network, clip).passed
        work.append(counter.get_total_flops())
        monkeypatch.setattr(NeededEntries, "parts", lambda needed, results: {})
    assert work[0] < 0.85 * work[1]  # both count the clips of the captured length, too


def test_what_is_not_there_is_computed_again_with_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def wrong(needed: NeededEntries, results: object) -> None:
        tries.append(needed)
        raise NotCovered if len(tries) == 1 else AssertionError

    monkeypatch.setattr(NeededEntries, "parts", wrong)
    assert all(passed for _, passed in errors("residual"))
    assert len(tries) == 1


@pytest.mark.parametrize("network", ["residual", "mean gate, frame", "mean head", "two inputs"])
def test_a_small_receptive_field_is_found_behind_a_long_warm_up(network: str, tmp_path: Path) -> None:
    """More entries are finite then than are compared."""
    path, module, example = saved(network, tmp_path)
    said = contract(path)
    rewrite(path, receptive_field=said.receptive_field - 1, warmup_steps=said.warmup_steps + 7)
    result = co3d.verify(path, module, example)
    assert not result.passed and f"at least {said.receptive_field} frames" in result.reason, result
