"""A compiled file in ONNX Runtime on the CPU beside OpenVINO: its provider, states as inputs, its own form of state.

Takes turns among the forms that this environment has (docs/openvino.md), one thread, and gives CPU milliseconds of a
step: on a machine that others use too they say more than the wall clock. Also compares the numbers.

    python benchmarks/bench_openvino.py MODEL.onnx
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import co3d_compile as co3d
from co3d_compile.contract.model_contract import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
PROVIDER = "OpenVINOExecutionProvider"
Step = Callable[..., Any]


def forms(path: str) -> dict[str, Step]:
    """The ways to run a step that are there."""
    found: dict[str, Step] = {"onnxruntime CPU": co3d.StreamSession(path, threads=1).step}
    if PROVIDER in ort.get_available_providers():
        options = {"device_type": "CPU", "precision": "FP32", "num_of_threads": "1"}
        found["onnxruntime OpenVINO"] = co3d.StreamSession(path, providers=[(PROVIDER, options)], threads=1).step
    if importlib.util.find_spec("openvino"):
        from openvino_stateful import OpenVINOStream

        found["openvino, states as inputs"] = OpenVINOStream(path, threads=1, stateful=False).step
        found["openvino, stateful"] = OpenVINOStream(path, threads=1).step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    steps = forms(arguments.model)
    with co3d.StreamSession(arguments.model) as session:
        shapes = [resolve(item.shape, 1) for item in session.info.inputs]
        warmup = session.info.warmup_steps
    errors = compare(steps, shapes, warmup + 3)
    spent: dict[str, list[float]] = {name: [] for name in steps}
    frames = [np.random.default_rng(0).standard_normal(shape, dtype=np.float32) for shape in shapes]
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            step(*frames)
            start = time.process_time()
            for _ in range(arguments.steps):
                step(*frames)
            spent[name].append((time.process_time() - start) / arguments.steps * 1e3)
    base = np.percentile(spent["onnxruntime CPU"], 10)
    rows = {
        name: {"cpu_ms": float(np.percentile(times, 10)), "of_cpu_provider": float(np.percentile(times, 10) / base),
               "quartiles": [float(q) for q in np.percentile(times, [25, 50, 75])], "error": errors[name]}
        for name, times in spent.items()
    }  # fmt: skip
    print(f"onnxruntime {ort.__version__}, openvino {version('openvino')}, {arguments.rounds} rounds, one thread")
    for name, row in rows.items():
        print(f"{name:28} {row['cpu_ms']:7.2f} ms  {row['of_cpu_provider']:.2f}  error {row['error']:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(steps: dict[str, Step], shapes: list[tuple[int, ...]], count: int) -> dict[str, float]:
    """Largest error of each form beside the first, in standard deviations of the results."""
    generator = np.random.default_rng(1)
    streams = [[generator.standard_normal(shape, dtype=np.float32) for shape in shapes] for _ in range(count)]
    results = {name: [np.ravel(first(step(*frames))) for frames in streams][-3:] for name, step in steps.items()}
    expected = np.stack(next(iter(results.values())))
    return {name: float(np.abs(np.stack(rows) - expected).max() / expected.std()) for name, rows in results.items()}


def first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def version(package: str) -> str:
    return metadata.version(package) if importlib.util.find_spec(package) else "not installed"


if __name__ == "__main__":
    main()
