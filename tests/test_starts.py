"""A start of its own: first entries that are computed in another way than those behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import check, open_session
from small_graphs import conv, fn, row, up
from torch import Tensor, nn
from unlike_streams import streams
from zoo import Entry
from zoo.autoencoders import AUTOENCODERS

import co3d_compile as co3d

pytestmark = pytest.mark.slow

CLIP = 13


def replicated(x: Tensor, n: int) -> Tensor:
    return torch.cat([*[x[:, :, :1]] * n, x], 2)


def causal(m: Any, x: Tensor) -> Tensor:
    return m(replicated(x, m.kernel_size[0] - 1))


def halved(x: Tensor) -> Tensor:
    """The first entry as it is, the others averaged two by two."""
    return torch.cat([x[:, :, :1], F.avg_pool1d(x[:, :, 1:], 2, 2)], 2)


def doubled(x: Tensor) -> Tensor:
    """The first entry as it is, each of the others twice."""
    first, rest = x[:, :, 0], x[:, :, 1:]
    return torch.cat([first[:, :, None], F.interpolate(rest, scale_factor=2.0)], 2)


def last_halves(x: Tensor) -> Tensor:
    first, rest = x.split((1, x.shape[2] - 1), 2)
    return torch.cat([first, rest[:, :, 1::2] + rest[:, :, :-1:2]], 2)


def written(x: Tensor) -> Tensor:
    y = torch.tanh(x) * 2
    y[:, :, :2] = x[:, :, :2].flip(1)
    return y


def between(join: Callable[[Any, Tensor], Tensor], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Convolutions before and behind."""
    return fn(lambda m, x: m.z(F.relu(join(m, F.relu(m.a(x))))), a=lambda: conv(2), z=lambda: conv(3), **layers)


def case(name: str, factory: Callable[[], nn.Module], delay: int | None, late: int | None, *lengths: int) -> Any:
    """A network, its delay in a stream and with ends, and the lengths of clips that it takes."""
    (entry, _), mark = row(name, factory, delay, (1, 4, CLIP)).values, row(name, factory, delay).id
    return pytest.param(entry, delay, late, lengths or (8, 13, 16), id=mark)


ODD = (9, 13, 17, 25)
STARTS = [
    case("another operator", between(lambda m, x: torch.cat([x[:, :, :1] * 2, x[:, :, 1:] + 1], 2)), 3, 3),
    case("the same operator", between(lambda m, x: torch.cat([m.b(x[:, :, :1]), m.b(x[:, :, 1:])], 2),
                                      b=lambda: conv(1)), 3, 3),
    case("by split", between(lambda m, x: torch.cat([(p := x.split((1, x.shape[2] - 1), 2))[0] * 2, p[1]], 2)), 3, 3),
    case("by narrow", between(lambda m, x: torch.cat([x.narrow(2, 0, 2).exp(), x.narrow(2, 2, x.shape[2] - 2)], 2)),
         3, 4),
    case("by select", between(lambda m, x: torch.cat([x[:, :, 0].flip(1).unsqueeze(2), x[:, :, 1:]], 2)), 3, 3),
    case("by write", between(lambda m, x: written(x)), 3, 4),
    case("first one left out", between(lambda m, x: torch.cat([x[:, :, 1:2], x[:, :, 2:]], 2)), 4, 4),
    case("a difference in front", between(lambda m, x: torch.cat([x[:, :, 1:2] - x[:, :, :1], x[:, :, 1:]], 2)), 3, 4),
    case("reflected in front", between(lambda m, x: torch.cat([x[:, :, 1:3].flip(2), x], 2)), 1, 5),
    case("padded convolution of three", between(lambda m, x: torch.cat([m.b(x[:, :, :3]), m.c(x[:, :, 2:])], 2),
         b=lambda: conv(padding=1), c=lambda: conv(2)), 3, 5),
    case("attention in the start", between(lambda m, x: torch.cat([F.scaled_dot_product_attention(
         *[x[:, :, :4].mT] * 3).mT, x[:, :, 4:]], 2)), 3, 6),
    case("joined of several", between(lambda m, x: torch.cat([m.b(torch.cat([x[:, :, :1] * 2, x[:, :, 1:2] + 1], 2)),
         x[:, :, 1:]], 2), b=lambda: conv(2)), 3, 4),
    case("zeros and a start", between(lambda m, x: torch.cat([x.new_zeros(x.shape[0], 4, 1), x[:, :, :2] * 2, x], 2)),
         0, 4),
    case("start and end", between(lambda m, x: torch.cat([x[:, :, :1] * 2, x, x[:, :, -1:]], 2)), 2, 3),
    case("of the result", fn(lambda m, x: torch.cat([x[:, :, :1] * 2, m.a(x)[:, :, 1:]], 2), a=lambda: conv(padding=1)),
         1, 1),
    case("longer than what it is of", between(lambda m, x: torch.cat([m.b(x[:, :, :1]), x[:, :, 2:]], 2),
         b=lambda: up(3, 1)), 2, 3),
    case("of two", between(lambda m, x: torch.cat([x[:, :, :1] * m.b(x)[:, :, :1], x[:, :, 1:]], 2),
         b=lambda: conv(padding=1)), 3, 4),
    case("used again", between(lambda m, x: torch.cat([(f := x[:, :, :1]) * 2, x[:, :, 1:]], 2) * torch.cat(
         [f, x[:, :, :-1]], 2)), 3, 4),
    case("twice", between(lambda m, x: torch.cat([(y := torch.cat([x[:, :, :1] * 2, x[:, :, 1:] + 1], 2))[:, :, :1]
         - 1, y[:, :, 1:] * 3], 2)), 3, 3),
    case("one for two", between(lambda m, x: torch.cat([(f := torch.tanh(x[:, :, :1])), x[:, :, 1:]], 2)
         * torch.cat([f + 1, x[:, :, 1:] - 1], 2)), 3, 3),
    case("halves", between(lambda m, x: halved(x)), 2, 2, *ODD),
    case("halves of a stride", between(lambda m, x: last_halves(x)), 2, 2, *ODD),
    case("doubles", between(lambda m, x: doubled(x)), 5, 5),
    case("encoder", fn(lambda m, x: causal(m.c, halved(F.silu(causal(m.b, halved(causal(m.a, x)))))),
         a=conv, b=conv, c=conv), 0, 0, *ODD),
    case("decoder", fn(lambda m, x: causal(m.c, doubled(F.silu(causal(m.b, doubled(causal(m.a, x)))))),
         a=conv, b=conv, c=conv), 3, 3, 3, 4, 7),
    case("encoder and decoder", fn(lambda m, x: causal(m.c, doubled(causal(m.b, halved(causal(m.a, x))))),
         a=conv, b=conv, c=conv), 1, 1, *ODD),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "delay", "late", "lengths"), STARTS)
