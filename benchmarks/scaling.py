"""How a step grows: with frames per step, streams, window and resolution; over many frames; and what a compile takes.

    scaling.py --json build/scaling.json --chart docs/images/scaling.png
    scaling.py --only overhead --only memory

Times are CPU time on one thread, so that a machine that others use gives the same numbers. Each part stays in the JSON
file until it is measured again, and the chart shows all that is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

import co3d_compile as co3d
from co3d_compile.bench.timing import machine
from co3d_compile.contract.model_contract import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from networks import NETWORKS
from pytorchvideo.models.x3d import create_x3d  # behind networks, which prepares for its import

CLIP, SIZE = 13, 160  # of X3D-S
FRAMES_PER_STEP = (1, 4, 8, 16)
BATCHES = (1, 2, 4, 8)
WINDOWS = (16, 32, 64, 128, 256)
SIZES = (112, 160, 224, 312)
COMPILED = ("x3d_s", "x3d_l")
ROUNDS = 3
TURN = 30  # steps after which the states of X3D lie as before
SAMPLES = 20  # of the resident memory
Row = dict[str, Any]
note = Console(stderr=True, highlight=False).print


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="a part; may be given again")
    parser.add_argument("--frames", type=int, default=100_000, help="of the part memory")
    parser.add_argument("--steps", type=int, default=20, help="timed in each of three rounds")
    parser.add_argument("--json", type=Path, help="write the results here; parts that are there already stay")
    parser.add_argument("--chart", type=Path, help="draw them, as .png or .svg; needs matplotlib")
    args = parser.parse_args()
    if args.frames < SAMPLES or args.steps < 1:
        parser.error(f"--frames from {SAMPLES}, --steps from 1")
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.only or PARTS:
        note(f"{name} ...")
        results[name] = {"rows": apart(PARTS[name], args), "machine": machine(1)}
        show(name, results[name]["rows"])
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.chart:
        draw(results, args.chart)


def apart(part: Callable[[Any], Any], argument: Any) -> Any:
    """A part in a process of its own: what others have left in memory is not in its numbers."""
    with ProcessPoolExecutor(1, get_context("spawn"), _alone) as pool:
        return pool.submit(part, argument).result()


def _alone() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def x3d(frames: int = CLIP, size: int = SIZE) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """An X3D-S for clips of so many frames and pixels, and a clip."""
    torch.manual_seed(0)
    network = create_x3d(input_clip_length=frames, input_crop_size=size).eval()
    return network, (torch.zeros(1, 3, frames, size, size),)


def measured(models: dict[int, co3d.CompiledModel], batches: dict[int, int], steps: int) -> dict[int, Row]:
    """CPU milliseconds per frame of each stream, the models in turns; bytes of state of a stream."""
    files = {key: compiled.to_bytes() for key, compiled in models.items()}
    samples: dict[int, list[float]] = {key: [] for key in files}
    for _ in range(ROUNDS):
        for key, data in files.items():
            with co3d.StreamSession(data, batch=batches.get(key, 1), threads=1) as session:
                frames = noise(session)
                work = session.batch * (session.info.inputs[0].frames_per_step or 1)
                samples[key] += [ms / work for ms in timed(partial(session.step, frames), steps)]
            gc.collect()
    rows = {}
    for key, compiled in models.items():
        low, median, high = np.percentile(samples[key], [25, 50, 75])
        report = compiled.report()
        rows[key] = {
            "ms_per_frame": float(median),
            "quartiles": [float(low), float(high)],
            "state_mb": report.state_bytes * batches.get(key, 1) / 1e6,
            "gmac_frame": report.gmac_frame,
            "receptive_field": report.receptive_field,
        }
    return rows


def timed(call: Callable[[], object], count: int) -> list[float]:
    """CPU milliseconds of each call, after three that are not counted."""
    values = []
    for i in range(count + 3):
        start = time.process_time()
        call()
        if i >= 3:
            values.append((time.process_time() - start) * 1e3)
    return values


def noise(session: co3d.StreamSession) -> np.ndarray[Any, Any]:
    shape = resolve(session.info.inputs[0].shape, session.batch)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def frames_per_step(args: argparse.Namespace) -> list[Row]:
    """More frames in a step: convolutions over several of them, one read and one write of each state."""
    models = {n: co3d.compile(*x3d(), frames_per_step=n) for n in FRAMES_PER_STEP}
    return [{"frames_per_step": n, **row} for n, row in measured(models, {}, max(args.steps // 4, 1)).items()]


def batch(args: argparse.Namespace) -> list[Row]:
    """Streams that advance together, of one file."""
    compiled = co3d.compile(*x3d())
    rows = measured(dict.fromkeys(BATCHES, compiled), {n: n for n in BATCHES}, max(args.steps // 2, 1))
    return [{"streams": n, **row} for n, row in rows.items()]


def window(args: argparse.Namespace) -> list[Row]:
    """The head looks back on more frames; a clip model's work would grow with them."""
    models = {n: co3d.compile(*x3d(), window=n) for n in WINDOWS}
    clip = models[WINDOWS[0]].report().gmac_clip / CLIP
    return [{"window": n, **row, "gmac_clip": clip * n} for n, row in measured(models, {}, args.steps).items()]


