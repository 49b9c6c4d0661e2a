"""The networks of the tests of ``verify``, compiled once, and changes to what their files say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from small_graphs import backwards
from torch import Tensor, nn
from zoo import Graph, randomise

import co3d_compile as co3d
from co3d_compile.contract.model_contract import METADATA_KEY
from co3d_compile.contract.read_contract import parse

CLIP = (1, 4, 8)
VIDEO = (1, 3, 6, 5, 5)


def conv(kernel: int = 3, padding: int = 1, stride: int = 1, channels: int = 4) -> nn.Conv1d:
    return nn.Conv1d(channels, 4, kernel, stride, padding)


def squeeze(pool: Callable[[Tensor], Tensor]) -> nn.Module:
    """A convolution gated by a pool over its whole clip, and one behind it."""
    return Graph(
        lambda m, x: m.b((y := F.relu(m.a(x))) * torch.sigmoid(m.f(pool(y)))),
        a=nn.Conv3d(3, 4, 3, padding=1), b=nn.Conv3d(4, 4, 3, padding=1), f=nn.Conv3d(4, 4, 1),
    )  # fmt: skip


def squeeze_flat() -> nn.Module:
    """The gate's pool without a dim for time."""
    return Graph(
        lambda m, x: m.b((y := m.a(x)) * m.f(F.adaptive_avg_pool3d(y, 1).flatten(1)).view(-1, 4, 1, 1, 1)),
        a=nn.Conv3d(3, 4, 3, padding=1), b=nn.Conv3d(4, 4, 3, padding=1), f=nn.Linear(4, 4),
    )  # fmt: skip


