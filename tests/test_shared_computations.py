"""What is computed of some frames, and again of the same frames later, is computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from marks import few
from torch import Tensor, nn
from zoo import Graph, randomise

import co3d_compile as co3d

CLIP = (1, 3, 12)
VIDEO = (1, 5, 3, 6, 6)


CLIP = (1, 3, 12)
VIDEO = (1, 5, 3, 6, 6)


def conv(kernel: int = 1, padding: int = 0, stride: int = 1, channels: int = 3) -> nn.Module:
    return nn.Conv1d(channels, 4, kernel, stride, padding)


def triples(order: tuple[int, ...]) -> nn.Module:
    """One block on frames 0 to 2, 1 to 3 and 2 to 4, and another one on its three results."""

    def forward(m: Any, x: Tensor) -> Tensor:
        frames = x.unbind(1)
        found = {i: frames[i + 1] - m.a(torch.cat(frames[i : i + 3], 1) * (1 + 0 * i)) for i in order}
        result: Tensor = torch.relu(m.b(found[0])) * m.b(found[1]) + m.b(found[2])
        return result

    a = nn.Sequential(nn.Conv2d(9, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    return Graph(forward, a=a, b=nn.Conv2d(3, 3, 1))


def merged() -> nn.Module:
    """The block on frames that are cut out of the channels, into which time was merged."""

    def forward(m: Any, x: Tensor) -> Tensor:
        frames = x.flatten(1, 2).split(3, 1)
        found = [frames[i + 1] - m.a(torch.cat(frames[i : i + 3], 1)) for i in range(3)]
        result: Tensor = m.b(torch.cat(found, 1))
        return result

    return Graph(forward, a=nn.Conv2d(9, 3, 3, padding=1), b=nn.Conv2d(9, 3, 1))


def differences() -> nn.Module:
    """A block on the frames but the first, and on those but the last."""
    return Graph(
        lambda m, x: m.b(torch.relu(m.a(x[:, :, 1:])) - torch.relu(m.a(x[:, :, :-1]))), a=conv(), b=conv(3, channels=4)
    )


def strided() -> nn.Module:
    """A stride: two calls are at the same phase of it, the third is not."""
    return Graph(lambda m, x: m.a(x[:, :, 2:]) * m.a(x[:, :, :-2]) + m.a(x[:, :, 1:-1]), a=conv(2, 0, 2))


def counting() -> nn.Module:
    """A count of the frames begins anew in each call."""

    def forward(m: Any, x: Tensor) -> Tensor:
        count = torch.arange(x.shape[2] - 1).float()
        result: Tensor = m.a(x[:, :, 1:] + count) * m.a(x[:, :, :-1] + count)
        return result

    return Graph(forward, a=conv())


def recurrent(kernel: int) -> nn.Module:
    """A recurrent layer reads the first entries too: of a padded convolution these are no others' later ones."""
    c = conv(kernel, kernel // 2)
    return Graph(lambda m, x: m.g((m.c(x[:, :, 1:]) * m.c(x[:, :, :-1])).mT)[0], c=c, g=nn.GRU(4, 4, batch_first=True))


def layers() -> nn.Module:
    """A recurrent layer that is called twice begins with another frame each time."""
    g = nn.GRU(3, 4, batch_first=True)
    return Graph(lambda m, x: m.g(x[:, :, 1:].mT)[0] * m.g(x[:, :, :-1].mT)[0], g=g)


@dataclass(frozen=True)
class Case:
    """A network, its clip, and the multiply-adds of its step."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    multiply_adds: int
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "triples": Case(lambda: triples((0, 1, 2)), VIDEO, 15876, {"time_dim": 1}),
    "triples backwards": Case(lambda: triples((2, 1, 0)), VIDEO, 15876, {"time_dim": 1}),
    "time merged into channels": Case(merged, VIDEO, 9720, {"time_dim": 1}),
    "differences": Case(differences, CLIP, 60),
    "two frames a step": Case(differences, CLIP, 120, {"frames_per_step": 2}),
    "exact ends": Case(differences, CLIP, 72, {"boundary": "exact"}),
    "strides": Case(strided, CLIP, 48),
    "dense strides": Case(strided, CLIP, 24, {"stride_mode": "dense"}),
    "counts": Case(counting, CLIP, 24),
    "recurrent": Case(lambda: recurrent(1), CLIP, 108),
    "recurrent behind padding": Case(lambda: recurrent(3), CLIP, 168),
    "two recurrent layers": Case(layers, CLIP, 132),
    "twice the same": Case(lambda: Graph(lambda m, x: m.a(x) * m.a(x), a=conv(3, 1)), CLIP, 36),
}


QUICK = ("triples", "two frames a step", "exact ends", "dense strides", "recurrent", "twice the same")


@pytest.mark.parametrize("name", few(CASES, *QUICK))
def test_calls_on_shifted_frames_are_one(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    clip = torch.rand(case.shape)
    net = randomise(case.net(), clip)
    compiled = co3d.compile(net, (clip,), **case.options)
    assert not compiled.info.recomputed
    assert co3d.verify(compiled, net, (clip,)).passed
    assert compiled.report().gmac_step * 1e9 == pytest.approx(case.multiply_adds)


def test_shared_results_have_one_memory() -> None:
    """Two delays of one result are one chain of states."""
    torch.manual_seed(0)
    net, clip = triples((0, 1, 2)).eval(), torch.rand(VIDEO)
    info = co3d.compile(net, (clip,), time_dim=1).info
    assert len(info.states) == 4, "two frames that come in, two results of the block"
