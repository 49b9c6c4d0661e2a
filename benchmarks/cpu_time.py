"""CPU milliseconds per run of ONNX files, on one thread, taking turns: comparable on a machine that others use too.

Bare runs with bound buffers, so state slots are not moved: what is compared is the graph, not the session.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=4, help="times that each file gets its turn")
    parser.add_argument("--runs", type=int, default=10, help="runs in a turn")
    args = parser.parse_args()
    samples: dict[Path, list[float]] = {path: [] for path in args.files}
    for _ in range(args.rounds):
        for path in args.files:
            samples[path] += turn(path, args.runs)
    for path, values in samples.items():
        low, median = np.percentile(values, [10, 50])
        print(f"{path}: 10th percentile {low:.2f}, median {median:.2f}")


def turn(path: Path, runs: int) -> list[float]:
    """Milliseconds of CPU time of each run; the session lives for this turn only."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = []
    for items, bind in (
        (session.get_inputs(), binding.bind_ortvalue_input),
        (session.get_outputs(), binding.bind_ortvalue_output),
    ):
        for item in items:
            shape = [size if isinstance(size, int) else 1 for size in item.shape]
            noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            values.append(ort.OrtValue.ortvalue_from_numpy(noise))
            bind(item.name, values[-1])
    milliseconds = []
    for i in range(runs + 2):
        start = time.process_time()
        session.run_with_iobinding(binding)
        if i > 1:
            milliseconds.append((time.process_time() - start) * 1e3)
    del session, binding, values
    gc.collect()
    return milliseconds


if __name__ == "__main__":
    main()
