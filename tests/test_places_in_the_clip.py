"""Networks that treat a frame by its place in the clip: they stream what clips as captured show, or a window.

The oracle is the untouched network on each clip of the captured length in a longer piece of frames. What streams is one
entry of each of these clips, always the same one; a window is all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from marks import few
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d
from co3d_compile.compiler import build_model, local_regions
from co3d_compile.verification import long_regions, reference

T, FRAMES, CHANNELS = 8, 30, 4
RAMP = [min(float(t), 20.0) for t in range(300)]
REGION, WINDOW, STREAM = "region", "window", "stream"
Network = Callable[[Any, Tensor], Tensor]


def places(x: Tensor) -> Tensor:
    """Where each frame is in the clip."""
    return torch.arange(x.shape[2])


def near(x: Tensor, frames: int) -> Tensor:
    """Attention of each frame to those beside it, less the frame itself: zero where all frames are the same."""
    scores = x.mT @ x + torch.where((places(x)[:, None] - places(x)).abs() <= frames, 0.0, -1e9)
    return (scores.softmax(-1) @ x.mT).mT - x


def written(x: Tensor, entries: slice, value: float) -> Tensor:
    """Some entries written over."""
    y = x.clone()
    y[:, :, entries] = value
    return y


def turns(x: Tensor, turn: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Walks over the frames: each turn has the result of the one before, the frame, and its number."""
    h, found = torch.zeros_like(x[:, :, 0]), []
    for t in range(x.shape[2]):
        h = turn(h, x[:, :, t], t)
        found.append(h)
    return torch.stack(found, 2)


def less_the_newest(x: Tensor, every: int) -> Tensor:
    """Each frame less the newest one of which the number is a multiple."""
    first, found = x[:, :, 0], []
    for t in range(x.shape[2]):
        first = first if t % every else x[:, :, t]
        found.append(x[:, :, t] - first)
    return torch.stack(found, 2)


def few_of(x: Tensor, entries: int) -> Tensor:
    """The first entries, in front of zeros."""
    y = torch.zeros_like(x)
    y[:, :, :entries] = x[:, :, :entries]
    return y


