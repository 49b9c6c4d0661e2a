"""CPU milliseconds of a step on the targets of docs/targets.md beside ONNX Runtime's in the same turns, one thread.

Takes what is there: PyTorch eager, a torch.export archive, AOTInductor, ExecuTorch, LiteRT, onnxruntime-node, the C++
reader (ONNXRUNTIME_HOME as for its tests). A turn streams the same frames from the start, so each also compares the
numbers.

    python benchmarks/bench_targets.py x3d_s
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
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
from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.verification.exported_step import load_step

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from networks import NETWORKS  # noqa: E402

Frames = list[np.ndarray[Any, Any]]
Turn = Callable[[Frames], tuple[list[float], Any]]  # milliseconds and results of each step
IGNORED = 3  # first steps of a turn
REFERENCE = "onnxruntime"

# Both do what the examples do, on one thread: MODEL FRAMES RESULTS, a line of milliseconds per step.
NODE = """
const [model, source, target] = process.argv.slice(1), fs = require("node:fs"), ort = require("onnxruntime-node");
import("./reader.mjs").then(async ({ Stream }) => {
  const stream = await Stream.open(ort, fs.readFileSync(model), { executionProviders: ["cpu"], intraOpNumThreads: 1 });
  const size = stream.tensor(stream.info.inputs[0], 0).data.byteLength, bytes = fs.readFileSync(source), results = [];
  for (let at = 0; at < bytes.length; at += size) {
    const frame = new Float32Array(Uint8Array.from(bytes.subarray(at, at + size)).buffer), start = process.cpuUsage();
    const [{ data }] = await stream.step(frame);
    const { user, system } = process.cpuUsage(start);
    console.log((user + system) / 1e3);
    results.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  }
  fs.writeFileSync(target, Buffer.concat(results));
});
"""
CPP = """
#define main example
#include "stream.cpp"
#undef main
#include <ctime>
int main(int, char** words) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  Stream stream(words[1], 1, std::move(options));
  std::ifstream frames(words[2], std::ios::binary);
  std::ofstream results(words[3], std::ios::binary);
  while (frames.peek() != EOF) {
    const auto start = std::clock();
    stream.step(frames, results);
    std::cout << (std::clock() - start) * 1e3 / CLOCKS_PER_SEC << "\\n";
  }
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[name for name in NETWORKS if not name.startswith("r")])  # a frame a step
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn behind the warm-up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = NETWORKS[arguments.network]
    compiled = co3d.compile(network.build().eval(), (torch.rand(network.clip_shape),))
    warmup = compiled.info.warmup_steps
    shape = resolve(compiled.info.inputs[0].shape, 1)
    generator = np.random.default_rng(0)
    frames = [generator.standard_normal(shape, dtype=np.float32) for _ in range(warmup + arguments.steps)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = measure(targets(compiled, Path(folder)), frames, warmup, arguments.rounds)
    print(f"{arguments.network}, onnxruntime {ort.__version__}, PyTorch {torch.__version__}, {arguments.rounds} rounds")
    for name, row in rows.items():
        print(f"{name:16} {row['cpu_ms']:7.2f} ms  {row['of_onnxruntime']:.2f}  error {row['error']:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(turns: dict[str, Turn], frames: Frames, warmup: int, rounds: int) -> dict[str, Any]:
    """Per target: the 10th percentile of its steps, and the median over rounds of the ratio to the reference's."""
    spent: dict[str, list[float]] = {name: [] for name in turns}
    errors = dict.fromkeys(turns, 0.0)
    for _ in range(rounds):
        expected: Any = None
        for name, turn in turns.items():
            times, results = turn(frames)
            settled = np.stack([np.ravel(result) for result in results])[warmup:]
            expected = settled if expected is None else expected  # the reference is the first
            errors[name] = max(errors[name], float(np.abs(settled - expected).max() / expected.std()))
            spent[name].append(float(np.percentile(times[IGNORED:], 10)))
    base = np.array(spent[REFERENCE])
    return {
        name: {"cpu_ms": float(np.median(times)), "of_onnxruntime": float(np.median(times / base)),
               "ratios": (times / base).round(3).tolist(), "error": errors[name]}
        for name, times in spent.items()
    }  # fmt: skip


def targets(compiled: Any, folder: Path) -> dict[str, Turn]:
    """The targets that are there, the reference first."""
    model = compiled.save(folder / "model.onnx")
    found: dict[str, Turn] = {REFERENCE: lambda frames: session(model, frames)}
    step = compiled.to_module()
    state = step.initial_state(1)
    found["eager"] = positional(lambda frame, *values: flat(step(frame, state=values)), state)
    archive, _ = load_step(compiled.save_exported_program(folder / "step.pt2"))
    found["torch.export"] = positional(archive, state)
    program = compiled.to_exported_program(batch=1)
    if shutil.which("g++"):
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "step.aoti.pt2"))
        found["aotinductor"] = positional(torch._inductor.aoti_load_package(package), state)
    if importlib.util.find_spec("executorch"):
        program = compiled.to_exported_program(batch=1, executorch=True)
        found["executorch"] = positional(executorch(program, folder / "step.pte"), state)
    if importlib.util.find_spec("litert_torch"):
        found["litert"] = litert(model, compiled.info, folder / "step.tflite")
    if (EXAMPLES / "node" / "node_modules" / "onnxruntime-node").exists():
        found["node"] = process(["node", "-e", NODE], model, folder)
    if command := cpp(folder):
        found["c++"] = process(command, model, folder)
    return found


