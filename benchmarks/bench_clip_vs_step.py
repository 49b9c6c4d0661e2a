"""Milliseconds per frame of real networks in ONNX Runtime: clip model, compiled step, and a floor.

See README.md in this folder for what the sides are and how they are timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from floor import image_network
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import co3d_compile as co3d

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from networks import NETWORKS, Network

PACKAGES = ("co3d-compile", "onnxruntime", "torch", "onnx", "onnxscript", "numpy", "pytorchvideo", "torchvision")

SIDES = ("clip", "step", "renamed", "floor")  # renamed: the step with state_io="renamed"

console = Console(stderr=True, highlight=False)

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS, "all"], help="which networks, or all")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side gets its turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a turn lasts")
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # torch.export's own

    names = list(NETWORKS) if "all" in args.networks else args.networks
    rows = [measure(name, NETWORKS[name], args.rounds, args.seconds, args.threads) for name in names]
    result = {"machine": machine(args.threads), "rounds": args.rounds, "seconds": args.seconds, "networks": rows}
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(name: str, network: Network, rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """Build the three sides of one network, let them take turns, and return one row of the result."""
    torch.manual_seed(0)
    module = network.build().eval()
    with tempfile.TemporaryDirectory() as folder, console.status(name) as status:
        files = {side: Path(folder) / f"{side}.onnx" for side in SIDES}
        status.update(f"{name}: compile")
        start = time.perf_counter()
        compiled = co3d.compile(module, (torch.zeros(network.clip_shape),))
        compiled.save(files["step"])
        compile_seconds = time.perf_counter() - start
        co3d.compile(module, (torch.zeros(network.clip_shape),), state_io="renamed").save(files["renamed"])
        (frames,) = compiled.info.frames_per_step.values()
        status.update(f"{name}: export the clip model and the floor")
        export(module, network.clip_shape, files["clip"])
        batch, channels, _, height, width = network.clip_shape
        export(image_network(module), (batch * frames, channels, height, width), files["floor"])
        report = compiled.report().to_dict()
        del compiled, module
        gc.collect()
        turns: dict[str, list[list[float]]] = {side: [] for side in files}
        for turn in range(rounds):
            for side, path in files.items():
                status.update(f"{name}: {side}, round {turn + 1} of {rounds}")
                turns[side].append(timed(path, side in ("step", "renamed"), seconds, threads))
    sides = {side: summary(samples, frames) for side, samples in turns.items()}
    return {
        "network": name,
        "clip_shape": network.clip_shape,
        "frames_per_step": frames,
        "sides": sides,
        "speedup": sides["clip"]["median"] / sides["step"]["median"],
        "speedup_renamed": sides["clip"]["median"] / sides["renamed"]["median"],
        "over_floor": sides["step"]["median"] / sides["floor"]["median"],
        "over_floor_renamed": sides["renamed"]["median"] / sides["floor"]["median"],
        "compile_seconds": compile_seconds,
        **{key: report[key] for key in ("gmac_clip", "gmac_frame", "gmac_ratio", "state_bytes", "warmup_steps")},
    }


def export(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Export by PyTorch's own exporter."""
    torch.onnx.export(module.eval(), (torch.zeros(shape),), path, dynamo=True, verbose=False)


def timed(path: Path, stream: bool, seconds: float, threads: int) -> list[float]:
    """Milliseconds of each call in one turn, after a warm-up; the session lives for this turn only."""
    milliseconds: list[float] = []
    with (stream_calls if stream else model_calls)(path, threads) as call:
        for _ in range(3):
            call()
        end = time.perf_counter() + seconds
        while len(milliseconds) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    gc.collect()
    return milliseconds


@contextmanager
def stream_calls(path: Path, threads: int) -> Iterator[Call]:
    """One step of the compiled model, as a user calls it."""
    with co3d.StreamSession(path, threads=threads) as session:
        spec = session.info.inputs[0]
        frames = noise([1 if dim == "N" else dim for dim in spec.shape])
        yield lambda: session.step(frames)


@contextmanager
def model_calls(path: Path, threads: int) -> Iterator[Call]:
    """One run of a plain ONNX model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {item.name: noise(item.shape) for item in session.get_inputs()}
    yield lambda: session.run(None, feeds)


def noise(shape: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def summary(turns: list[list[float]], frames: int) -> dict[str, Any]:
    """Milliseconds per frame: median and quartiles over all calls, the median of each turn, and the number of calls."""
    samples = np.concatenate(turns) / frames
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "round_medians": [float(np.median(turn)) / frames for turn in turns],
        "calls": len(samples),
    }


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were taken on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def show(result: dict[str, Any]) -> None:
    """Print the table on standard output."""
    columns = ("network", "clip ms", "step ms", "renamed", "floor ms", "speed-up", "FLOPs", "of floor", "state MB")
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for row in result["networks"]:
        sides = [spread(row["sides"][side]) for side in SIDES]
        table.add_row(
            row["network"],
            *sides,
            f"{row['speedup']:.1f}x, {row['speedup_renamed']:.1f}x",
            f"{row['gmac_ratio']:.1f}x",
            f"{row['over_floor']:.2f}, {row['over_floor_renamed']:.2f}",
            f"{row['state_bytes'] / 1e6:.1f}",
        )
    out = Console(highlight=False)
    out.width = max(out.width, 125)  # a log or pipe has no width
    out.print(table)
    box = result["machine"]
    out.print(
        f"Milliseconds per frame: median, and half the distance of the quartiles, over {result['rounds']} alternating "
        f"rounds. Speed-up: clip by step. FLOPs: clip by frame. {box['cpu']}, {box['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in box["versions"].items())
    )


def spread(side: dict[str, Any]) -> str:
    low, high = side["quartiles"]
    return f"{side['median']:.1f} ±{(high - low) / 2:.1f}"


if __name__ == "__main__":
    main()
