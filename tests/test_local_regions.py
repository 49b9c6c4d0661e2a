"""What is local in time streams, however it is written; what is not stays on a window."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_attention import Masked, distances
from local_networks import CHANNELS, CLIP, GLOBAL, LOCAL, RESIZED, Global, network
from marks import few, long, slow
from torch import nn
from torch.nn import functional as F
from verified_networks import rewrite
from zoo import Graph

import co3d_compile as co3d
from co3d_compile import CompiledModel
from co3d_compile.analysis.locality import Reach
from co3d_compile.analysis.locality_proof import NotLocal, Part, confirm


@cache
def compiled(name: str, **options: Any) -> tuple[nn.Module, CompiledModel]:
    """A network of the table, and what it compiles to."""
    part = LOCAL[name][0] if name in LOCAL else RESIZED.get(name, lambda: Global(name))
    net = network(part())
    return net, co3d.compile(net, CLIP, **options)


def largest_difference(net: nn.Module, model: CompiledModel, batch: int = 2, frames: int = 48) -> float:
    """Of the stream from the untouched network on one long clip, from states that hold NaN on."""
    info, session = model.info, co3d.StreamSession(model, batch=batch)
    states = {name: np.full_like(v, np.nan) if v.dtype == np.float32 else v for name, v in session.get_state().items()}
    session.set_state(states)
    (pulse,), out = info.frames_per_step.values(), info.outputs[0]
    x = torch.randn(batch, CHANNELS, frames, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = net(x).numpy()
    worst, compared = 0.0, 0
    for j in range(frames // pulse):
        got = session.step(x[:, :, j * pulse : (j + 1) * pulse].numpy()).reshape(batch, 2, pulse)
        newest = (j + 1) * pulse - 1 - out.delay
        if j >= info.warmup_steps and newest >= pulse - 1:
            worst = max(worst, float(np.abs(got - wanted[:, :, newest - pulse + 1 : newest + 1]).max()))
            compared += 1
    assert compared > 10 // pulse, compared
    return worst


@pytest.mark.parametrize("name", few(LOCAL, "band", "mask -1e9", "band of weights"))
def test_what_is_local_streams(name: str) -> None:
    net, model = compiled(name)
    assert not model.info.recomputed
    assert [(r.before, r.after, r.period) for r in model.info.regions] == LOCAL[name][1]
    assert largest_difference(net, model, batch=1 if name == "blocks in the batch" else 2) < 1e-5


@pytest.mark.parametrize(
    "name",
    few(
        [name for name in LOCAL if any(p > 1 for *_, p in LOCAL[name][1]) or name == "blocks in the batch"],
        "blocks by a mask",
    ),
)
def test_dense_strides_have_no_blocks(name: str) -> None:
    with pytest.raises(co3d.UnsupportedError, match=r"has no meaning with stride_mode='dense'.*aten\."):
        compiled(name, stride_mode="dense")


@pytest.mark.parametrize("name", [slow(name) if name in ("learned positions", "flipped") else name for name in GLOBAL])
def test_what_is_not_local_stays_on_a_window(name: str) -> None:
    _, model = compiled(name)
    assert not model.info.regions
    assert any("not local" in r.reason for r in model.info.recomputed)


def _first(t: int, value: float) -> torch.Tensor:
    """A weight for each entry: one, and another one for the first."""
    return torch.where(torch.arange(t) == 0, value, 1.0)


OWN_ENTRIES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "class token": lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 2).sum(2),
    "class token that attends": lambda m, x: m.attend(torch.cat([m.token.expand(len(x), -1, -1), x], 2).mT)[:, 0],
    "token behind the frames": lambda m, x: torch.cat([x, m.token.expand(len(x), -1, -1)], 2).amax(2),
    "token in place of the first frame": lambda m, x: torch.where(torch.arange(x.shape[2]) == 0, m.token, x).sum(2),
    "added to the first frame": lambda m, x: (x + m.token * (1 - _first(x.shape[2], 0))).sum(2),
    "weight of the last frame": lambda m, x: (x * _first(x.shape[2], 3.0).flip(0)).sum(2),
    "trapezoids": lambda m, x: (x * _first(x.shape[2], 0.5) * _first(x.shape[2], 0.5).flip(0)).sum(2),
    "mean but of the first frame": lambda m, x: (x * _first(x.shape[2], 0)).sum(2) / _first(x.shape[2], 0).sum(),
}
"""Entries of the network's own, or with a weight of their own, which what pools all of them must not lose."""


