"""Many cameras in one batch: all advance in one call, and one that drops out starts afresh without the others.

Eight made-up cameras with the same network. Compared with a session for each: the same answers, and the time of both.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from moving_shapes import moving_shapes
from rich.console import Console
from torch import nn

import co3d_compile as co3d

SIZE, CLIP = 48, 8
console = Console(highlight=False)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--cameras", type=int, default=8)
    parser.add_argument("--frames", type=int, default=60)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = compile_network(args.out / "many_cameras.onnx")
    prepare = co3d.Preprocess(crop=SIZE, mean=0.45, std=0.225)
    films = [moving_shapes(args.frames, seed=camera) for camera in range(args.cameras)]
    # (frames, cameras, 3, SIZE, SIZE): what all cameras see at the same moment is one batch
    moments = [np.concatenate([prepare(image) for image in images]) for images in zip(*films, strict=True)]

    with co3d.StreamSession(model, batch=args.cameras, threads=1) as session:
        start = time.perf_counter()
        together = [np.asarray(session.step(moment)) for moment in moments]
        seconds = time.perf_counter() - start
        session.reset(stream=0)  # camera 0 was off for a while; the others keep their states
        again = np.asarray(session.step(moments[0]))

    apart = 0.0
    for camera in range(args.cameras):
        with co3d.StreamSession(model, threads=1) as session:
            start = time.perf_counter()
            alone = [np.asarray(session.step(moment[camera : camera + 1])) for moment in moments]
            apart += time.perf_counter() - start
        for one, all_of_them in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], all_of_them[camera], rtol=1e-3, atol=1e-4)

    np.testing.assert_allclose(again[0], together[0][0], rtol=1e-3, atol=1e-4)  # camera 0 as at its very start
    frames = args.cameras * args.frames
    console.print(f"{args.cameras} cameras, {args.frames} frames each: the same answers together and one by one")
    console.print(f"frames per second on one thread: {frames / seconds:.0f} together, {frames / apart:.0f} one by one")


def compile_network(path: Path) -> Path:
    """A small network with random weights."""
    torch.manual_seed(0)
    trunk = [nn.Conv3d(3, 16, 3, (1, 2, 2), 1), nn.ReLU(), nn.Conv3d(16, 32, 3, (1, 2, 2), 1), nn.ReLU()]
    network = nn.Sequential(*trunk, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
    return co3d.compile(network, (torch.zeros(1, 3, CLIP, SIZE, SIZE),)).save(path)


if __name__ == "__main__":
    main()