def resolution(args: argparse.Namespace) -> list[Row]:
    """Time and state grow with the pixels, as those of any convolution do."""
    models = {n: co3d.compile(*x3d(size=n)) for n in SIZES}
    return [{"pixels_a_side": n, **row} for n, row in measured(models, {}, max(args.steps // 2, 1)).items()]


def memory(args: argparse.Namespace) -> list[Row]:
    """Resident memory over a long stream through a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    compiled = co3d.compile(network, (torch.zeros(1, 3, 16, 16, 16),))
    rows = []
    with co3d.StreamSession(compiled, threads=1) as session:
        frames = noise(session)
        each = args.frames // SAMPLES
        timed(lambda: session.step(frames), 1000)
        for sample in range(SAMPLES + 1):
            rows.append({"frames": sample * each, "resident_mb": resident() / 1e6})
            for _ in range(each if sample < SAMPLES else 0):
                session.step(frames)
    return rows


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Inside:
    """Stands for the session of ONNX Runtime, and counts the seconds inside of it."""

    def __init__(self, session: Any) -> None:
        self.session, self.seconds = session, 0.0

    def run_with_iobinding(self, binding: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - start


def overhead(args: argparse.Namespace) -> list[Row]:
    """What StreamSession.step adds to a bare run_with_iobinding, and what a copy of the frames and of the result adds.

    Wall times of three loops in turns on one session of ONNX Runtime, less what the clocks take around a bare run.
    Told apart within each step: the difference of two runs of 10 ms says nothing of 0.1 ms. Behind a run the caches
    are cold: in a loop without one the whole of it is a tenth. Frames come in several arrays, as from a decoder, or in
    one that is written again and again.
    """
    return [row for name, call in OVERHEAD.items() for row in around_a_run(name, co3d.compile(*call()), args.steps)]


def around_a_run(name: str, compiled: co3d.CompiledModel, steps: int) -> list[Row]:
    with co3d.StreamSession(compiled, threads=1) as session:
        frames = [noise(session) for _ in range(4)]
        result, held, one = np.array(session.step(frames[0])), frames[0].copy(), frames[0].copy()
        inside = session._ort = _Inside(session._ort)
        binding = session._bindings.each[0]
        binding.bind_cpu_input(session.info.inputs[0].name, held)

        def copies(frame: Any) -> None:
            held[...] = frame
            inside.run_with_iobinding(binding)
            result.copy()

        sides: dict[str, Callable[[Any], object]] = {
            "bare run": lambda _: inside.run_with_iobinding(binding),
            "two copies": copies,
            "step": session.step,
            "step, one array": lambda frame: session.step(one),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(steps):
            for side, call in sides.items():
                turn = [around(call, frames[i % len(frames)], inside) for i in range(2 * TURN)]
                times[side] += turn[TURN:]  # the first ones are behind another side
    clocks = float(np.median(times.pop("bare run")))
    rows = []
    for side, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75]) - clocks
        quartiles = [float(low), float(high)]
        rows.append({"network": name, "around a run": side, "ms": float(median), "quartiles": quartiles})
    return rows


def around(call: Callable[[Any], object], frame: Any, inside: _Inside) -> float:
    """Milliseconds of a call outside of the run."""
    inside.seconds = 0.0
    start = time.perf_counter()
    call(frame)
    return (time.perf_counter() - start - inside.seconds) * 1e3


def compiling(args: argparse.Namespace) -> list[Row]:
    """A compile, each in a process of its own."""
    return [apart(compile_one, name) for name in COMPILED]


def compile_one(name: str) -> Row:
    """Seconds and the rise of peak memory, beside the weights and all results of one clip's layers."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    module, clip = network.build().eval(), torch.zeros(network.clip_shape)
    weights = sum(p.nbytes for p in [*module.parameters(), *module.buffers()])
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = co3d.compile(module, (clip,))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    used = peak() - before
    return {
        "network": name,
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_mb": used / 1e6,
        "weights_mb": weights / 1e6,
        "clip_mb": activations(network.build().eval(), clip) / 1e6,
        "states": len(compiled.info.states),
    }


def activations(module: nn.Module, clip: torch.Tensor) -> int:
    """Bytes of all results of the layers on one clip: from shapes alone, nothing is computed."""
    sizes: list[int] = []

    def count(_: nn.Module, __: Any, result: Any) -> None:
        sizes.append(result.nbytes)

    for layer in module.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    module.to("meta")(clip.to("meta"))
    return sum(sizes)


def peak() -> int:
    """The most bytes of memory that the process has held."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def show(name: str, rows: list[Row]) -> None:
    """The rows of a part on standard output."""
    table = Table(*rows[0], title=name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for row in rows:
        table.add_row(*map(text, row.values()))
    out = Console(highlight=False)
    out.width = max(out.width, 120)
    out.print(table)


def text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(results: dict[str, Any], path: Path) -> None:
    """Milliseconds per frame (blue) and megabytes of state (gray) of each part that has them, and memory over time."""
    from matplotlib.figure import Figure

    parts = [name for name in CHARTS if name in results]
    figure = Figure(figsize=(3.1 * len(parts), 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        rows = results[name]["rows"]
        key, value = next(iter(rows[0])), CHARTS[name]
        places = [row[key] for row in rows]
        axes.plot(places, [row[value] for row in rows], "o-", color="#3b82c4", markersize=4)
        axes.set_ylim(0, 1.15 * max(row[value] for row in rows))
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(key.replace("_", " "))
        axes.set_ylabel(value.replace("_mb", " MB").replace("_", " "), color="#3b82c4")
        axes.spines["top"].set_visible(False)
        if "state_mb" in rows[0]:
            twin = axes.twinx()
            twin.plot(places, [row["state_mb"] for row in rows], "s--", color="#9aa0a8", markersize=4)
            twin.set_ylim(0, 1.15 * max(row["state_mb"] for row in rows))
            twin.set_ylabel("state MB", color="#70757c")
            twin.spines["top"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


PARTS = {
    "frames_per_step": frames_per_step,
    "batch": batch,
    "window": window,
    "resolution": resolution,
    "memory": memory,
    "overhead": overhead,
    "compile": compiling,
}
OVERHEAD: dict[str, Callable[[], Any]] = {"X3D-S": x3d, "X3D-M": partial(x3d, 16, 224)}
CHARTS = {
    "frames_per_step": "ms_per_frame",
    "batch": "ms_per_frame",
    "window": "ms_per_frame",
    "resolution": "ms_per_frame",
    "memory": "resident_mb",
}

if __name__ == "__main__":
    main()