@pytest.mark.parametrize("name", few(OWN_ENTRIES, "class token that attends", "added to the first frame"))
def test_entries_of_its_own_are_no_edge_of_what_is_local(name: str) -> None:
    def attend(y: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(y, y, y)

    torch.manual_seed(0)
    net = Graph(OWN_ENTRIES[name]).eval()
    net.attend = attend  # type: ignore
    net.token = nn.Parameter(torch.randn(1, CHANNELS, 1))
    session = co3d.StreamSession(co3d.compile(net, (torch.randn(1, CHANNELS, 8),)), batch=2)
    x = torch.randn(2, CHANNELS, 12)
    for n in range(12):
        got = session.step(x[:, :, n].numpy())
        if n >= session.info.warmup_steps:
            with torch.no_grad():
                np.testing.assert_allclose(got, net(x[:, :, n - 7 : n + 1]), atol=1e-5)


def _places(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[2])


REMEMBERED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gradient": lambda x: torch.gradient(x, dim=2)[0],
    "neighbours": lambda x: x[:, :, (_places(x)[:, None] + torch.arange(-1, 2)).clamp(0, x.shape[2] - 1)].amax(-1),
}


@pytest.mark.parametrize("name", few(REMEMBERED, "neighbours"))
def test_what_is_remembered_for_good_begins_with_the_clips_own_first_entries(name: str) -> None:
    net, clip = Graph(lambda m, x: REMEMBERED[name](x).cumsum(2)).eval(), torch.randn(1, CHANNELS, 8)
    compiled = co3d.compile(net, (clip,))
    assert not compiled.report().recomputed and co3d.verify(compiled, net, (clip,)).passed
    session, x = co3d.StreamSession(compiled), torch.randn(1, CHANNELS, 20)
    (delay,) = session.info.delays.values()
    got = np.stack([session.step(frame.numpy()) for frame in x.unbind(2)], 2)
    np.testing.assert_allclose(got[:, :, delay:], net(x)[:, :, : 20 - delay], atol=1e-5)


@pytest.mark.parametrize("options", [{"frames_per_step": 3}, {"stride_mode": "dense"}], ids=str)
@pytest.mark.parametrize("name", [slow("band"), "mask -1e9", long("histogram")])
def test_a_region_runs_on_several_entries(name: str, options: dict[str, Any]) -> None:
    net, model = compiled(name, **options)
    assert largest_difference(net, model) < 1e-5


def test_a_region_streams_in_front_of_a_window() -> None:
    """Its first entries are those of padding: none is odd."""
    net = Graph(lambda m, x: m.part(x).softmax(2).sum(2), part=network(LOCAL["band of weights"][0]()))
    model = co3d.compile(net.eval(), CLIP)
    assert model.info.regions and [r.operator for r in model.info.recomputed] == ["aten.softmax"]


