"""The kinds of compiled models that targets are tried on: each has another kind of layer, state, input or output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from local_networks import LOCAL
from local_networks import network as with_part
from loop_filters import smoothed_from_the_first_frame
from loop_nets import conv_lstm, gru_cell, last_frames_in_a_tensor, selective_scan
from loop_network import PICTURES, SERIES, Forward, Network
from torch import Tensor, nn
from zoo import Graph
from zoo.fourier import FOURIER
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.contract.model_contract import resolve

Values: TypeAlias = "dict[str, np.ndarray[Any, Any]]"
VIDEO, ROW = (1, 3, 6, 6, 6), (1, 4, 12)
STEPS = 6  # beyond the warm-up
BOXES = (2, 3, 0, 1)  # boxes that come with one step and the next


@dataclass(frozen=True)
class Kind:
    """A small network and how it is compiled.

    Attributes:
        has: What of it targets may not be able to hold, for the page.
        build: Makes the network.
        shapes: Of the inputs of its clip.
        options: Keyword arguments of ``co3d.compile``.
        batch: Streams that advance together.
        dtypes: Of the inputs; none where all are float32.
    """

    has: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (VIDEO,)
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    dtypes: tuple[torch.dtype, ...] = ()

    def clip(self) -> tuple[Tensor, ...]:
        """The example."""
        generator = torch.Generator().manual_seed(1)
        dtypes = self.dtypes or (torch.float32,) * len(self.shapes)
        return tuple(_random(s, d, generator) for s, d in zip(self.shapes, dtypes, strict=True))


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    return torch.randint(0, 256, shape, generator=generator, dtype=dtype)


def small() -> nn.Module:
    """Convolutions of as many channels as fill a block of any processor's kernels, a head over the window."""
    layers = nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5))


def _of_zoo(has: str, name: str, batch: int = 1, **options: Any) -> Kind:
    entry = SMALL[name]
    return Kind(has, entry.build, entry.shapes, {"time_dim": entry.time_dim, **entry.options, **options}, batch)


def _loop(has: str, forward: Forward, shape: tuple[int, ...] = SERIES, **options: Any) -> Kind:
    return Kind(has, lambda: Network(forward), (shape,), {"time_dim": 1, **options}, batch=2)


def _local(has: str, part: str, **options: Any) -> Kind:
    return Kind(has, lambda: with_part(LOCAL[part][0]()), ((1, 4, 16),), options)


def _row(has: str, forward: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...] = ROW, **options: Any) -> Kind:
    """Between two convolutions over time."""

    def build() -> nn.Module:
        around = {"first": nn.Conv1d(4, 4, 3, padding=1), "last": nn.Conv1d(4, 4, 3, padding=1)}
        return Graph(lambda m, x: m.last(F.relu(forward(m, F.relu(m.first(x))))), **around, more=nn.Conv1d(4, 8, 1))

    return Kind(has, build, (shape,), options)


