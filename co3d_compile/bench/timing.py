"""Milliseconds per call of one side of a comparison, in a process of its own. Needs neither torch nor onnx.

A process of its own: the threads of an idle ONNX Runtime session spin and slow down the one that runs, and what a side
takes in memory can be told. :func:`turn` starts it; what it runs is this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort

from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.runtime.running_model import Layout
from co3d_compile.support.cpu_session import cpu_session
from co3d_compile.support.machine import block_channels, cpu_name
from co3d_compile.support.memory import peak_memory
from co3d_compile.support.plain_types import Array, JsonObject

WARM_UP = 3  # calls that are not counted, and the fewest that are
PACKAGES = ("co3d-compile", "onnxruntime", "torch", "onnx", "onnxscript", "numpy", "openvino")
Feeds: TypeAlias = dict[str, Array]
Call = Callable[[], object]
Progress = Callable[[str, int, int], None]
SIDES = {
    "pytorch": "clip model in PyTorch, a clip per answer",
    "clip": "clip model in ONNX Runtime, a clip per answer",
    "window": "the same on a window of frames that moves",
    "openvino": "clip model in OpenVINO at its default precision, a clip per answer, if it is installed",
    "openvino32": "the same in float32",
    "step": "compiled, as a session runs it by itself",
    "plain": "compiled, as the file is",
    "floor": "one tap over time, no state",
}
COMPILED = ("step", "plain")
CLIPS = ("pytorch", "clip", "openvino", "openvino32")  # what a user could pick instead


@dataclass(frozen=True)
class Turn:
    """One turn of one side: milliseconds of each call, and bytes of memory that it took at most."""

    milliseconds: list[float]
    memory: int


def turn(kind: str, path: Path, seconds: float, threads: int, take: int = 1) -> Turn:
    """Times calls for some seconds, in a process of its own.

    Args:
        kind: ``"step"``: a compiled file in a StreamSession; ``"plain"``: as the file is. ``"clip"``: an ONNX file on
            its inputs. ``"window"``: the same on a window that moves by ``take`` frames before each call.
            ``"openvino"``: an ONNX file in OpenVINO at its default precision; ``"openvino32"``: in float32.
            ``"pytorch"``: a torch.export archive.
        path: The file.
        seconds: How long.
        threads: Of the runtime.

    Raises:
        Co3dError: The process failed; the message is its last line.
    """
    words = [kind, str(path), str(seconds), str(threads), str(take)]
    done = subprocess.run([sys.executable, "-m", "co3d_compile.bench.timing", *words], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Co3dError(f"Timing {path.name} failed: {last}")
    return Turn(**json.loads(done.stdout.splitlines()[-1]))


def bench_file(
    path: Path, *, rounds: int = 3, seconds: float = 1.0, threads: int = 2, progress: Progress | None = None
) -> JsonObject:
    """Times a compiled file alone, as :func:`co3d_compile.bench.bench_model.bench` does.

    Raises:
        Co3dError: The file cannot be opened or run.
    """
    from co3d_compile.runtime.session import StreamSession

    with StreamSession(path) as session:
        info, layout = session.info, session.layout
    frames = next(iter(info.frames_per_step.values()), 1)
    files = {"step": ("step", path)} | ({"plain": ("plain", path)} if layout == "native" else {})
    timed = time_in_turns(files, rounds, seconds, threads, frames, progress or (lambda *_: None))
    return {"frames_per_step": dict(info.frames_per_step), "warmup_steps": info.warmup_steps, **timed}


def time_in_turns(
    files: Mapping[str, tuple[str, Path]],
    rounds: int,
    seconds: float,
    threads: int,
    frames: int,
    say: Progress,
    left_out: Mapping[str, str] | None = None,
) -> JsonObject:
    """Lets the sides take turns, so that what else the machine does hits all alike, and sums up.

    Args:
        files: By side the kind of a :func:`turn`, and the file.
        frames: That a step takes.
        left_out: Sides that have no file, and why. If it is given, a side that fails is left out too.

    Raises:
        UsageError: There is no side to time. Co3dError: One failed, and ``left_out`` is None.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in files}
    failed = dict(left_out or {})
    for i, (name, (kind, path)) in enumerate(list(files.items()) * rounds):
        say(f"time {name}", i, rounds * len(files))
        if name in failed:
            continue
        try:
            turns[name].append(turn(kind, path, seconds, threads, frames))
        except Co3dError as error:
            if left_out is None:
                raise
            failed[name] = str(error)
            del turns[name]
    if not turns:
        raise UsageError("There is no side to time.", hint=" ".join(failed.values()) or None)
    return {
        "sides": {name: summary(samples, frames) for name, samples in turns.items()},
        "left_out": failed,
        "ratios": ratios(turns),
        "rounds": rounds,
        "seconds": seconds,
        "machine": machine(threads),
    }


