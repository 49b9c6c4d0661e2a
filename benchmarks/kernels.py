"""Where the milliseconds of a step go: ONNX Runtime's kernels by operator, of each form of a network.

    kernels.py x3d_m --threads 2

By module, for a model of your own: `co3d run --profile` and `co3d inspect --profile`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import co3d_compile as co3d
from co3d_compile.bench.one_tap_floor import floor_passes
from co3d_compile.report.profile_times import KernelTimes, read_times
from co3d_compile.runtime.running_model import Layout
from co3d_compile.support.machine import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from networks import NETWORKS
from scaling import noise

STEPS = 101  # a profile holds the first 100, and what it says of the first is not counted
MOST = 12  # operators that have a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder, console.status(args.network) as status:
        times = {}
        for form, (compiled, layout) in forms(args.network).items():
            status.update(f"{args.network}: {form}")
            times[form] = profiled(compiled, layout, Path(folder, f"{form}.onnx"), args.threads)
    show(times)
    Console(highlight=False).print(f"Milliseconds of one step. {cpu_name()}, {args.threads} threads.")


def forms(name: str) -> dict[str, tuple[co3d.CompiledModel, Layout]]:
    """The forms that bench_clip_vs_step.py times."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    module, clip = network.build().eval(), (torch.zeros(network.clip_shape),)
    compiled = co3d.compile(module, clip)
    floor = co3d.compile(module, clip, window=1, passes=floor_passes())
    return {"step": (compiled, "auto"), "plain": (compiled, "plain"), "floor": (floor, "auto")}


def profiled(compiled: co3d.CompiledModel, layout: Layout, path: Path, threads: int) -> KernelTimes:
    compiled.save(path)
    profile = path.with_suffix(".json")
    with co3d.StreamSession(path, threads=threads, profile=profile, layout=layout) as session:
        frames = noise(session)
        for _ in range(STEPS):
            session.step(frames)
    return read_times(profile, path)


def show(times: dict[str, KernelTimes]) -> None:
    """Operators by falling time in the first form: kernels in a step, and their milliseconds."""
    table = Table("operator", *times, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    operators = dict.fromkeys(name for t in times.values() for name, _ in t.by_operator.most_common(MOST))
    for name in operators:
        table.add_row(name, *(cell(t.by_operator[name], t.kernels[name], t.steps) for t in times.values()))
    table.add_row("all", *(cell(t.total, t.kernels.total(), t.steps) for t in times.values()))
    Console(highlight=False).print(table)


def cell(microseconds: int, kernels: int, steps: int) -> str:
    return f"{microseconds / steps / 1e3:.2f} ({kernels / steps:.0f})" if kernels else ""


if __name__ == "__main__":
    main()