def test_behind_its_start_it_is_a_stream(entry: Entry, delay: int, late: int, lengths: tuple[int, ...]) -> None:
    facts = check(replace(entry, tight=False))
    assert not facts.recomputed
    assert facts.delays == (delay,)


@pytest.mark.parametrize(("entry", "delay", "late", "lengths"), STARTS)
def test_with_ends_it_begins_as_the_clip_does(entry: Entry, delay: int, late: int, lengths: tuple[int, ...]) -> None:
    module = entry.build()
    compiled = co3d.compile(module, entry.examples(), boundary="exact")
    assert not compiled.report().recomputed
    assert tuple(compiled.info.delays.values()) == (late,)
    streams(module, module, list(lengths), CLIP)


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("name", ["another operator", "encoder", "decoder"])
def test_what_is_said_is_verified(name: str, boundary: str) -> None:
    (entry,) = (p.values[0] for p in STARTS if p.values[0].name == name)
    compiled = co3d.compile(entry.build(), entry.examples(), boundary=boundary)
    assert co3d.verify(compiled, entry.build(), entry.examples()).passed


def test_what_begins_behind_a_start_is_compared_behind_its_padding() -> None:
    """A convolution on the frames from the second one on pads in front of that one."""
    module = fn(
        lambda m, x: m.c(torch.cat([m.a(x[:, :, :1]), m.b(x[:, :, 1:])], 2)),
        a=lambda: conv(padding=1), b=lambda: conv(padding=1), c=lambda: conv(5, padding=2),
    )().eval()  # fmt: skip
    clip = (torch.randn(1, 4, CLIP),)
    streams(module, module, [CLIP, CLIP + 3], CLIP)
    assert co3d.verify(co3d.compile(module, clip, boundary="exact"), module, clip).passed