def summary(turns: Sequence[Turn], frames: int) -> JsonObject:
    """Sums up the milliseconds per frame: median and quartiles over all calls, of each turn; calls; peak memory."""
    samples = np.concatenate([t.milliseconds for t in turns]) / frames
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "round_medians": [float(np.median(t.milliseconds)) / frames for t in turns],
        "calls": len(samples),
        "memory": max(t.memory for t in turns),
    }


def ratios(turns: Mapping[str, Sequence[Turn]]) -> dict[str, float]:
    """Computes medians over the rounds of ratios of medians: ``clip/step`` is how much faster a step is.

    ``fastest clip/step``: over whatever runs the clip model fastest in that round.
    """
    medians = {name: [float(np.median(t.milliseconds)) for t in each] for name, each in turns.items()}

    def ratio(a: str, b: str) -> float:
        return float(np.median([x / y for x, y in zip(medians[a], medians[b], strict=True)]))

    found = {
        f"{a}/{b}": ratio(a, b) for a in medians for b in COMPILED if a not in (*COMPILED, "floor") and b in medians
    }
    clips = [medians[a] for a in CLIPS if a in medians]
    if clips and "step" in medians:
        medians["fastest clip"] = [min(round) for round in zip(*clips, strict=True)]
        found["fastest clip/step"] = ratio("fastest clip", "step")
    return found | {f"{a}/floor": ratio(a, "floor") for a in COMPILED if a in medians and "floor" in medians}


def machine(threads: int) -> JsonObject:
    """Describes what the numbers were taken on."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "channels_per_block": block_channels(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _step(path: str, threads: int, take: int, layout: Layout = "auto") -> Call:
    from co3d_compile.runtime.session import StreamSession

    session = StreamSession(path, threads=threads, layout=layout)
    frames = tuple(
        _noise([d if isinstance(d, int) else 1 for d in spec.shape], spec.dtype) for spec in session.info.inputs
    )
    return lambda: session.step(frames)


def _clip(path: str, threads: int, take: int) -> Call:
    session, feeds = _plain(path, threads)
    return partial(session.run, None, feeds)


def _window(path: str, threads: int, take: int) -> Call:
    session, feeds = _plain(path, threads)
    fresh = {name: clip[:, :, :take].copy() for name, clip in feeds.items() if clip.ndim > 2}

    def call() -> object:
        for name, frames in fresh.items():
            feeds[name] = np.concatenate([feeds[name][:, :, take:], frames], 2)
        return session.run(None, feeds)

    return call


def _openvino(path: str, threads: int, take: int, precision: str | None = None) -> Call:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    model = openvino.Core().compile_model(path, "CPU", options)
    request = model.create_infer_request()
    feeds = {}
    for i in model.inputs:
        shape = [d.get_length() if d.is_static else 1 for d in i.partial_shape]
        feeds[i.any_name] = _noise(shape, i.element_type.to_dtype().name)
    return lambda: request.infer(feeds, share_inputs=True)


def _pytorch(path: str, threads: int, take: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    program = torch.export.load(path)
    module, (args, kwargs) = program.module(), program.example_inputs
    no_grad = torch.inference_mode()
    no_grad.__enter__()
    return lambda: module(*args, **kwargs)


def _plain(path: str, threads: int) -> tuple[ort.InferenceSession, Feeds]:
    session = cpu_session(path, threads=threads)
    dtypes = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(int64)": "int64"}
    feeds = {
        i.name: _noise([d if isinstance(d, int) else 1 for d in i.shape], dtypes[i.type]) for i in session.get_inputs()
    }
    return session, feeds


def _noise(shape: Sequence[int], dtype: str) -> Array:
    if dtype.startswith("int"):  # an index or a counter
        return np.zeros(shape, dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _main(kind: str, path: str, seconds: str, threads: str, take: str) -> None:
    before = peak_memory()
    sides: dict[str, Callable[[str, int, int], Call]] = {
        "step": _step,
        "plain": partial(_step, layout="plain"),
        "clip": _clip,
        "window": _window,
        "openvino": _openvino,
        "openvino32": partial(_openvino, precision="f32"),
        "pytorch": _pytorch,
    }
    call = sides[kind](path, int(threads), int(take))
    milliseconds: list[float] = []
    for _ in range(WARM_UP):
        call()
    end = time.perf_counter() + float(seconds)
    while len(milliseconds) < WARM_UP or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - start) * 1e3)
    print(json.dumps({"milliseconds": milliseconds, "memory": peak_memory() - before}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