BY_PLACE: dict[str, tuple[Network, str]] = {
    "tril": (lambda m, x: x.tril(), WINDOW),
    "tril with a diagonal": (lambda m, x: x.tril(2), WINDOW),
    "tril of more channels than frames": (lambda m, x: m.wide(x).tril(), WINDOW),
    "tril beside more channels than frames": (lambda m, x: m.wide(x) + m.wide(x).tril(), WINDOW),
    "tril, summed": (lambda m, x: x.tril().sum(2), WINDOW),
    "tril, convolved": (lambda m, x: m.layer(x.tril()), WINDOW),
    "tril beside all": (lambda m, x: x + x.tril(), REGION),
    "triu": (lambda m, x: x.triu(), REGION),
    "triu with a diagonal": (lambda m, x: x.triu(2), REGION),
    "triu that leaves nothing out": (lambda m, x: x.triu(-3), STREAM),
    "the diagonal": (lambda m, x: x * torch.eye(CHANNELS, x.shape[2]), WINDOW),
    "a triangle of weights": (lambda m, x: x @ torch.ones(x.shape[2], x.shape[2]).tril(), WINDOW),
    "a band of weights": (lambda m, x: x @ torch.ones(x.shape[2], x.shape[2]).tril().triu(-2), REGION),
    "the first three": (lambda m, x: x * (places(x) < 3), WINDOW),
    "all but the first three": (lambda m, x: x * (places(x) >= 3), REGION),
    "the last three": (lambda m, x: x * (places(x) >= x.shape[2] - 3), WINDOW),
    "the first ten": (lambda m, x: x * (places(x) < 10), STREAM),
    "filled behind three": (lambda m, x: x.masked_fill(places(x) >= 3, 1.0), WINDOW),
    "one of two by its place": (lambda m, x: torch.where(places(x) < 5, x, m.layer(x)), REGION),
    "one of two, of which a clip has one": (lambda m, x: torch.where(places(x) < 10, x, m.layer(x)), STREAM),
    "twice behind ten": (lambda m, x: near(x, 2) * torch.where(places(x) < 10, 1.0, 2.0), REGION),
    "every other twice": (lambda m, x: near(x, 1) * (1.0 + places(x) % 2), REGION),
    "on a ramp down": (lambda m, x: x * (5.0 - places(x)).clamp(0, 1), WINDOW),
    "no more than a ramp": (lambda m, x: torch.minimum(m.layer(x), (3.0 - places(x)).clamp(0)), REGION),
    "on a ramp up": (lambda m, x: x * (places(x) / 4.0).clamp(0, 1), REGION),
    "on a ramp up that ends behind the clip": (lambda m, x: x * (places(x) / 10.0).clamp(0, 1), WINDOW),
    "on a ramp up that ends behind two clips": (lambda m, x: x * (places(x) / 20).clamp(0, 1), WINDOW),
    "on a ramp up that ends farther out": (lambda m, x: x * (places(x) / 5000).clamp(0, 1), WINDOW),
    "counted up to twenty": (lambda m, x: x * torch.where(places(x) < 20, places(x), 20), WINDOW),
    "counted down to zero, and up": (lambda m, x: x * (places(x) - 30).abs(), WINDOW),
    "counted again from 32 on": (lambda m, x: x * (places(x) % 32), WINDOW),
    "counted in 8 bits": (lambda m, x: x + places(x).to(torch.int8), WINDOW),
    "counted in buckets": (lambda m, x: x * torch.bucketize(places(x), torch.arange(30)), WINDOW),
    "counted in ones up to thirty": (lambda m, x: x * torch.ones_like(x).cumsum(2).clamp(max=30), WINDOW),
    "on a table that counts up to twenty": (lambda m, x: x * m.ramp[: x.shape[2]], WINDOW),
    "by the numbers of such a table": (lambda m, x: x * m.ramp[places(x)], WINDOW),
    "on a list that counts up to twenty": (lambda m, x: x * torch.tensor(RAMP)[: x.shape[2]], WINDOW),
    "on a curve that begins as a line": (lambda m, x: x * (1e-4 * places(x)).sin() * 1e4, WINDOW),
    "before a region, on such a ramp": (lambda m, x: near(x * places(x).clamp(max=20), 1), WINDOW),
    "weighed up to twenty in a loop": (lambda m, x: turns(x, lambda h, y, t: y * min(t + 1, 20)), WINDOW),
    "counted up to twenty in a sum": (lambda m, x: turns(x, lambda h, y, t: h * 0.9 + y * min(t + 1, 20)), WINDOW),
    "the mean of the last twenty": (lambda m, x: turns(x, lambda h, y, t: h + (y - h) / min(t + 1, 20)), WINDOW),
    "twice as much from frame 20 on": (lambda m, x: turns(x, lambda h, y, t: h * 0.9 + y * (1 + (t >= 20))), WINDOW),
    "by a list, in a loop": (lambda m, x: turns(x, lambda h, y, t: h * 0.9 + y * RAMP[t]), WINDOW),
    "another sum from frame 20 on": (
        lambda m, x: turns(x, lambda h, y, t: h + y if t < 20 else (h + y).tanh()),
        WINDOW,
    ),
    "no sum from frame 20 on": (lambda m, x: turns(x, lambda h, y, t: h * 0.9 + y if t < 20 else h), WINDOW),
    "begun again every 16 frames": (lambda m, x: turns(x, lambda h, y, t: h * 0.9 + y if t % 16 else y), WINDOW),
    "a sum, twice as much in long clips": (
        lambda m, x: turns(x, lambda h, y, t: h * 0.9 + y) * (2 if x.shape[2] > 20 else 1),
        WINDOW,
    ),
    "less the newest of every 25 frames": (lambda m, x: less_the_newest(x, 25), WINDOW),
    "counts that a layer makes features of": (
        lambda m, x: x + m.layer(torch.stack([(places(x) / 30).clamp(max=k) for k in range(CHANNELS)])[None]),
        WINDOW,
    ),
    "remembered up to frame 20": (lambda m, x: m.lstm((x * (places(x) < 20)).mT)[0].mT, WINDOW),
    "no more than a ramp that ends behind the clip": (
        lambda m, x: torch.minimum(x.abs(), (12.0 - places(x)).clamp(0)),
        WINDOW,
    ),
    "on a ramp as long as the clip": (lambda m, x: x * torch.linspace(0, 1, x.shape[2]), WINDOW),
    "faded out": (lambda m, x: x * torch.exp(-20.0 * places(x)), WINDOW),
    "counted in ones": (lambda m, x: x * (torch.ones_like(x).cumsum(2) < 4), WINDOW),
    "counted in ones up to ten": (lambda m, x: x * (torch.ones_like(x).cumsum(2) < 10), STREAM),
    "learned places": (lambda m, x: x + m.places[:, :, : x.shape[2]], WINDOW),
    "learned places, the last one for the rest": (lambda m, x: x + m.places[:, :, places(x).clamp(max=10)], WINDOW),
    "few learned places": (lambda m, x: x * m.places[:, :, places(x).clamp(max=4)], REGION),
    "learned places, again and again": (lambda m, x: x + m.places[:, :, places(x) % 4], REGION),
    "learned places, a longer period": (lambda m, x: x + m.places[:, :, places(x) % 16], WINDOW),
    "half of a period that a clip has not": (lambda m, x: near(x, 1) * (places(x) % 16 < 8), REGION),
    "three and zeros": (lambda m, x: torch.cat([x[:, :, :3], torch.zeros_like(x[:, :, 3:])], 2), WINDOW),
    "zeros and three": (lambda m, x: torch.cat([torch.zeros_like(x[:, :, 3:]), x[:, :, -3:]], 2), WINDOW),
    "three and twice the others": (lambda m, x: torch.cat([x[:, :, :3], 2 * x[:, :, 3:]], 2), STREAM),
    "zeros written behind three": (lambda m, x: written(x, slice(3, None), 0.0), WINDOW),
    "zeros written in front": (lambda m, x: written(x, slice(None, 3), 0.0), STREAM),
    "zeros written up to the last three": (lambda m, x: written(x, slice(None, -3), 0.0), WINDOW),
    "three written into zeros": (lambda m, x: few_of(x, 3), WINDOW),
    "three copied into zeros": (lambda m, x: torch.zeros_like(x).index_copy(2, torch.arange(3), x[:, :, :3]), WINDOW),
    "ten frames back, or the first": (lambda m, x: x[:, :, (places(x) - 10).clamp(min=0)], WINDOW),
    "three frames back, or the first": (lambda m, x: x[:, :, (places(x) - 3).clamp(min=0)], STREAM),
    "blocks longer than the clip": (
        lambda m, x: (
            (x.mT @ x + torch.where(places(x) // 16 == places(x)[:, None] // 16, 0.0, -1e9)).softmax(-1) @ x.mT
        ),
        WINDOW,
    ),
    "the first three and itself": (
        lambda m, x: (x.mT @ x + torch.where((places(x) < 3) | torch.eye(x.shape[2]).bool(), 0.0, -1e9)).softmax(-1),
        WINDOW,
    ),
}
"""How each of them streams, in clips of eight frames."""


def network(forward: Network) -> nn.Module:
    """A layer, and what follows it."""
    torch.manual_seed(0)
    first = nn.Conv1d(3, CHANNELS, 1)
    layers = {"layer": nn.Conv1d(CHANNELS, CHANNELS, 1), "wide": nn.Conv1d(CHANNELS, 16, 1)}
    layers["lstm"] = nn.LSTM(CHANNELS, CHANNELS, batch_first=True)
    net = Graph(lambda m, x: forward(m, m.first(x)), first=first, **layers)
    net.register_parameter("places", nn.Parameter(torch.randn(1, CHANNELS, 32)))
    net.register_buffer("ramp", torch.tensor(RAMP))
    return net.eval()


def results(model: co3d.CompiledModel, frames: Tensor) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The results from the warm-up on, each with how many frames have been seen."""
    session = co3d.StreamSession(model)
    (pulse,) = model.info.frames_per_step.values()
    for step in range(FRAMES // pulse):
        got = session.step(frames[:, :, step * pulse : (step + 1) * pulse].squeeze(2).numpy())
        if step >= model.info.warmup_steps:
            yield (step + 1) * pulse, got


def is_right(net: nn.Module, model: co3d.CompiledModel) -> bool:
    """Says whether each result is that of a clip, or the same entry of each clip."""
    frames = torch.randn(1, 3, FRAMES, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        clips = torch.stack([net(frames[:, :, n : n + T]) for n in range(FRAMES - T + 1)]).numpy()
    (output,) = model.info.outputs
    found = list(results(model, frames))

    def agrees(pairs: list[tuple[np.ndarray[Any, Any], int, tuple[Any, ...]]]) -> bool:
        there = [(got, clips[(n, *at)]) for got, n, at in pairs if 0 <= n < len(clips)]
        return len(there) > 8 and all(np.allclose(a.reshape(b.shape), b, atol=1e-5) for a, b in there)

    if not model.info.regions and model.info.recomputed:  # a clip may be known before it has been seen
        return any(agrees([(got, seen - T + more, ()) for seen, got in found]) for more in range(T))
    each = output.entries_per_step
    singles = [
        (got.reshape(1, -1, each)[:, :, k], seen - each + k - output.delay) for seen, got in found for k in range(each)
    ]
    return any(agrees([(got, n - place, (..., place)) for got, n in singles]) for place in range(T)) or (
        each > 1
        and any(  # blocks: the same block of each clip that begins with one
            agrees([(got, n // each * each - at, (..., at + n % each)) for got, n in singles]) for at in range(T - each)
        )
    )


@pytest.mark.parametrize(
    "name", few(BY_PLACE, "tril", "one of two by its place", "three and zeros", "twice behind ten")
)
def test_what_a_clip_does_not_show_is_no_answer(name: str) -> None:
    forward, how = BY_PLACE[name]
    net, clip = network(forward), torch.randn(1, 3, T)
    model = co3d.compile(net, (clip,))
    assert how == (REGION if model.info.regions else WINDOW if model.info.recomputed else STREAM)
    assert is_right(net, model)
    assert co3d.verify(model, net, (clip,)).passed


LIES = {
    "tril": "it does not depend on its input inside of a long clip",
    "tril, convolved": "it does not depend on its input inside of a long clip",
    "the first three": "it does not depend on its input inside of a long clip",
    "the last three": "it does not depend on its input inside of a long clip",
    "on a ramp down": "it does not depend on its input inside of a long clip",
    "counted in ones": "it does not depend on its input inside of a long clip",
    "three and zeros": "it does not depend on its input inside of a long clip",
    "ten frames back, or the first": "inside of a long clip it computes something else",
}
"""What verification says of a file that has the inside of a long clip all the same."""


@pytest.mark.parametrize("name", few(LIES, "tril", "ten frames back, or the first"))
def test_verification_fails_what_a_clip_does_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_regions, "check_shown", lambda *_: None)
    net, clip = network(BY_PLACE[name][0]), torch.randn(1, 3, T)
    model = co3d.compile(net, (clip,))
    found = co3d.verify(model, net, (clip,))
    assert model.info.regions and not found.passed and LIES[name] in found.reason


FAR_OUT = [
    "on a ramp up that ends behind two clips",
    "counted up to twenty",
    "by the numbers of such a table",
    "weighed up to twenty in a loop",
    "counted up to twenty in a sum",
    "twice as much from frame 20 on",
    "another sum from frame 20 on",
    "begun again every 16 frames",
]


@pytest.mark.parametrize("name", few(FAR_OUT, "counted up to twenty in a sum"))
def test_verification_runs_the_network_itself_far_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build_model, reference):
        monkeypatch.setattr(module, "look_far", lambda *_: None)
    net, clip = network(BY_PLACE[name][0]), torch.randn(1, 3, T)
    model = co3d.compile(net, (clip,))
    found = co3d.verify(model, net, (clip,))
    assert not model.info.recomputed and not found.passed
    assert re.match(
        r"Output 'output' is that of the network up to frame (15|19|20), and not from there on", found.reason
    )


def test_how_far_out_was_looked_at_is_said() -> None:
    net, clip = network(lambda m, x: x * places(x)), torch.randn(1, 3, T)
    assert "far out: counts and loops go on as in a clip up to frame 65,536" in str(co3d.compile(net, (clip,)).report())
    exported = torch.export.export(net, (clip,))
    assert "far out: that counts and loops go on as in a clip is assumed" in str(co3d.compile(exported).report())


def test_verification_knows_the_numbers_that_a_region_is_given() -> None:
    """The compiler draws them of either sign."""
    net, clip = network(lambda m, x: torch.minimum(x.abs(), (3.0 - places(x)).clamp(0))), torch.randn(1, 3, T)
    found = co3d.verify(co3d.compile(net, (clip,)), net, (clip,))
    assert not found.passed and "it does not depend on its input inside of a long clip" in found.reason


def test_a_result_that_never_changes_fails_where_nothing_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_regions, "check_shown", lambda *_: None)
    monkeypatch.setattr(long_regions, "wrong_inside", lambda *_: "")
    net, clip = network(BY_PLACE["tril"][0]), torch.randn(1, 3, T)
    found = co3d.verify(co3d.compile(net, (clip,)), net, (clip,))
    assert found.reason == (
        "Output 'output' does not depend on the input, and that of the untouched network does: inside of a long clip "
        "it is constant, and in a clip of the captured length it is not."
    )


def test_entries_behind_a_stride_are_fewer_than_clips_say_by_one() -> None:
    """Every third of 8, 16 and 65,536 frames: 3, 6 and 21,846; as rows of four 12, 24 and 87,384."""

    def rows(m: Any, x: Tensor) -> Tensor:
        y = m.lstm(x[:, :, ::3].mT)[0]
        return y.reshape(-1).relu().reshape(x.shape[0], -1, CHANNELS).mT

    net, clip = network(rows), torch.randn(1, 3, T)
    model = co3d.compile(net, (clip,))
    assert not model.info.recomputed and co3d.verify(model, net, (clip,)).passed
