"""Networks that treat a frame by its place in the clip: they stream what clips as captured show, or a window.

The oracle is the untouched network on each clip of the captured length in a longer piece of frames. What streams is one
entry of each of these clips, always the same one; a window is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from marks import few
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d
from co3d_compile.compiler import local_regions
from co3d_compile.verification import long_regions

T, FRAMES, CHANNELS = 8, 30, 4
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
    "no more than a ramp that ends behind the clip": (
        lambda m, x: torch.minimum(x.abs(), (12.0 - places(x)).clamp(0)),
        WINDOW,
    ),
    "on a ramp as long as the clip": (lambda m, x: x * torch.linspace(0, 1, x.shape[2]), WINDOW),
    "faded out": (lambda m, x: x * torch.exp(-20.0 * places(x)), WINDOW),
    "counted in ones": (lambda m, x: x * (torch.ones_like(x).cumsum(2) < 4), WINDOW),
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
    net = Graph(lambda m, x: forward(m, m.first(x)), first=first, **layers)
    net.register_parameter("places", nn.Parameter(torch.randn(1, CHANNELS, 32)))
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