def remembering(join: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        return m.lstm(join(m, m.a(F.pad(x, (1, 0)))).transpose(1, 2))[0].transpose(1, 2)

    torch.manual_seed(0)
    return fn(forward, a=lambda: conv(2), lstm=lambda: nn.LSTM(4, 4, batch_first=True))().eval()


def test_what_remembers_for_good_remembers_the_start() -> None:
    module = remembering(lambda m, x: torch.cat([x[:, :, :1] * 3, x[:, :, 1:]], 2))
    clip = torch.randn(1, 4, CLIP)
    session = open_session(co3d.compile(module, (clip,)))
    got = np.stack([session.step(clip[:, :, t].numpy()) for t in range(CLIP)], 2)
    with torch.no_grad():
        np.testing.assert_allclose(got, module(clip).numpy(), atol=1e-5)
    streams(module, module, [8, 13])


def test_what_remembers_for_good_waits_for_a_start_that_is_late() -> None:
    module = remembering(lambda m, x: torch.cat([x[:, :, :3].flip(2), x[:, :, 3:]], 2))
    clip = torch.randn(1, 4, CLIP)
    session = open_session(co3d.compile(module, (clip,)))
    (delay,) = session.info.delays.values()
    got = np.stack([session.step(clip[:, :, t].numpy()) for t in range(CLIP)], 2)
    with torch.no_grad():
        np.testing.assert_allclose(got[:, :, delay:], module(clip).numpy()[:, :, : CLIP - delay], atol=1e-5)
    streams(module, module, [8, 13])


# None of them is a start in front of a stream: each is computed on the newest clip.
NO_START: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in another order": lambda m, x: torch.cat([x[:, :, 1:], x[:, :, :1] * 2], 2),
    "as long as the rest": lambda m, x: torch.cat([m.b(x[:, :, :6]), x[:, :, 7:] * 2], 2),
    "three chunks": lambda m, x: torch.cat([torch.tanh(m.b(p)) for p in x.split(5, 2)], 2),
    "of all entries": lambda m, x: torch.cat([x.mean(2, keepdim=True), x], 2),
    "of the last ones": lambda m, x: torch.cat([x[:, :, -2:] * 2, x], 2),
    "joined to a window": lambda m, x: torch.cat([x[:, :, :1] * 2, x.softmax(2)[:, :, 1:]], 2),
    "before a window and an end": lambda m, x: torch.cat([x[:, :, :1] * 2, x.softmax(2)[:, :, 1:], x[:, :, -1:]], 2),
    "twice the clip": lambda m, x: torch.cat([x, x], 2),
    "before its mirror image": lambda m, x: torch.cat([x, x.flip(2)], 2),
    "even entries before odd ones": lambda m, x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 2),
    "halves in the other order": lambda m, x: torch.cat([*reversed(x[:, :, 1:].relu().chunk(2, 2))], 2),
    "the last entries before the others": lambda m, x: torch.cat([x[:, :, -3:], x[:, :, :-3]], 2),
    "before every other entry": lambda m, x: torch.cat([x, x[:, :, ::2]], 2),
    "met by a window": lambda m, x: torch.cat([x[:, :, :1] * x.flip(2)[:, :, :1], x[:, :, 1:]], 2),
}


@pytest.mark.parametrize("name", NO_START)
@pytest.mark.parametrize("boundary", ["stream", "exact"])
def test_what_is_no_start_is_a_window(name: str, boundary: str) -> None:
    module = fn(lambda m, x: NO_START[name](m, m.a(x)), a=lambda: conv(), b=lambda: conv(padding=1))().eval()
    compiled = co3d.compile(module, (torch.randn(1, 4, CLIP),), boundary=boundary)
    assert compiled.report().recomputed
    assert co3d.verify(compiled, module, (torch.randn(1, 4, CLIP),)).passed


@pytest.mark.parametrize("entry", AUTOENCODERS, ids=lambda entry: entry.name)
def test_causal_autoencoders_stream(entry: Entry) -> None:
    facts = check(entry, steps=None)
    assert not facts.recomputed
    report = co3d.compile(entry.build(), entry.examples()).report()
    latents = entry.shapes[0][2] if "decoder" in entry.name else (entry.shapes[0][2] + 3) // 4
    assert report.gmac_step <= 1.5 * report.gmac_clip / latents


class Tokens(nn.Module):
    """A learned entry, or two, in front of frames (N, T, 4) and what remembers them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 2, 4))
        self.lstm, self.gru = nn.LSTM(4, 5, batch_first=True), nn.GRU(4, 4, 2, batch_first=True)
        self.cell, self.linear = nn.GRUCell(4, 4), nn.Linear(4, 4)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)

    def joined(self, x: Tensor, two: bool = False) -> Tensor:
        return torch.cat([(self.two if two else self.one).expand(x.shape[0], -1, -1), x], 1)

    def loop(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            out.append(h)
        return torch.stack(out, 1)


TOKENS = {
    "in front of an LSTM": (lambda m, x: m.lstm(m.joined(x))[0], 0),
    "cut off behind it": (lambda m, x: m.lstm(m.joined(x))[0][:, 1:], 1),
    "repeated, in place of the last frame": (
        lambda m, x: m.lstm(torch.cat([m.one.repeat(x.shape[0], 1, 1), x[:, :-1]], 1))[0],
        0,
    ),
    "two, before two layers": (lambda m, x: m.gru(m.joined(x, two=True))[0][:, 2:], 2),
    "behind a linear layer": (lambda m, x: m.gru(F.relu(m.linear(m.joined(x))))[0], 0),
    "summed": (lambda m, x: m.joined(x).cumsum(1), 0),
    "in front of a loop": (lambda m, x: m.loop(m.joined(x)), 0),
    "in front of a loop, cut off": (lambda m, x: m.loop(m.joined(x))[:, 1:], 1),
}


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("name", TOKENS)
def test_a_learned_entry_in_front_of_frames_is_remembered(name: str, boundary: str) -> None:
    forward, delay = TOKENS[name]
    module = Tokens(forward).eval()
    compiled = co3d.compile(module, torch.randn(2, 8, 4), time_dim=1, boundary=boundary)
    assert not compiled.report().recomputed
    assert tuple(compiled.info.delays.values()) == (delay,)
    x = torch.randn(2, 20, 4)
    session = open_session(compiled, batch=2)
    got = np.stack([session.step(x[:, t].numpy()) for t in range(20)], 1)
    with torch.no_grad():
        np.testing.assert_allclose(got[:, delay:], module(x).numpy()[:, : 20 - delay], atol=1e-5)