def _attention_in_blocks(m: Any, x: Tensor) -> Tensor:
    n, c, t = x.shape
    rows = x.transpose(1, 2).reshape(n * (t // 4), 4, c)
    return F.scaled_dot_product_attention(rows, rows, rows).reshape(n, t, c).transpose(1, 2)


def _channels_into_time(m: Any, x: Tensor) -> Tensor:
    n, _, t = x.shape
    y: Tensor = m.more(x)
    return y.view(n, 4, 2, t).permute(0, 1, 3, 2).reshape(n, 4, t * 2)


def _u_net(m: Any, x: Tensor) -> Tensor:
    """Entries at half the rate, up-sampled and cropped to the frames, added to those of each frame."""
    return x + F.interpolate(F.max_pool1d(x, 2, ceil_mode=True), scale_factor=2.0)[:, :, : x.shape[2]]


def _first_entry_apart(m: Any, x: Tensor) -> Tensor:
    """The first entry as it is, each of the others twice, as a causal decoder of latents has them."""
    return torch.cat([x[:, :, :1], F.interpolate(x[:, :, 1:], scale_factor=2.0)], 2)


class Pixels(nn.Module):
    """Histograms of frames of whole numbers, and what convolutions see in them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv3d(3, 4, 3, padding=1), nn.Conv1d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """uint8 (N, 3, T, H, W)."""
        n, _, t = x.shape[:3]
        bins = (x.transpose(1, 2).reshape(n * t, -1).int() >> 5).long() + (torch.arange(n * t) << 3).view(-1, 1)
        counts = torch.zeros(n * t * 8).scatter_add_(0, bins.reshape(-1), torch.ones(bins.numel()))
        seen = torch.relu(self.conv(x.float() / 255)).mean((3, 4))
        y: Tensor = self.last(torch.cat([counts.view(n, t, 8).transpose(1, 2) / 32, seen], 1))
        return y


class Detector(nn.Module):
    """What is seen in boxes of the middle frame."""

    def __init__(self) -> None:
        from torchvision.ops import roi_align  # once `zoo` has made that possible

        super().__init__()
        self.conv, self.last, self.cut = nn.Conv3d(3, 4, 3, padding=(0, 1, 1)), nn.Linear(4, 3), roi_align

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Frames, and boxes (K, 5)."""
        features = torch.relu(self.conv(x)).mean(2)
        y: Tensor = self.last(self.cut(features, boxes, (3, 2), 0.5, 2).amax((-2, -1)))
        return y


class HeadOfX3D(nn.Module):
    """A projection by a 3D convolution behind the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.pool = nn.AvgPool3d((8, 6, 6))
        self.projections = nn.Sequential(nn.Conv3d(4, 6, 1, bias=False), nn.ReLU(), nn.Conv3d(6, 4, 1, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.projections(self.pool(self.conv(x))).flatten(1)
        return y


def _with_gain(m: Any, x: Tensor, gain: Tensor) -> Tensor:
    y: Tensor = m.conv(x).mean((3, 4)) * gain[:, :, None]
    return y


def _mixes_streams(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.conv(y[None]).mean((0, 3, 4)) for y in x.unbind(0)])


def conv3d(**more: Any) -> nn.Module:
    """One layer over time."""
    return nn.Conv3d(3, 4, 3, **{"padding": 1, **more})


def _spectrogram() -> Kind:
    entry = next(e for e in FOURIER if e.name == "stft_power")
    options = {"time_dim": entry.time_dim, **entry.options}
    return Kind("a short-time Fourier transform, complex numbers", entry.build, entry.shapes, options)


KINDS: dict[str, Kind] = {
    "past entries": Kind("entries of the past", small),
    "renamed": Kind('`state_io="renamed"`: states that only move', small, options={"state_io": "renamed"}),
    "three streams": Kind("a batch of three", small, batch=3),
    "exact ends": Kind('`boundary="exact"`: flags and counters', small, options={"boundary": "exact"}),
    "exact ends of pools": _of_zoo("pasts of minus infinity, several frames a step", "resnext3d", boundary="exact"),
    "queues": _of_zoo("long pasts of dilated convolutions", "wavenet_small"),
    "recurrent": _of_zoo("an LSTM over frames", "cnn_lstm", batch=2),
    "running count": _of_zoo("a cumulative mean", "cumulative_average"),
    "gate over a window": _of_zoo("a gate in scope `window`", "se_mean-window"),
    "several frames a step": _of_zoo("strides and up-sampling over time", "unet_linear"),
    "several rates": _of_zoo("inputs at two rates", "audio_visual"),
    "several outputs": _of_zoo("two outputs", "two_heads"),
    "recomputed window": _of_zoo("attention over all of the clip", "transformer"),
    "recomputed convolutions": Kind(
        "3D convolutions on a window", lambda: Graph(lambda m, x: m.conv(x - x.mean(2, True)), conv=conv3d())
    ),
    "head behind the pool": Kind("projections by 3D convolutions behind the pool", HeadOfX3D, ((1, 2, 8, 6, 6),)),
    "dense": Kind('`stride_mode="dense"`', lambda: conv3d(stride=(2, 1, 1)), options={"stride_mode": "dense"}),
    "no state": Kind("no state at all", lambda: nn.Conv3d(3, 4, (1, 3, 3))),
    "input without time": Kind(
        "a second input without time",
        lambda: Graph(_with_gain, conv=conv3d()),
        (VIDEO, (1, 4)),
        {"time_dim": [2, None]},
        2,
    ),
    "one stream only": Kind("a batch that the network fixes", lambda: Graph(_mixes_streams, conv=conv3d())),
    "float64": Kind("numbers of 64 bits", lambda: small().double(), dtypes=(torch.float64,)),
    "uint8 frames": Kind("frames of uint8, histograms by scatter", Pixels, dtypes=(torch.uint8,)),
    "loop": _loop("a ConvLSTM written as a loop over frames", conv_lstm, PICTURES),
    "loop, two frames a step": _loop("two turns of a loop in a step", gru_cell, frames_per_step=2),
    "loop with a first turn": _loop("a loop that starts with the first frame", smoothed_from_the_first_frame),
    "loop with a cache": _loop("a loop that hands on the last frames", last_frames_in_a_tensor),
    "loop that restarts": _loop('`recurrence="window"`', gru_cell, recurrence="window"),
    "loop with exact ends": _loop("a loop with flags", conv_lstm, PICTURES, boundary="exact"),
    "selective scan": _loop("a state-space model", selective_scan),
    "region": _local("similarities with neighbours by gather, local in time", "band"),
    "region of several entries": _local("the same, three frames a step", "band", frames_per_step=3),
    "region with a period": _local("attention in blocks by a mask: a period of four", "blocks by a mask"),
    "region with exact ends": _local("a mask of -1e9, with flags", "mask -1e9", boundary="exact"),
    "region with a least length": _local(
        "exact ends in streams of some length: contract version 2", "band", boundary="exact", frames_per_step=2
    ),
    "blocks of time": _row("views that split time into blocks of four", _attention_in_blocks),
    "channels into time": _row("two results per frame from channels", _channels_into_time),
    "start of its own": _row("a first entry apart, with exact ends", _first_entry_apart, boundary="exact"),
    "U-Net with exact ends": _row(
        "up-sampling over time, exact ends in streams of odd lengths: contract version 2",
        _u_net,
        shape=(1, 4, 13),
        boundary="exact",
    ),
    "Fourier": _spectrogram(),
    "boxes": Kind("rows of its own at each step: contract version 2", Detector, ((1, 3, 6, 12, 12), (2, 5))),
}


@cache
def compiled_kind(kind: str, **changed: Any) -> co3d.CompiledModel:
    """What a kind compiles to, once for all targets."""
    row = KINDS[kind]
    torch.manual_seed(0)
    network = row.build().eval()
    with torch.compiler.set_stance("force_eager"):  # torchvision's own operators, where its compiled part is missing
        return co3d.compile(network, _boxed(row), **{**row.options, **changed})


def _boxed(row: Kind) -> tuple[Tensor, ...]:
    clip = row.clip()
    return (clip[0], torch.from_numpy(some_boxes(0))) if row.build is Detector else clip


def some_boxes(step: int) -> np.ndarray[Any, Any]:
    """Boxes of the one stream, as many as come with this step."""
    count = BOXES[step % len(BOXES)]
    corners = np.sort(np.random.default_rng(step).random((count, 2, 2), np.float32), 1).reshape(count, 4) * 12
    return np.concatenate([np.zeros((count, 1), np.float32), corners], 1)


def steps_of(kind: str, ends: bool = True) -> list[Values]:
    """The inputs of each step, by name. With exact ends the stream ends within a step, and is flushed.

    ``ends``: False leaves its end out, for readers that give no flags.
    """
    info, batch = compiled_kind(kind).info, KINDS[kind].batch
    generator, steps = np.random.default_rng(0), []
    for step in range(info.warmup_steps + STEPS):
        steps.append({s.name: _drawn(generator, step, s.shape, s.dtype, batch) for s in info.inputs})
    if info.valid is None:
        return steps
    frames = info.inputs[0].frames_per_step or 1
    for values in steps:
        values[info.valid] = np.ones((batch, frames), np.bool_)
    if ends:
        last = {name: np.zeros_like(value) for name, value in steps[0].items()}
        steps[-1][info.valid][:, frames - frames // 2 :] = False
        steps += [last] * info.flush_steps
    return steps


def _drawn(chance: np.random.Generator, step: int, shape: Sequence[Any], dtype: str, batch: int) -> Any:
    if "K" in shape:
        return some_boxes(step)
    sizes = resolve(tuple(shape), batch)
    if np.issubdtype(np.dtype(dtype), np.floating):
        return chance.standard_normal(sizes).astype(dtype)
    return chance.integers(0, 256, sizes).astype(dtype)
