"""Label every frame: a network without a pool over time gives an answer for each frame, ends of the video included.

A temporal convolution network on frames of a video, for temporal segmentation. Compiled with ``boundary="exact"`` the
stream, flushed at the end, gives one label per frame and the same ones as the clip network on the whole video.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from moving_shapes import moving_shapes
from rich.console import Console
from torch import Tensor, nn

import co3d_compile as co3d
from co3d_compile.media import read_frames, write_video

SIZE, CLIP, FPS = 32, 16, 25
console = Console(highlight=False)


class Labeller(nn.Module):
    """Scores for every frame, (N, classes, T): 3D convolutions, a mean over the picture, dilated ones over time."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv3d(3, 12, 3, (1, 2, 2), 1), nn.ReLU(), nn.Conv3d(12, 16, 3, (1, 2, 2), 1))
        self.over_time = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.name = nn.Conv1d(16, classes, 1)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.see(clip).mean((3, 4))
        for conv in self.over_time:
            x = x + torch.relu(conv(x))
        return self.name(x)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--frames", type=int, default=120)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = Labeller().eval()
    clip = (torch.zeros(1, 3, CLIP, SIZE, SIZE),)
    preprocess = {"mean": 0.45, "std": 0.225, "fps": FPS}
    compiled = co3d.compile(network, clip, boundary="exact", preprocess=preprocess, labels=["a", "b", "c", "d"])
    model = compiled.save(args.out / "dense_labels.onnx")
    path = write_video(args.out / "dense_labels.mp4", moving_shapes(args.frames), FPS)

    found = list(co3d.predict(model, read_frames(path), activation="softmax"))
    assert [prediction.frame for prediction in found] == list(range(args.frames))  # one for each frame, in order

    prepare = co3d.Preprocess(crop=SIZE, mean=0.45, std=0.225)
    video = np.stack([prepare(frame.image)[0] for frame in read_frames(path)], axis=1)[None]
    with torch.inference_mode():
        expected = network(torch.from_numpy(video)).softmax(1)[0].T.numpy()
    scores = np.stack([prediction.scores for prediction in found])
    np.testing.assert_allclose(scores, expected, atol=1e-4)

    (delay,) = compiled.info.delays.values()
    console.print(f"{args.frames} frames, {len(found)} labels, each {delay} frames after its frame")
    console.print(f"largest difference from the clip network on the whole video: {np.abs(scores - expected).max():.1e}")
    for label, group in groupby(found, key=lambda prediction: prediction.top(1)[0].label):
        part = list(group)
        console.print(f"  {part[0].time:5.2f} s to {part[-1].time:5.2f} s: {label} (random weights)")


if __name__ == "__main__":
    main()