def scale_and_shift() -> nn.Module:
    """What one pool gives is split in two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scale, shift = m.f((y := m.a(x)).mean((2, 3, 4), True)).split(4, 1)
        result: Tensor = m.b(y * scale + shift)
        return result

    a, b = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)
    return Graph(forward, a=a, b=b, f=nn.Conv3d(4, 8, 1))


def one_patch() -> nn.Module:
    """One patch over the whole clip, whose time has no dim of its own for a while, up-sampled again."""

    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = m.mix(m.patch(x).flatten(2).mT)
        low = tokens.view(x.shape[0], 1, 5, 5, 4).permute(0, 4, 1, 2, 3)
        result: Tensor = m.out(torch.cat([m.up(low), x], 1))
        return result

    patch, up = nn.Conv3d(3, 4, (6, 1, 1), (6, 1, 1)), nn.ConvTranspose3d(4, 3, (6, 1, 1), (6, 1, 1))
    return Graph(forward, patch=patch, up=up, mix=nn.Linear(4, 4), out=nn.Conv3d(6, 3, 3, padding=1))


def attend(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).transpose(1, 2)
    return torch.softmax(m.q(y) @ m.k(y).transpose(1, 2), 2) @ y


def difference_by_split(x: Tensor) -> Tensor:
    """Its first entry, cut off, gives zeros their shape alone."""
    first, later = torch.split(x, [1, x.shape[2] - 1], 2)
    return torch.cat([torch.zeros_like(first), later - x[:, :, :-1]], 2)


def later_rows(x: Tensor) -> Tensor:
    """The index of every entry but the first, wherever it is."""
    return torch.arange(1, x.shape[2]).expand_as(x[:, :, 1:])


def counts(x: Tensor) -> Tensor:
    """How many values of a frame fall into each of five bins: a window from the input on, and constants like it."""
    bins = (2 * x + 2).long().clamp(0, 4)
    return torch.zeros(*x.shape[:2], 5).scatter_add(2, bins, torch.ones_like(x))


def moved(y: Tensor) -> Tensor:
    """Half of the channels comes from the next frame, half from the one before, written into zeros."""
    frames = y.unsqueeze(0)
    result = torch.zeros_like(frames)
    result[:, :-1, :2], result[:, 1:, 2:] = frames[:, 1:, :2], frames[:, :-1, 2:]
    return result.flatten(0, 1)


def by_strongest_frequencies(m: Any, x: Tensor) -> Tensor:
    """Two convolutions, weighted by the two strongest frequencies of all clips."""
    spectrum = torch.fft.rfft(x.mT, dim=1).abs()
    strength = spectrum.mean(0).mean(-1)
    strength[0] = 0
    weight = spectrum.mean(-1)[:, strength.topk(2)[1]].softmax(1)
    result: Tensor = (torch.stack([m.a(x), m.b(x)], -1) * weight[:, None, None]).sum(-1)
    return result


def written_in_turn(m: Any, x: Tensor) -> Tensor:
    """Two halves, of every second entry each, are written into memory that nobody has filled."""
    result = torch.empty_like(x)
    result[:, :, ::2], result[:, :, 1::2] = m.a(x[:, :, ::2]), m.b(x[:, :, 1::2])
    return result


def states_side_by_side(m: Any, x: Tensor) -> Tensor:
    """Neighbours among the states of a loop, joined as features that weigh each other."""
    h, states, out = x.new_zeros(x.shape[0], 4), [], []
    for t in range(x.shape[2]):
        h = torch.tanh(m.mix(x[:, :, t]) + h)
        states.append(h)
    for i in range(1, x.shape[2] - 1):
        y = torch.cat(states[i - 1 : i + 2], 1)
        out.append(m.out(y * torch.sigmoid(m.weigh(y))))
    return torch.stack(out, 2)


def across_blocks(m: Any, x: Tensor) -> Tensor:
    """A recurrent layer from block to block, of blocks of 4 that overlap by 2, as dual-path networks have it."""
    halves = torch.cat([x[:, :, :-2].unflatten(2, (-1, 4)), x[:, :, 2:].unflatten(2, (-1, 4))], 3)
    blocks = halves.flatten(2).unflatten(2, (-1, 4)).permute(0, 3, 2, 1)
    result: Tensor = m.r(blocks.flatten(0, 1))[0].unflatten(0, (-1, 4)).mean(1)
    return result


def overlapped(m: Any, x: Tensor) -> Tensor:
    """Frames that are added where they overlap, and divided by the sum of their windows, as in Vocos."""
    frames, window = x.shape[2], torch.hann_window(6)
    sizes = {"output_size": (1, 2 * frames + 4), "kernel_size": (1, 6), "stride": (1, 2)}
    added = F.fold(x * window[:, None], **sizes)[:, 0, 0, 2:-2]
    weights = F.fold(window.square().expand(1, frames, -1).transpose(1, 2), **sizes).squeeze()[2:-2]
    return added / weights


# name: factory, clip shapes, options
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "residual": (lambda: Graph(lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(), b=conv(5, 2)), (CLIP,), {}),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(3, 1, 1)),
        (VIDEO,), {},
    ),
    "batch norm, of frames side by side": (
        lambda: Graph(lambda m, x: m.b(m.a(x.flatten(1, 2))).relu(), a=nn.Conv2d(18, 4, 3), b=nn.BatchNorm2d(4)),
        (VIDEO,), {},
    ),
    "mean gate, frame": (lambda: squeeze(lambda y: y.mean((2, 3, 4), True)), (VIDEO,), {}),
    "mean gate, window": (lambda: squeeze(lambda y: y.mean((2, 3, 4), True)), (VIDEO,), {"pool_scope": "window"}),
    "mean gate, recompute": (lambda: squeeze(lambda y: y.mean((2, 3, 4), True)), (VIDEO,), {"pool_scope": "recompute"}),
    "max gate, frame": (lambda: squeeze(lambda y: F.adaptive_max_pool3d(y, 1)), (VIDEO,), {}),
    "max gate, window": (lambda: squeeze(lambda y: F.adaptive_max_pool3d(y, 1)), (VIDEO,), {"pool_scope": "window"}),
    "whole kernel gate": (lambda: squeeze(lambda y: F.avg_pool3d(y, y.shape[2:])), (VIDEO,), {}),
    "flat gate": (squeeze_flat, (VIDEO,), {}),
    "scale and shift": (scale_and_shift, (VIDEO,), {}),
    "one patch": (one_patch, (VIDEO,), {}),
    "group norm, window": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv3d(4, 4, 3)), ((1, 3, 8, 6, 6),),
        {"pool_scope": "window"},
    ),
    "norm and dropout, window": (  # a gate and, behind it, what is left out of the graph
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4), nn.Dropout(), nn.Conv3d(4, 4, 3)),
        ((1, 3, 8, 6, 6),), {"pool_scope": "window"},
    ),
    "strides": (
        lambda: Graph(
            lambda m, x: m.l((m.s(y := F.relu(m.a(x))) + m.b(y)).mean(2)),
            a=conv(3, 1, 2), b=conv(3, 1, 2), s=conv(1, 0, 2), l=nn.Linear(4, 3),
        ),
        ((1, 4, 16),), {},
    ),
    "a pool of the two entries that are left, beside a stride": (
        lambda: Graph(
            lambda m, x: m.l(torch.cat([m.b(y := F.relu(m.a(x))), F.avg_pool1d(y, 2)], 1).mean(2)),
            a=conv(3, 1, 2), b=conv(3, 1, 2), l=nn.Linear(8, 3),
        ),
        ((1, 4, 4),), {},
    ),
    "dense": (lambda: nn.Sequential(conv(3, 1, 2), nn.ReLU(), conv(3, 1, 2), conv()), ((1, 4, 16),),
              {"stride_mode": "dense"}),
    "dense head": (lambda: Graph(lambda m, x: m.a(x).mean(2), a=conv(3, 1, 2)), ((1, 4, 16),),
                   {"stride_mode": "dense", "frames_per_step": 3}),
    "mean head": (lambda: Graph(lambda m, x: m.l(m.a(x).mean(2)), a=conv(), l=nn.Linear(4, 3)), (CLIP,), {}),
    "whole kernel head, window 20": (
        lambda: Graph(lambda m, x: m.l(F.avg_pool1d(m.a(x), 8, 1).flatten(1)), a=conv(), l=nn.Linear(4, 3)), (CLIP,),
        {"window": 20},
    ),
    "linear over time": (lambda: Graph(lambda m, x: m.l(m.a(x).flatten(1)), a=conv(), l=nn.Linear(32, 3)), (CLIP,), {}),
    "attention": (lambda: Graph(attend, a=conv(), q=nn.Linear(4, 4), k=nn.Linear(4, 4)), (CLIP,), {}),
    "two inputs": (lambda: Graph(lambda m, x, y: m.a(x) + y, a=conv()), (CLIP, CLIP), {}),
    "the second input alone": (lambda: Graph(lambda m, x, y: m.a(y), a=conv()), (CLIP, CLIP), {}),
    "two rates": (
        lambda: Graph(lambda m, x, y: torch.cat([m.a(x).mean(2), m.b(y).mean(2)], 1), a=conv(), b=conv(5, 2)),
        (CLIP, (1, 4, 32)), {},
    ),
    "circular pads over time and places": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), ((1, 4, 8, 6),), {}),
    "frames mirrored at the ends, more than a clip has": (
        lambda: Graph(
            lambda m, x: m.a(x[:, :, [*range(5, 0, -1), *range(8), *range(6, 1, -1)]]), a=nn.Conv1d(4, 4, 11),
        ),
        (CLIP,), {},
    ),
    "a mean over padding in front": (lambda: Graph(lambda m, x: F.pad(m.a(x), (2, 0)).mean(2), a=conv()), (CLIP,), {}),
    "the last entry behind padding": (lambda: Graph(
        lambda m, x: F.pad(m.a(x), (1, 2))[:, :, -1] + x.mean(2), a=conv()), (CLIP,), {}),
    "two outputs": (lambda: Graph(lambda m, x: (m.a(x), m.b(x).mean(2)), a=conv(), b=conv(5, 2)), (CLIP,), {}),
    "last entry": (lambda: Graph(lambda m, x: m.a(x)[:, :, -1], a=conv()), (CLIP,), {}),
    "last entry of a long clip": (lambda: Graph(lambda m, x: m.a(x)[:, :, -1], a=conv()), ((1, 4, 24),), {}),
    "last entry by a slice": (lambda: Graph(lambda m, x: m.a(x)[:, :, -1:], a=conv()), ((1, 4, 13),), {}),
    "last entry sorted": (lambda: Graph(lambda m, x: m.a(x)[:, :, -1:].sort(2)[0], a=conv()), (CLIP,), {}),
    "last entry turned round": (
        lambda: Graph(lambda m, x: torch.cat([(y := m.a(x))[:, :, :6], y[:, :, 7:].flip(2)], 2), a=conv()), (CLIP,), {},
    ),
    "gate beside differences": (
        lambda: Graph(lambda m, x: ((y := m.a(x))[:, :, 1:] - y[:, :, :-1]) * x.mean(2, True).sigmoid(), a=conv()),
        (CLIP,), {},
    ),
    "gates of single entries": (
        lambda: Graph(lambda m, x: torch.cat([f * x.mean(2, True).sigmoid() for f in m.a(x).split(1, 2)], 2), a=conv()),
        (CLIP,), {},
    ),
    "lstm": (lambda: Graph(lambda m, x: m.r(x.transpose(1, 2))[0], r=nn.LSTM(4, 5, batch_first=True)), (CLIP,), {}),
    "lstm, last hidden": (
        lambda: Graph(lambda m, x: m.r(F.relu(m.a(F.pad(x, (2, 0)))).transpose(1, 2))[1][0],
                      a=conv(3, 0), r=nn.LSTM(4, 5, batch_first=True)), (CLIP,), {},
    ),
    "across blocks": (lambda: Graph(across_blocks, r=nn.GRU(4, 4, batch_first=True)), ((1, 4, 18),), {}),
    "cumulative sum": (lambda: Graph(lambda m, x: m.a(F.pad(x, (2, 0))).cumsum(2), a=conv(3, 0)), (CLIP,), {}),
    "up and down": (
        lambda: nn.Sequential(conv(4, 1, 2), nn.ReLU(), nn.Upsample(scale_factor=2, mode="linear")), ((1, 4, 16),), {},
    ),
    "mean of what is up-sampled": (
        lambda: Graph(lambda m, x: m.l((x + F.interpolate(F.max_pool1d(m.a(x), 4), scale_factor=4)).mean(2)),
                      a=conv(), l=nn.Linear(4, 3)), ((1, 4, 16),), {},
    ),
    "difference by split": (
        lambda: Graph(lambda m, x: m.a(difference_by_split(x)), a=conv()),
        (CLIP,), {},
    ),
    "taken off the next entry, by its index": (
        lambda: Graph(lambda m, x: m.a(x.index_add(2, torch.arange(1, x.shape[2]), x[:, :, :-1], alpha=-1)), a=conv()),
        (CLIP,), {},
    ),
    "added to the next entry, by as many indices": (
        lambda: Graph(lambda m, x: m.a(torch.zeros_like(x).scatter_add(2, later_rows(x), x[:, :, :-1])), a=conv()),
        (CLIP,), {},
    ),
    "copies of the last entry": (
        lambda: Graph(lambda m, x: torch.cat([y := m.a(x), y[:, :, -1:].expand(-1, -1, 3)], 2), a=conv()),
        (CLIP,), {},
    ),
    "masked behind its length": (
        lambda: Graph(lambda m, x, n: m.a(x * (torch.arange(x.shape[2]) < n)[:, None]), a=conv()), (CLIP, (1, 1)),
        {"time_dim": [2, None]},
    ),
    "masked behind its length, mean": (
        lambda: Graph(lambda m, x, n: m.a(x.masked_fill(torch.arange(x.shape[2]) >= n[:, None], 0)).mean(2), a=conv()),
        (CLIP, (1, 1)), {"time_dim": [2, None]},
    ),
    "strongest frequencies": (lambda: Graph(by_strongest_frequencies, a=conv(), b=conv(5, 2)), (CLIP,), {}),
    "determinants": (
        lambda: Graph(lambda m, x: m.a(x).mean(1) * torch.linalg.det(x.mT.unflatten(2, (2, 2))), a=conv()),
        (CLIP,), {},
    ),
    "times a count of ones": (lambda: Graph(lambda m, x: m.a(x) * torch.ones_like(x).cumsum(2), a=conv()), (CLIP,), {}),
    "every third entry negated": (
        lambda: Graph(lambda m, x: torch.where(torch.arange(x.shape[2]) % 3 == 0, y := m.a(x), -y), a=conv()),
        ((1, 4, 12),), {},
    ),
    "a loop backwards, behind repeated frames": (
        lambda: Graph(lambda m, x: backwards(m.a(x).repeat_interleave(2, 2)), a=conv()), (CLIP,), {},
    ),
    "last states of a layer over windows of frames": (
        lambda: Graph(lambda m, x: m.r(m.a(x).unfold(2, 3, 1).permute(0, 2, 3, 1).flatten(0, 1))[1][-1]
                      .unflatten(0, (x.shape[0], -1)), a=conv(), r=nn.GRU(4, 4, batch_first=True)), (CLIP,), {},
    ),
    "a last state, behind repeated frames": (
        lambda: Graph(lambda m, x: m.r(m.a(x).repeat_interleave(2, 2).mT)[1][-1], a=conv(),
                      r=nn.GRU(4, 4, batch_first=True)), (CLIP,), {},
    ),
    "crops": (lambda: Graph(lambda m, x: x[:, :, 1:-1] + m.a(x[:, :, :]), a=conv(3, 0)), (CLIP,), {}),
    "folded time": (
        lambda: Graph(lambda m, x: m.a(m.l(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 8)).transpose(1, 2)),
                      a=conv(), l=nn.Linear(4, 4)), ((2, 4, 8),), {},
    ),
    "four frames a step": (lambda: nn.Sequential(conv(), nn.ReLU(), conv(5, 2)), (CLIP,), {"frames_per_step": 4}),
    "repeated frames of several places, four a step": (
        lambda: Graph(lambda m, x: m.a(x.repeat_interleave(2, 2).permute(0, 3, 1, 2).flatten(0, 1)), a=conv()),
        ((1, 4, 8, 3),), {"frames_per_step": 4},
    ),
    "padded by more than an average pool reads": (
        lambda: Graph(lambda m, x: F.avg_pool2d(F.pad(m.a(x)[:, :, None], (0, 0, 2, 2)), (3, 1), (2, 1), (1, 0)),
                      a=conv()), (CLIP,), {},
    ),
    "added at a place of each row": (lambda: Graph(at_largest_places, a=conv()), (CLIP,), {}),
    "frames of computed columns": (
        lambda: Graph(lambda m, x: torch.stack([y.index_select(2, y[0, 0].topk(1)[1]) for y in m.a(x)
                      .unflatten(1, (2, 2)).unbind(3)], 3), a=conv()), (CLIP,), {},
    ),
    "a mask for as many entries as a stride leaves": (
        lambda: Graph(lambda m, x: m.a(x) * F.interpolate(torch.ones_like(x[:, :1]), size=x.shape[2] // 2),
                      a=conv(3, 1, 2)), (CLIP,), {},
    ),
    "counts of values": (lambda: Graph(lambda m, x: m.l(counts(x)), l=nn.Linear(5, 3)), ((1, 7, 12),), {"time_dim": 1}),
    "channels moved over time": (
        lambda: Graph(lambda m, x: moved(m.a(x[0])).mean(0, True), a=nn.Conv2d(4, 4, 3, padding=1)),
        ((1, 6, 4, 5, 5),), {"time_dim": 1},
    ),
    "a clip without its batch": (
        lambda: Graph(lambda m, x: m.b(m.a(x[0]).relu())[None], a=conv(), b=conv()), (CLIP,), {},
    ),
    "written in turn": (lambda: Graph(written_in_turn, a=conv(), b=conv()), ((1, 4, 16),), {}),
    "the first two frames": (lambda: Graph(lambda m, x: x[:, :, 0] + x[:, :, 1] * 2), ((1, 4, 12),), {}),
    "states of a loop, side by side": (
        lambda: Graph(states_side_by_side, mix=nn.Linear(4, 4), weigh=nn.Linear(12, 12), out=nn.Linear(12, 3)),
        (CLIP,), {},
    ),
    "no state": (lambda: nn.Conv3d(3, 4, (1, 3, 3)), (VIDEO,), {}),
    "divided by the sum of its windows": (lambda: Graph(overlapped), ((1, 6, 16),), {}),
}  # fmt: skip


def at_largest_places(m: Any, x: Tensor) -> Tensor:
    """Adds a number at a place of each frame, in one long row of all frames."""
    y = m.a(x).mT.flatten(0, 1)
    largest = y.argmax(1) + torch.arange(y.shape[0]) * y.shape[1]
    return y.flatten().index_put((largest,), y.amin(1), accumulate=True).view(x.shape[0], -1, y.shape[1]).mT


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    factory, shapes, options = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    example = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    return randomise(factory(), *example), example, options


@cache
def compiled(name: str) -> co3d.CompiledModel:
    module, example, options = build(name)
    return co3d.compile(module, example, **options)


def saved(name: str, folder: Path) -> tuple[Path, nn.Module, tuple[Tensor, ...]]:
    module, example, _ = build(name)
    return compiled(name).save(folder / "model.onnx"), module, example


def rewrite(path: Path, **changes: Any) -> None:
    """Puts other claims into a file."""
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = replace(parse(entry.value), **changes).to_json()
    onnx.save(model, path)


def contract(path: Path) -> Any:
    return next(parse(e.value) for e in onnx.load(path).metadata_props if e.key == METADATA_KEY)