def session(model: Path, frames: Frames) -> tuple[list[float], Any]:
    with co3d.StreamSession(model, threads=1) as stream:
        return timed(stream.step, frames)


def timed(step: Callable[[Any], Any], frames: Frames) -> tuple[list[float], Any]:
    times, results = [], []
    for frame in frames:
        start = time.process_time()
        results.append(step(frame))
        times.append((time.process_time() - start) * 1e3)
    return times, results


def positional(call: Callable[..., Any], initial: tuple[Any, ...]) -> Turn:
    """Turns of a program of which the first result is the answer, the others the next states."""

    def turn(frames: Frames) -> tuple[list[float], Any]:
        state = list(initial)

        def step(frame: Any) -> Any:
            nonlocal state
            answer, *state = call(torch.from_numpy(frame), *state)
            return answer.numpy()

        return timed(step, frames)

    return turn


def flat(values: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    return values[0], *values[1]


def executorch(program: Any, path: Path) -> Callable[..., Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    loaded = Runtime.get().load_program(path)  # a method does not keep its program alive
    method = loaded.load_method("forward")
    return lambda *values, _loaded=loaded: [value.clone() for value in method.execute(values)]


def litert(model: Path, info: Contract, path: Path) -> Turn:
    """Turns of the reader in examples/litert; its frames have their channels last where the file's have."""
    sys.path.insert(0, str(EXAMPLES / "litert"))
    from stream import Stream

    from co3d_compile.targets.litert import write_tflite

    stream = Stream(str(write_tflite(model, info, path)))
    print(f"litert: channels last: {stream.info['channels_last']}")
    last = stream.info["channels_last"]

    def turn(frames: Frames) -> tuple[list[float], Any]:
        stream.reset()
        turned = [np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last and x.ndim == 4 else x for x in frames]
        return timed(lambda frame: stream.step(frame)[0], turned)

    return turn


def cpp(folder: Path) -> list[str]:
    """The command of the C++ driver, nothing where it cannot be built."""
    home = os.environ.get("ONNXRUNTIME_HOME")
    if home is None or shutil.which("g++") is None:
        return []
    (folder / "driver.cpp").write_text(CPP)
    build = ["g++", "-std=c++17", "-O2", "-w", "driver.cpp", "-o", "driver", "-I", f"{home}/include"]
    build += ["-I", str(EXAMPLES / "cpp"), "-L", f"{home}/lib", f"-Wl,-rpath,{home}/lib", "-lonnxruntime"]
    subprocess.run(build, cwd=folder, check=True)
    return [str(folder / "driver")]


def process(command: list[str], model: Path, folder: Path) -> Turn:
    """Turns of a program with the arguments of the readers in examples/, each a process of its own."""

    def turn(frames: Frames) -> tuple[list[float], Any]:
        source, target = folder / "frames.bin", folder / "results.bin"
        source.write_bytes(b"".join(frame.tobytes() for frame in frames))
        words = [*command, str(model), str(source), str(target)]
        done = subprocess.run(words, cwd=EXAMPLES / "node", check=True, stdout=subprocess.PIPE, text=True)
        return [float(line) for line in done.stdout.split()], np.fromfile(target, np.float32).reshape(len(frames), -1)

    return turn


if __name__ == "__main__":
    main()
