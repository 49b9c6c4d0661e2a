"""Milliseconds of streaming sound networks: the clip model beside the compiled step, in turns.

    bench_sound.py                     all networks that are written here
    bench_sound.py crnn separator      some of them
    bench_sound.py encodec_encoder encodec_decoder --packages FOLDER     from transformers, with random weights

A clip is a second of sound. The clip model runs once for each step, as on a stream whose answers are wanted as early as
the compiled model gives them. `transformers` is no package of this project's environment: install it with
`pip install --target FOLDER transformers`, and say where it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from printed import print_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from co3d_compile.bench.bench_model import bench

RATE = 16_000  # samples in a second
SPEAKERS = 2
SIDES = ("pytorch", "clip", "openvino", "openvino32", "step", "plain")  # bench leaves out what is not installed
console = Console(stderr=True, highlight=False)


class Crnn(nn.Module):
    """Events in sound, from (N, samples): a log spectrogram, convolutions over time and frequency, a GRU."""

    window: Tensor

    def __init__(self, size: int = 400, hop: int = 160, channels: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.size, self.hop = size, hop
        widths = [1, channels, 2 * channels, 2 * channels]
        layers: list[nn.Module] = []
        for given, width in pairwise(widths):
            layers += [nn.Conv2d(given, width, 3, (2, 1), 1), nn.BatchNorm2d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        bands = size // 2 + 1
        for _ in widths[1:]:
            bands = (bands + 1) // 2
        self.gru = nn.GRU(bands * widths[-1], 4 * channels, batch_first=True)
        self.out = nn.Linear(4 * channels, classes)
        self.register_buffer("window", torch.hann_window(size))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of each class for each hop."""
        parts = torch.stft(x, self.size, self.hop, window=self.window, center=False, return_complex=True)
        y = self.convolutions(torch.log(parts.abs().square() + 1e-6).unsqueeze(1))
        scores: Tensor = self.out(self.gru(y.flatten(1, 2).transpose(1, 2))[0])
        return scores


class _Residual(nn.Module):
    """A depthwise convolution between two pointwise ones, as in Conv-TasNet; nothing of it looks ahead."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.into, self.out = nn.Conv1d(channels, hidden, 1), nn.Conv1d(hidden, channels, 1)
        self.taps = nn.Conv1d(hidden, hidden, 3, dilation=dilation, groups=hidden)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(2))
        self.bends = nn.ModuleList(nn.PReLU() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Adds what is new to each entry."""
        y = self.norms[0](self.bends[0](self.into(x)))
        y = self.norms[1](self.bends[1](self.taps(F.pad(y, (self.pad, 0)))))
        new: Tensor = self.out(y)
        return x + new


