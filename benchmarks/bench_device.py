"""Clip model, compiled step and floor of X3D-S on a graphics card, or any provider of ONNX Runtime, for many streams.

One command for a machine that has such a card; it takes less than eight minutes:

    python benchmarks/bench_device.py --provider cuda --json build/device.json

For each number of streams: milliseconds of a clip, of a step in ``StreamSession`` (its states lie on the device) and of
the floor; the microseconds that the session adds to a bare run; how far the results are from those of the CPU. With
``cuda`` the step is also run as CUDA graphs, one for each place of the states.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import co3d_compile as co3d
from co3d_compile.bench.one_tap_floor import floor_passes
from co3d_compile.errors import Co3dError
from co3d_compile.runtime.open_model import Provider
from co3d_compile.support.machine import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from networks import NETWORKS

Array = np.ndarray[Any, Any]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
}
GRAPHS: dict[str, dict[str, str]] = {"cuda": {"enable_cuda_graph": "1"}}
WARM = 5  # calls that are not counted
COMPARED = 4  # steps behind the warm-up
WIDTHS = (7, 9, 9, 9, 9, 10, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--network", choices=NETWORKS, default="x3d_s")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each row is timed")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    provider = PROVIDERS[arguments.provider]
    if provider not in ort.get_available_providers():
        raise SystemExit(f"This onnxruntime has no {provider}: it has {', '.join(ort.get_available_providers())}.")
    torch.manual_seed(0)
    network = NETWORKS[arguments.network]
    module, clip = network.build().eval(), (torch.rand(network.clip_shape),)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        print("compiling", flush=True)
        files = written(module, clip, Path(folder))
        print(f"{arguments.network} on {provider}, onnxruntime {ort.__version__}, {cpu_name()}")
        heads = zip(
            ("streams", "clip ms", "step ms", "graph ms", "floor ms", "session us", "error"), WIDTHS, strict=True
        )
        print(" ".join(f"{head:>{width}}" for head, width in heads))
        for streams in arguments.streams:
            rows.append(measured(files, arguments.provider, streams, network.clip_shape, arguments.seconds))
            print(line(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"network": arguments.network, "provider": provider, "onnxruntime": ort.__version__}
        arguments.json.write_text(json.dumps({**facts, "machine": cpu_name(), "rows": rows}, indent=2) + "\n")


def written(module: torch.nn.Module, clip: tuple[torch.Tensor, ...], folder: Path) -> dict[str, Path]:
    """The files: the clip model for any batch, the step, and the floor."""
    batch = torch.export.Dim("batch")
    two = torch.cat([clip[0], clip[0]])
    program = torch.export.export(module, (two,), dynamic_shapes=({0: batch},))
    torch.onnx.export(program, (), folder / "clip.onnx", dynamo=True, verbose=False)
    step = co3d.compile(module, clip, state_io="renamed").save(folder / "step.onnx")
    floor = co3d.compile(module, clip, window=1, passes=floor_passes()).save(folder / "floor.onnx")
    return {"clip": folder / "clip.onnx", "step": step, "floor": floor}


def measured(files: dict[str, Path], name: str, streams: int, clip: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """One row; a side that cannot be run is None."""
    plain: list[Provider] = [PROVIDERS[name]]
    graphs: list[Provider] = [(PROVIDERS[name], GRAPHS[name])] if name in GRAPHS else []
    row: dict[str, Any] = {"streams": streams}
    row["clip_ms"] = tried(lambda: clip_ms(files["clip"], plain, streams, clip, seconds))
    row["step_ms"] = tried(lambda: step_ms(files["step"], plain, streams, seconds))
    row["graph_ms"] = tried(lambda: step_ms(files["step"], graphs, streams, seconds)) if graphs else None
    row["floor_ms"] = tried(lambda: step_ms(files["floor"], plain, streams, seconds))
    row["session_us"] = tried(lambda: session_us(files["step"], graphs or plain, streams, seconds))
    row["error"] = tried(lambda: error(files["step"], graphs or plain, streams))
    return row


def tried(measure: Callable[[], float]) -> float | None:
    """A figure, or None with the reason on standard error."""
    try:
        return measure()
    except (Co3dError, RuntimeError, MemoryError) as reason:
        print(f"  left out: {str(reason).splitlines()[0][:200]}", file=sys.stderr)
        return None


def timed(call: Callable[[], object], seconds: float) -> float:
    """The median milliseconds of a call."""
    for _ in range(WARM):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def clip_ms(path: Path, providers: list[Provider], streams: int, shape: tuple[int, ...], seconds: float) -> float:
    session = ort.InferenceSession(str(path), providers=providers)
    feed = {session.get_inputs()[0].name: np.zeros((streams, *shape[1:]), np.float32)}
    return timed(lambda: session.run(None, feed), seconds)


def frame_of(session: co3d.StreamSession) -> Array:
    return np.zeros((session.batch, *map(int, session.info.inputs[0].shape[1:])), np.float32)


def step_ms(path: Path, providers: list[Provider], streams: int, seconds: float) -> float:
    with co3d.StreamSession(path, streams, providers) as session:
        frame = frame_of(session)
        return timed(lambda: session.step(frame), seconds)


def session_us(path: Path, providers: list[Provider], streams: int, seconds: float) -> float:
    """What a session adds to a bare run of the same binding, in microseconds."""
    with co3d.StreamSession(path, streams, providers) as session:
        frame, bindings = frame_of(session), session._bindings
        whole = timed(lambda: session.step(frame), seconds / 2)
        phase = session._states.phase
        binding, options = bindings.each[phase], bindings.run_options[phase]
        return (whole - timed(lambda: session._ort.run_with_iobinding(binding, options), seconds / 2)) * 1e3


def error(path: Path, providers: list[Provider], streams: int) -> float:
    """The largest difference from the CPU's results, in standard deviations of these."""
    with co3d.StreamSession(path, streams, providers) as here, co3d.StreamSession(path, streams) as there:
        generator = np.random.default_rng(0)
        pairs = []
        for _ in range(there.info.warmup_steps + COMPARED):
            frame = np.asarray(generator.standard_normal(frame_of(there).shape), np.float32)
            pairs.append((np.asarray(here.step(frame)), np.asarray(there.step(frame))))
    one, other = (np.stack(side) for side in zip(*pairs[-COMPARED:], strict=True))
    return float(np.abs(one - other).max() / other.std())


def line(row: dict[str, Any]) -> str:
    def text(key: str, width: int, form: str) -> str:
        return f"{'-' if row[key] is None else format(row[key], form):>{width}}"

    times = " ".join(text(key, 9, ".2f") for key in ("clip_ms", "step_ms", "graph_ms", "floor_ms"))
    return f"{row['streams']:>7} {times} {text('session_us', 10, '.0f')} {text('error', 8, '.0e')}"


if __name__ == "__main__":
    main()
