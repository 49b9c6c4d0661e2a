"""Accuracy on labelled streams: a clip model as a sliding window, its stream, and the stream within delay budgets.

    pip install --no-deps aeon==1.6.0        # three data sets are read from its files; nothing of it runs
    accuracy.py                              # all of them, three seeds: some minutes
    accuracy.py BasicMotions --seeds 1       # one of them
    accuracy.py --json out.json --plot out.svg

Recordings of the training part are cut into short clips, on which a small temporal network with residuals and gates is
trained. Recordings of the test part are put one behind the other, so that labels change, and every answer is compared
with the label of the newest frame: what a user sees at that moment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import co3d_compile as co3d

Array = npt.NDArray[Any]
CLIPS = {"BasicMotions": 24, "JapaneseVowels": 8, "PickupGestureWiimoteZ": 24}  # frames of a clip
STREAMS = 8  # side by side, of the test part
CHANNELS = 24
WAYS = ("shift", "drop", "fold")


@dataclass(frozen=True)
class Recordings:
    """Labelled recordings (channels, frames) of both parts, normalised by the training part."""

    clip: int
    train: list[tuple[Tensor, int]]
    test: list[tuple[Tensor, int]]

    @property
    def classes(self) -> int:
        return 1 + max(label for _, label in self.train)

    def batch(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random clips of the training part; a short recording is repeated."""
        picked = [self.train[i] for i in generator.integers(len(self.train), size=count)]
        clips = []
        for x, _ in picked:
            x = x.repeat(1, -(-self.clip // x.shape[1]))
            start = int(generator.integers(x.shape[1] - self.clip + 1))
            clips.append(x[:, start : start + self.clip])
        return torch.stack(clips), torch.tensor([label for _, label in picked])

    def streams(self, seed: int) -> tuple[Tensor, Array]:
        """Test recordings one behind the other: (streams, channels, frames) and the label of every frame."""
        order = np.random.default_rng(seed).permutation(len(self.test))
        rows: list[tuple[Tensor, Array]] = []
        for part in np.array_split(order, STREAMS):
            x = torch.cat([self.test[i][0] for i in part], 1)
            rows.append((x, np.concatenate([np.full(self.test[i][0].shape[1], self.test[i][1]) for i in part])))
        frames = min(x.shape[1] for x, _ in rows)
        return torch.stack([x[:, :frames] for x, _ in rows]), np.stack([y[:frames] for _, y in rows])


def read(name: str, folder: Path) -> Recordings:
    """Reads both parts of a data set, of files in the format ``.ts``: channels are separated by colons."""

    def part(which: str) -> list[tuple[Array, str]]:
        text = (folder / name / f"{name}_{which}.ts").read_text().split("@data", 1)[1]
        rows = []
        for line in text.strip().splitlines():
            *channels, label = line.split(":")
            rows.append((np.array([[float(v) for v in c.split(",")] for c in channels], np.float32), label))
        return rows

    train, test = part("TRAIN"), part("TEST")
    names = sorted({label for _, label in train})
    every = np.concatenate([x for x, _ in train], 1)
    mean, std = every.mean(1, keepdims=True), every.std(1, keepdims=True) + 1e-6
    made = ([(torch.from_numpy((x - mean) / std), names.index(label)) for x, label in part] for part in (train, test))
    return Recordings(CLIPS[name], *made)


class Block(nn.Module):
    """Two centred convolutions over time, a gate, and a residual."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS)
        self.gate = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 1), nn.Sigmoid()) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        y = y if self.gate is None else y * self.gate(y.mean(2, True))
        return F.relu(x + y)


class Network(nn.Module):
    """Ten frames late as it stands: five convolutions that each read two frames of the future."""

    def __init__(self, channels: int, classes: int, gated: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(channels, CHANNELS, 5, padding=2), nn.BatchNorm1d(CHANNELS), nn.ReLU())
        self.blocks = nn.Sequential(Block(gated), Block(gated))
        self.head = nn.Linear(CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(2))


def fit(network: nn.Module, data: Recordings, steps: int, rate: float, seed: int) -> None:
    """Trains on clips."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clips, labels = data.batch(32, generator)
        loss = F.cross_entropy(network(clips), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def slid(network: nn.Module, frames: Tensor, clip: int) -> Array:
    """The best class of the clip that ends at each frame, from the first whole clip on: (streams, frames)."""
    with torch.no_grad():
        windows = frames.unfold(2, clip, 1).permute(2, 0, 1, 3)
        return torch.stack([network(x).argmax(1) for x in windows], 1).numpy()


def streamed(model: co3d.CompiledModel, frames: Tensor, clip: int, folder: Path) -> Array:
    """The best class at each step of the file in ONNX Runtime, from the same frame on."""
    path = model.save(folder / "model.onnx")
    with co3d.StreamSession(path, batch=len(frames), threads=1, layout="plain") as session:
        scores = [session.step(np.ascontiguousarray(x)) for x in frames.permute(2, 0, 1).numpy()]
    return np.stack([np.asarray(s).argmax(1) for s in scores[clip - 1 :]], 1)


def measured(answers: Array, labels: Array, clip: int, late: int = 0) -> dict[str, float]:
    """Accuracy per frame, and frames from a change of labels to the first right answer (or to the next change).

    ``own`` is the accuracy about the newest frame that an answer has seen all of: the delay is taken off.
    """
    own = labels[:, np.maximum(np.arange(clip - 1, labels.shape[1]) - late, 0)]
    labels = labels[:, clip - 1 :]
    waits = []
    for found, row in zip(answers == labels, labels, strict=True):
        changes = [*(np.flatnonzero(np.diff(row)) + 1), len(row)]
        for begin, end in pairwise(changes):
            right = np.flatnonzero(found[begin:end])
            waits.append(int(right[0]) if len(right) else int(end - begin))
    shares = {"accuracy": float((answers == labels).mean()), "own": float((answers == own).mean())}
    return {**shares, "wait": statistics.mean(waits)}


def runs(data: Recordings, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Everything for one seed: what is measured of each side, by its name."""
    torch.manual_seed(seed)
    channels, clip = data.train[0][0].shape[0], data.clip
    example = (torch.zeros(1, channels, clip),)
    frames, labels = data.streams(seed)
    found: dict[str, dict[str, float]] = {}

    def stream(name: str, network: nn.Module, **options: Any) -> co3d.CompiledModel:
        model = co3d.compile(network, example, **options)
        late = max(0, model.info.outputs[0].delay)
        found[name] = measured(streamed(model, frames, clip, folder), labels, clip, late)
        return model

    network = Network(channels, data.classes)
    fit(network, data, 300, 3e-3, seed)
    network.eval()
    found["sliding window"] = measured(slid(network, frames, clip), labels, clip)
    model = stream("stream, window x 1", network)
    natural = model.info.outputs[0].delay
    for times in (2, 4):
        stream(f"stream, window x {times}", network, window=times * clip)
    for budget in (natural // 2, 0):
        for by in WAYS:
            name = f"{budget} late, {by}"
            tuned = stream(name, network, max_delay=budget, delay_by=by).replaced_module()
            fit(tuned, data, 60, 1e-3, seed + 100)
            stream(f"{name}, tuned", tuned)
    again = model.replaced_module()
    fit(again, data, 60, 1e-3, seed + 100)
    stream(f"{natural} late, tuned", again)
    gated = Network(channels, data.classes, gated=True)
    fit(gated, data, 300, 3e-3, seed)
    gated.eval()
    found["gated, sliding window"] = measured(slid(gated, frames, clip), labels, clip)
    for scope in ("frame", "window", "recompute"):
        stream(f"gated, {scope}", gated, pool_scope=scope)
    return found


def table(name: str, results: Sequence[dict[str, dict[str, float]]]) -> str:
    """Means and spreads over seeds, as Markdown."""
    columns = {
        "accuracy": ("now", 100, " %"),
        "own": ("delay taken off", 100, " %"),
        "wait": ("frames to right", 1, ""),
    }
    lines = [f"### {name}", "", f"| side | {' | '.join(c[0] for c in columns.values())} |", "| --- " * 4 + "|"]
    for side in results[0]:
        cells = []
        for key, (_, scale, unit) in columns.items():
            values = [scale * r[side][key] for r in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}{unit}")
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def plot(path: Path, results: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """Accuracy against delay, both ways to fine-tune, one panel for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.4), layout="constrained")
    for panel, (name, seeds) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        curves: dict[tuple[str, bool], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for found in seeds:
            for side, values in found.items():
                if " late, " in side:
                    late, _, way = side.partition(" late, ")
                    tuned = way.endswith("tuned")
                    way = way.removesuffix("tuned").rstrip(", ")
                    for each in [way] if way else WAYS:
                        curves[each, tuned][int(late)].append(100 * values["accuracy"])
            for each in WAYS:
                curves[each, False][10].append(100 * found["stream, window x 1"]["accuracy"])
        for (way, tuned), points in curves.items():
            xs = sorted(points)
            ys = [statistics.mean(points[x]) for x in xs]
            spread = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
            at = [x + 0.12 * (WAYS.index(way) - 1) for x in xs]  # beside each other, so that all spreads are seen
            style = {"fmt": "o-" if tuned else "o--", "color": f"C{WAYS.index(way)}", "capsize": 2, "markersize": 4}
            panel.errorbar(at, ys, spread, label=f"{way}{', tuned' if tuned else ''}", **style)
        window = statistics.mean(100 * found["sliding window"]["accuracy"] for found in seeds)
        panel.axhline(window, color="#888", linewidth=1, linestyle=":", label="sliding window")
        panel.set(title=name, xlabel="frames late", ylabel="accuracy now, %")
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, handlelength=4)
    figure.savefig(path)


def data_folder() -> Path:
    """Where aeon's files are."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The data are in the package aeon: pip install --no-deps aeon==1.6.0, or give --data FOLDER.")
    return Path(spec.submodule_search_locations[0], "datasets", "data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what was asked for, and prints a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CLIPS))
    parser.add_argument("--data", type=Path, help="the folder datasets/data of aeon")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which the extra [plot] brings")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import tempfile

    results: dict[str, list[dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names:
            data = read(name, options.data or data_folder())
            results[name] = [runs(data, seed, Path(folder)) for seed in range(options.seeds)]
            print(table(name, results[name]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    if options.plot is not None:
        plot(options.plot, results)


if __name__ == "__main__":
    main()