class Separator(nn.Module):
    """Conv-TasNet, causal: (N, 1, samples) to (N, speakers, samples)."""

    def __init__(self, filters: int = 256, size: int = 32, repeats: int = 2, blocks: int = 8) -> None:
        super().__init__()
        self.filters = filters
        self.encoder = nn.Conv1d(1, filters, size, size // 2, bias=False)
        self.decoder = nn.ConvTranspose1d(filters, 1, size, size // 2, bias=False)
        self.into = nn.Conv1d(filters, filters // 2, 1)
        self.blocks = nn.Sequential(
            *(_Residual(filters // 2, filters, 2**b) for _ in range(repeats) for b in range(blocks))
        )
        self.masks = nn.Conv1d(filters // 2, SPEAKERS * filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gives the sound of each speaker."""
        y = self.encoder(x).relu()
        masks = self.masks(self.blocks(self.into(y))).sigmoid().unflatten(1, (SPEAKERS, self.filters))
        return torch.cat([self.decoder(y * masks[:, s]) for s in range(SPEAKERS)], 1)


class Codec(nn.Module):
    """An encoder or decoder of a sound codec in the style of SEANet: strided, causal, an LSTM where time is coarsest.

    Args:
        decoder: From (N, 128, entries) to (N, 1, samples), and not the other way.
        channels: Where time is finest.
        strides: From fine to coarse.
    """

    def __init__(self, decoder: bool, channels: int = 32, strides: tuple[int, ...] = (2, 4, 5, 8)) -> None:
        super().__init__()
        self.decoder, self.strides = decoder, strides[::-1] if decoder else strides
        widths = [channels * 2**i for i in range(len(strides) + 1)]
        self.ends = nn.ModuleList([nn.Conv1d(1, widths[0], 7), nn.Conv1d(widths[-1], 128, 7)])
        if decoder:
            self.ends = nn.ModuleList([nn.Conv1d(128, widths[-1], 7), nn.Conv1d(widths[0], 1, 7)])
            widths = widths[::-1]
        self.same = nn.ModuleList(nn.Conv1d(w, w, 3) for w in (widths[1:] if decoder else widths[:-1]))
        kind: Any = nn.ConvTranspose1d if decoder else nn.Conv1d
        pairs = zip(pairwise(widths), self.strides, strict=True)
        self.moves = nn.ModuleList(kind(a, b, 2 * s, s) for (a, b), s in pairs)
        coarse = widths[0] if decoder else widths[-1]
        self.lstm = nn.LSTM(coarse, coarse, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes, or decodes."""
        x = self.ends[0](F.pad(x, (6, 0)))
        x = self._remembered(x) if self.decoder else x
        for same, move, stride in zip(self.same, self.moves, self.strides, strict=True):
            x = F.elu(x) if self.decoder else self._refined(same, x)
            x = move(x)[..., :-stride] if self.decoder else move(F.pad(F.elu(x), (stride, 0)))
            x = self._refined(same, x) if self.decoder else x
        x = x if self.decoder else self._remembered(x)
        result: Tensor = self.ends[1](F.pad(F.elu(x), (6, 0)))
        return result

    @staticmethod
    def _refined(same: nn.Module, x: Tensor) -> Tensor:
        refined: Tensor = x + same(F.pad(F.elu(x), (2, 0)))
        return refined

    def _remembered(self, x: Tensor) -> Tensor:
        remembered: Tensor = x + self.lstm(x.transpose(1, 2))[0].transpose(1, 2)
        return remembered


class Part(nn.Module):
    """The encoder or the decoder of a network."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Runs the part."""
        result: Tensor = self.part(x)
        return result


def _encodec(part: str) -> nn.Module:
    transformers: Any = __import__("transformers")
    model = transformers.EncodecModel(transformers.EncodecConfig())
    return Part(getattr(model, part))


@dataclass(frozen=True)
class Sound:
    """A network, the shape of a clip of a second, and how many samples of sound one of its entries stands for."""

    build: Callable[[], nn.Module]
    clip: tuple[int, ...]
    samples: int = 1
    rate: int = RATE

    @property
    def time_dim(self) -> int:
        """The last dim counts entries."""
        return len(self.clip) - 1


NETWORKS = {
    "crnn": Sound(Crnn, (1, RATE + 240)),
    "separator": Sound(Separator, (1, 1, RATE + 16)),
    "codec_encoder": Sound(lambda: Codec(decoder=False), (1, 1, RATE)),
    "codec_decoder": Sound(lambda: Codec(decoder=True), (1, 128, 50), 320),
}
OF_OTHERS = {
    "encodec_encoder": Sound(lambda: _encodec("encoder"), (1, 1, 24_000), rate=24_000),
    "encodec_decoder": Sound(lambda: _encodec("decoder"), (1, 128, 75), 320, 24_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*NETWORKS, *OF_OTHERS]
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(known)}; default all that are written here")
    parser.add_argument("--packages", help="the folder in which transformers is")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side gets its turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a turn lasts")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if unknown := set(args.networks) - set(known):
        parser.error(f"there is no network {', '.join(sorted(unknown))}")
    if args.packages:
        sys.path.append(args.packages)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # torch.export's own
    timing = {name: getattr(args, name) for name in ("rounds", "seconds", "threads")}
    rows = [measure(name, {**NETWORKS, **OF_OTHERS}[name], **timing) for name in args.networks or NETWORKS]
    show(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"networks": rows}, indent=2) + "\n")


def measure(name: str, sound: Sound, **timing: Any) -> dict[str, Any]:
    """One row of the result: the sides of one network in turns."""
    torch.manual_seed(0)
    with console.status(name) as status:
        result = bench(
            sound.build().eval(),
            (torch.zeros(sound.clip),),
            sides=SIDES,
            time_dim=sound.time_dim,
            progress=lambda stage, done, total: status.update(f"{name}: {stage}, {done} of {total}"),
            **timing,
        )
    entries = next(iter(result["frames_per_step"].values()))
    seconds = sound.clip[-1] * sound.samples / sound.rate
    return {"network": name, "clip_seconds": seconds, "step_seconds": entries * sound.samples / sound.rate, **result}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table on standard output."""
    timed = list(dict.fromkeys(side for row in rows for side in row["sides"]))
    ratios = list(dict.fromkeys(ratio for row in rows for ratio in row["ratios"]))
    table = Table("network", "clip s", "step ms", *timed, *ratios, "of real time", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        entries = next(iter(row["frames_per_step"].values()))
        calls = {side: times["median"] * entries for side, times in row["sides"].items()}
        step = row["step_seconds"] * 1e3
        table.add_row(
            row["network"],
            f"{row['clip_seconds']:.2f}",
            f"{step:.2f}",
            *(f"{calls[side]:.2f}" if side in calls else "" for side in timed),
            *(f"{row['ratios'][name]:.1f}" if name in row["ratios"] else "" for name in ratios),
            f"{calls.get('step', math.nan) / step:.1%}",
        )
    said = [f"{row['network']}, {side}: {why}" for row in rows for side, why in row["left_out"].items()]
    print_table(table, rows, said, "Milliseconds of a call: medians")


if __name__ == "__main__":
    main()
