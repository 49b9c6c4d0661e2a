"""Clips that are computed chunk by chunk, with caches: the same operators on all of the clip, and so a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chunk_nets import CHUNKED, NOT_CHUNKED, Chunked, padded_pieces
from marks import long
from torch import nn
from unlike_streams import streams

import co3d_compile as co3d

pytestmark = pytest.mark.slow

CLIP = 13
MORE = (
    *("means of a cache", "maxima of two", "spread", "spread by taps that lie apart", "repeated", "rows, squeezed"),
    *("rows, in two", "rows, in slices", "rows, one by one", "rows, written", "two pieces of time"),
)
"""More of a kind."""
ROWS = [long(name) if name in MORE else name for name in CHUNKED]


def clip() -> tuple[torch.Tensor]:
    torch.manual_seed(1)
    return (torch.randn(1, 4, CLIP),)


def build(forward: object) -> nn.Module:
    return Chunked(forward).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ROWS)
def test_chunks_with_caches_are_a_stream(name: str) -> None:
    forward, delay = CHUNKED[name]
    net = build(forward)
    compiled = co3d.compile(net, clip())
    report = compiled.report()
    assert not report.recomputed and not any("loop" in line for line in str(report).splitlines())
    assert tuple(compiled.info.delays.values()) == (delay,)
    assert compiled.info.receptive_field is not None
    steps = CLIP / next(iter(compiled.info.frames_per_step.values()))
    assert report.gmac_step <= 1.5 * report.gmac_clip / steps
    assert co3d.verify(compiled, net, clip()).passed


@pytest.mark.parametrize("name", [name for name in ROWS if name != "deep"])
def test_with_ends_they_begin_and_end_as_the_clip_does(name: str) -> None:
    net = build(CHUNKED[name][0])
    streams(net, net, [9, 13, 21], CLIP)


@pytest.mark.parametrize("name", NOT_CHUNKED)
def test_chunks_that_are_no_stream_are_right_all_the_same(name: str) -> None:
    net = build(NOT_CHUNKED[name])
    compiled = co3d.compile(net, clip())
    if not compiled.report().recomputed:
        assert co3d.verify(compiled, net, clip()).passed
        return
    session = co3d.StreamSession(compiled, threads=1)
    frames = torch.randn(1, 4, 2 * CLIP)
    for t in range(frames.shape[2]):
        got = session.step(frames[:, :, t].numpy())
        if t >= session.info.warmup_steps:
            wanted = net(frames[:, :, t + 1 - CLIP : t + 1]).detach().numpy()
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_zeros_at_the_ends_of_each_piece_are_no_zeros_at_the_ends_of_the_clip() -> None:
    assert co3d.compile(build(padded_pieces), clip()).report().recomputed
