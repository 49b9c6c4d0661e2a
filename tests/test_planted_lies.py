"""Lies planted in the compiler are caught: a rule's delay, a region's reach. (Lies about promises: `test_promises`.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from local_networks import CHANNELS, LENGTH, LOCAL, network
from marks import slow
from oracle import check
from small_graphs import conv, entry, fn
from torch import nn

import co3d_compile as co3d
from co3d_compile.analysis.locality import Reach, reach_of
from co3d_compile.compiler import local_regions
from co3d_compile.rules.base import Rule
from co3d_compile.rules.combine import Concatenation
from co3d_compile.rules.conv import Convolution
from co3d_compile.rules.pointwise import Pointwise
from co3d_compile.rules.pool import Pool
from co3d_compile.rules.resample import Upsample
from co3d_compile.rules.shape import View
from co3d_compile.rules.slices import Slice

# The rule, a network, its delay.
DELAYS: dict[str, tuple[type[Rule], Callable[[], nn.Module], int]] = {
    "convolution": (Convolution, lambda: conv(padding=1), 1),
    "pool": (Pool, lambda: nn.MaxPool1d(3, 1, 1), 1),
    "pointwise": (Pointwise, lambda: nn.Sequential(conv(padding=1), nn.SiLU()), 1),
    "view": (View, fn(lambda m, x: m.a(x)[..., None].flatten(2), a=lambda: conv(padding=1)), 1),
    "slice": (Slice, fn(lambda m, x: m.a(x)[:, :, 2:], a=lambda: conv(padding=1)), 3),
    "concatenation": (Concatenation, fn(lambda m, x: m.a(torch.cat([x[:, :, :2] * 0, x], 2)), a=conv), 0),
    "up-sampling": (Upsample, lambda: nn.Upsample(scale_factor=2, mode="linear"), 1),
}


@pytest.mark.parametrize("by", [1, 0, -1])
@pytest.mark.parametrize("name", DELAYS)
def test_a_rule_that_tells_a_delay_off_by_one(name: str, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later than it is: what reads the entries comes later too, and is right, or is not. Earlier: nothing can be."""
    rule, build, delay = DELAYS[name]
    flow = rule.flow

    def lie(self: Any, node: Any) -> Any:
        fact = flow(self, node)
        return replace(fact, delay=fact.delay + by)

    monkeypatch.setattr(rule, "flow", lie)
    told = entry(f"{name} told by {by} later", build)
    if not by:
        assert check(told).delays == (delay,)
    else:
        with pytest.raises((AssertionError, co3d.PassError)):
            assert check(told).delays == (delay,)


@pytest.mark.parametrize(("name", "more"), [slow("band", (0, 1)), slow("mask -1e9", (1, 0))])
def test_a_region_that_reads_one_more_entry_than_it_claims(
    name: str, more: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof finds the true reach, or leaves the region on a window; without the proof, verification fails."""

    def lie(found: Any) -> Reach | None:
        told = reach_of(found)
        return told and replace(told, before=told.before - more[0], after=told.after - more[1])

    net, clip = network(LOCAL[name][0]()), (torch.randn(1, CHANNELS, LENGTH),)
    monkeypatch.setattr(local_regions, "reach_of", lie)
    compiled = co3d.compile(net, clip)
    assert compiled.info.recomputed or [(r.before, r.after) for r in compiled.program.regions.values()] == [(3, 3)]
    monkeypatch.setattr(local_regions, "confirmed", lambda part, reach, *rest: (reach, reach.before + 1 + reach.after))
    compiled = co3d.compile(net, clip)
    assert not compiled.info.recomputed and not co3d.verify(compiled, net, clip).passed