def test_shapes_alone_are_no_input_of_a_region() -> None:
    """A mask of ones at the rate of the clip, behind a stride, and a slice that takes all clips: ActionFormer's."""

    def attend(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.down(x)
        seen = F.interpolate(torch.ones_like(x[:, :1]), size=y.shape[2])
        far = distances(y.shape[2]).abs() > 2
        scores = m.part.scores(y)[: y.shape[0]].masked_fill(far, -torch.inf).masked_fill(seen < 0.5, -torch.inf)
        result: torch.Tensor = m.up(m.part.attend(y, scores))
        return result

    parts = {"down": nn.Conv1d(CHANNELS, CHANNELS, 3, 2, 1), "up": nn.ConvTranspose1d(CHANNELS, 2, 2, 2)}
    net = Graph(attend, part=Masked(0.0, 2, 2), **parts).eval()
    model = co3d.compile(net, CLIP)
    assert model.info.regions and not model.info.recomputed
    assert largest_difference(net, model) < 1e-5


def test_a_region_behind_a_stride_runs_at_every_phase() -> None:
    net, model = compiled("band behind a stride", stride_mode="dense")
    assert model.info.regions and not model.info.recomputed
    x = torch.randn(1, CHANNELS, 48, generator=torch.Generator().manual_seed(0))
    session, delay, late = co3d.StreamSession(model), model.info.outputs[0].delay, model.info.warmup_steps
    got = np.stack([session.step(x[:, :, j].numpy()).reshape(1, 2) for j in range(48)], 2)
    for phase in (0, 1):
        with torch.no_grad():
            wanted = net(x[:, :, phase:]).numpy()
        newest = [(o, 2 * o + phase + delay) for o in range(8, wanted.shape[2] - 8)]
        for o, step in newest:
            assert step < late or np.abs(got[:, :, step] - wanted[:, :, o]).max() < 1e-5


def whole_sequence(model: CompiledModel, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """The stream's results for a whole clip, from the first frame to the last."""
    session, pulse, out = co3d.StreamSession(model), model.info.frames_per_step["x"], model.info.outputs[0]
    length = x.shape[2]
    frames = F.pad(x, (0, -length % pulse)).numpy()
    results = []
    for j in range(0, length, pulse):
        flags = np.array([[j + i < length for i in range(pulse)]])
        results.append(session.step(frames[:, :, j : j + pulse], valid=flags))
    results += session.flush()
    entries = [np.reshape(r, (1, 2, out.entries_per_step)) for r in results]
    return np.concatenate(entries, 2)[:, :, out.delay :]


ENDS = {
    ("band", 1): 7,
    ("band", 3): 9,
    ("mask -1e9", 1): 0,
    ("mask -1e9", 3): 0,
    ("mask -inf", 1): 4,
    ("mask -inf", 3): 6,
    ("band of weights by einsum", 1): 5,
    ("band behind a stride", 6): 18,
    ("band behind up-sampling", 1): 4,
}
"""The least length of a stream with exact ends, by network and frames per step."""


@pytest.mark.parametrize(("name", "frames_per_step"), few(ENDS, ("mask -1e9", 1)))
def test_both_ends_are_those_of_the_whole_clip(name: str, frames_per_step: int) -> None:
    net, model = compiled(name, boundary="exact", frames_per_step=frames_per_step)
    least = ENDS[name, frames_per_step]
    assert [part.least_frames for part in model.info.regions] == [least]
    assert model.info.version == (2 if least else 1)
    for length in {30, 19, max(1, least)}:
        x = torch.randn(1, CHANNELS, length, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            wanted = net(x).numpy()
        assert np.abs(whole_sequence(model, x)[:, :, : wanted.shape[2]] - wanted).max() < 1e-5
    for length in {1, least - 1} if least else ():
        with pytest.raises(co3d.SessionError, match=rf"streams of {least} frames or more, for .* in part.* is local"):
            whole_sequence(model, torch.zeros(1, CHANNELS, length))


def test_a_stream_that_is_too_short_is_found_wherever_it_has_come_from() -> None:
    model = compiled("mask -inf", boundary="exact", frames_per_step=3)[1]
    one, other = co3d.StreamSession(model), co3d.StreamSession(model, batch=2)
    frames = np.zeros((1, CHANNELS, 3), np.float32)
    one.step(frames)
    other.restore(one.snapshot(), stream=1)
    ended = np.array([[False] * 3])
    with pytest.raises(co3d.SessionError, match="Stream 1 ends after 3 frames"):
        other.step(frames, valid=ended, streams=[1])
    other.step(frames, streams=[1])
    other.step(frames, valid=ended, streams=[1])
    other.flush()  # stream 0 has not begun


@pytest.mark.parametrize("name", few(("mask -1e9", "chunks beside each other", "back from a spectrum"), "mask -1e9"))
def test_a_region_is_verified_against_the_network_on_a_long_clip(name: str) -> None:
    net, model = compiled(name)
    found = co3d.verify(model, net, CLIP)
    assert found.passed and found.relative_error < 1e-5, found.reason


@pytest.mark.slow
def test_verification_fails_on_a_small_receptive_field(tmp_path: Path) -> None:
    net, model = compiled("mask -1e4")
    field = 9  # 5 of the region, 2 more of each convolution
    for said in (field, field - 1):
        model.save(tmp_path / "model.onnx")
        rewrite(tmp_path / "model.onnx", receptive_field=said)
        found = co3d.verify(tmp_path / "model.onnx", net, CLIP)
        assert found.passed == (said == field), found.reason


@pytest.mark.parametrize(
    ("name", "lie"), [("band", (2, 3)), ("band", (3, 2)), ("mask -1e9", (2, 0)), ("mask -inf", (1, 1))]
)
def test_a_claim_of_less_than_the_reach_is_caught(name: str, lie: tuple[int, int]) -> None:
    part = next(iter(compiled(name)[1].program.regions.values()))
    claimed = Part(part.captures, part.dims, (torch.float32,) * len(part.dims), part.dim)
    confirm(claimed, Reach(part.before, part.after, part.period), 64)
    with pytest.raises(NotLocal):
        confirm(claimed, Reach(*lie, part.period), 64)


def test_a_region_is_refused_where_everything_must_stream() -> None:
    with pytest.raises(co3d.UnsupportedError, match="local in time"):
        compiled("mask -1e9", unsupported="error")
