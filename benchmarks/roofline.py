"""What a step could gain at best on this machine: its multiply-adds at the rate of plain convolutions, state as copied.

Reads the results of bench_clip_vs_step.py (``--json``), so run both on one quiet machine:

    .venv/bin/python benchmarks/bench_clip_vs_step.py all --json build/bench.json
    .venv/bin/python benchmarks/roofline.py build/bench.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from co3d_compile.bench.timing import COMPILED, turn

CHANNELS, SIZE, LAYERS = 128, 56, 4  # of the plain convolutions: 3x3, the shape of a ResNet's second stage
COPIED = 64_000_000  # bytes, more than a cache holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what bench_clip_vs_step.py --json wrote")
    args = parser.parse_args()
    rows = [row for path in args.results for row in json.loads(path.read_text())["networks"]]
    threads = rows[0]["machine"]["threads"]
    rate, copy = plain_rate(threads), copy_rate()
    table = Table(
        "network", "GMAC clip", "GMAC step", "clip GMAC/s", "step GMAC/s", "state ms", "least ms", "step ms",
        "clip / step", "at best", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False,
    )  # fmt: skip
    for row in rows:
        table.add_row(*roofline(row, rate, copy))
    out = Console(highlight=False)
    out.width = max(out.width, 140)
    out.print(table)
    out.print(
        f"Per answer. {rows[0]['machine']['cpu']}, {threads} threads: {rate:.0f} GMAC/s in plain 3x3 convolutions of "
        f"{CHANNELS} channels on {SIZE}x{SIZE} pixels, {copy:.1f} GB/s copied. step: the fastest form of state. "
        "least: multiply-adds at that rate, and all states read and written once."
    )


def roofline(row: dict[str, Any], rate: float, copy: float) -> list[str]:
    """One line: milliseconds per answer, of the fastest compiled form, beside what they could be at least."""
    frames = next(iter(row["frames_per_step"].values()))
    clip = row["sides"]["clip"]["median"] * frames
    step = min(row["sides"][side]["median"] for side in COMPILED if side in row["sides"]) * frames
    gmac = row["gmac_frame"] * frames
    state = 2 * row["state_bytes"] / copy / 1e6
    least = gmac / rate * 1e3 + state
    numbers = [row["gmac_clip"], gmac, row["gmac_clip"] / clip * 1e3, gmac / step * 1e3]
    times = [state, least, step]
    return [
        row["network"],
        *(f"{n:.3g}" for n in numbers),
        *(f"{t:.2f}" for t in times),
        f"{clip / step:.1f}x",
        f"{clip / least:.1f}x",
    ]


def plain_rate(threads: int) -> float:
    """Multiply-adds per second of plain convolutions in ONNX Runtime, times 1e-9."""
    layers = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(LAYERS)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "plain.onnx")
        example = (torch.zeros(1, CHANNELS, SIZE, SIZE),)
        torch.onnx.export(nn.Sequential(*layers).eval(), example, path, dynamo=True, verbose=False)
        times = [t for _ in range(3) for t in turn("clip", path, 1.0, threads).milliseconds]
    gmac = LAYERS * CHANNELS**2 * 9 * SIZE**2 / 1e9
    return gmac / float(np.median(times)) * 1e3


def copy_rate() -> float:
    """Bytes per second that a copy reads, times 1e-9."""
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return COPIED / float(np.median(times)) / 1e9


if __name__ == "__main__":
    main()
