"""Train a small 3D CNN on clips in which only motion tells the class, compile it, and stream a long noisy video.

Discs drift left, right, up or down: a single frame says nothing. The network is trained on clips of 8 frames. On a
video in which the direction changes now and then, four ways of running it are compared: as a sliding window, as a
stream, and as a stream whose last pool looks back on 2 and 4 times as many frames. On a CPU; no downloads.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import co3d_compile as co3d

matplotlib.use("Agg")
from matplotlib import pyplot

Array = npt.NDArray[np.float32]
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZE, CLIP, NOISE = 24, 8, 3.0
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """Probabilities (answers, 4), and of each answer the newest frame that it speaks of."""

    scores: Array
    frames: npt.NDArray[np.int64]

    def accuracy(self, truth: npt.NDArray[np.int64], first: int) -> float:
        """Share of right answers about the frames from ``first`` on."""
        there = (self.frames >= first) & (self.frames < len(truth))
        return float((self.scores[there].argmax(1) == truth[self.frames[there]]).mean())


def film(truth: npt.NDArray[np.int64], rng: np.random.Generator, noise: float = NOISE) -> Array:
    """A noisy video (3, frames, SIZE, SIZE): discs drift as ``truth`` says for each frame."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    places, radii = rng.uniform(0, SIZE, (4, 2)), rng.uniform(2, 4, 4)
    colors = rng.uniform(0.3, 1, (4, 3))
    steps = np.array(list(DIRECTIONS.values()))[truth] * rng.uniform(0.5, 1.0)
    frames = []
    for step in steps:
        places = (places + step) % SIZE
        frame = np.zeros((3, SIZE, SIZE), np.float32)
        for place, radius, color in zip(places, radii, colors, strict=True):
            across, down = (np.abs(x - place[0]), np.abs(y - place[1]))
            near = np.minimum(across, SIZE - across) ** 2 + np.minimum(down, SIZE - down) ** 2 < radius**2
            frame[:, near] = color[:, None]
        frames.append(frame)
    video = np.stack(frames, axis=1)
    return (video + noise * rng.standard_normal(video.shape)).astype(np.float32)


def make_network() -> nn.Module:
    """Three convolutions over space and time, a mean over the clip, and a linear layer."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        conv = nn.Conv3d(before, after, 3, (1, stride, stride), 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(after), nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(24, len(DIRECTIONS)))
    return nn.Sequential(block(3, 12, 2), block(12, 24, 2), block(24, 24, 1), head)


def train(network: nn.Module, steps: int, batch: int = 32) -> None:
    """Train on clips that are filmed anew at every step, with little noise or much."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    network.train()
    for step in range(steps):
        classes = rng.integers(len(DIRECTIONS), size=batch)
        clips = torch.from_numpy(np.stack([film(np.full(CLIP, c), rng, NOISE * rng.random()) for c in classes]))
        answers = network(clips)
        loss = nn.functional.cross_entropy(answers, torch.from_numpy(classes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            right = (answers.argmax(1).numpy() == classes).mean()
            console.print(f"step {step + 1}: loss {loss.item():.2f}, {right:.0%} of the clips right")
    network.eval()


def slide(network: nn.Module, video: Array) -> Run:
    """The clip network on every window of CLIP frames, computed whole each time."""
    clips = torch.from_numpy(video).unfold(1, CLIP, 1).permute(1, 0, 4, 2, 3)
    with torch.inference_mode():
        scores = torch.cat([network(part).softmax(1) for part in clips.split(64)])
    return Run(scores.numpy(), np.arange(CLIP - 1, video.shape[1]))


def stream(network: nn.Module, video: Array, window: int, path: Path) -> Run:
    """The compiled network, frame by frame; answers that still depend on the empty state are left out."""
    compiled = co3d.compile(network, (torch.zeros(1, 3, CLIP, SIZE, SIZE),), window=window, labels=list(DIRECTIONS))
    with co3d.StreamSession(compiled.save(path), threads=1) as session:
        answers = [np.asarray(session.step(np.ascontiguousarray(frame[None]))) for frame in video.swapaxes(0, 1)]
        (delay,) = session.info.delays.values()
        first = session.info.warmup_steps
    scores: Tensor = torch.from_numpy(np.concatenate(answers[first:])).softmax(1)
    return Run(scores.numpy(), np.arange(first, video.shape[1]) - delay)


def plot(runs: dict[str, Run], truth: npt.NDArray[np.int64], path: Path, frames: int = 500) -> None:
    """Probabilities of the four directions over time; the bar below says what was true."""
    figure, axes = pyplot.subplots(len(runs), 1, figsize=(11, 2 * len(runs)), sharex=True, layout="constrained")
    colors = ["#2563eb", "#e0731d", "#15935b", "#8b46d6"]
    changes = np.flatnonzero(np.diff(truth)) + 1
    edges = [0, *changes, len(truth)]
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        for index, (label, color) in enumerate(zip(DIRECTIONS, colors, strict=True)):
            axis.plot(run.frames, run.scores[:, index], color=color, label=label, linewidth=1.2)
        for start, end in pairwise(edges):
            axis.axvspan(start, end, ymax=0.06, color=colors[truth[start]], linewidth=0)
        axis.set(xlim=(0, min(frames, len(truth))), ylim=(-0.07, 1.02), title=name, ylabel="probability")
    axes[0].legend(loc="upper right", ncols=4, fontsize=8)
    axes[-1].set_xlabel("frame that the answer speaks of; the bar below is the truth")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--steps", type=int, default=600, help="steps of training")
    parser.add_argument("--frames", type=int, default=2400, help="length of the video")
    parser.add_argument("--scene", type=int, default=200, help="frames until the direction changes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    network = make_network()
    train(network, args.steps)
    rng = np.random.default_rng(1)
    truth = np.repeat(rng.integers(len(DIRECTIONS), size=-(-args.frames // args.scene)), args.scene)[: args.frames]
    video = film(truth, rng)
    runs = {f"sliding window of {CLIP} frames": slide(network, video)}
    for times in (1, 2, 4):
        window = times * CLIP
        runs[f"stream, window of {window} frames"] = stream(network, video, window, args.out / f"window_{window}.onnx")
    first = max(int(run.frames[0]) for run in runs.values())
    accuracies = {name: run.accuracy(truth, first) for name, run in runs.items()}
    table = Table(
        "", "right answers", title=f"{len(truth) - first} answers, direction drawn anew every {args.scene} frames"
    )
    for name, value in accuracies.items():
        table.add_row(name, f"{value:.1%}")
    console.print(table)
    plot(runs, truth, args.out / "train_and_stream.png")
    (args.out / "train_and_stream.json").write_text(json.dumps(accuracies, indent=2))
    console.print(f"{args.out / 'train_and_stream.png'} written")


if __name__ == "__main__":
    main()
