"""CPU seconds of compiling a network, read from PyTorch and from ONNX, and of verifying it, taking turns.

compile_time.py x3d_s x3d_m --rounds 5      seconds of each, and their ratio to compiling from PyTorch

Comparable on a machine that others use too: only the time of this process counts. The ONNX file is exported before,
and is not part of it. One turn of each side is not counted: the first one also loads PyTorch's tables.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo.real import REAL

import co3d_compile as co3d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=sorted(REAL))
    parser.add_argument("--rounds", type=int, default=5, help="times that each side gets its turn")
    parser.add_argument("--small", action="store_true", help="few channels and pixels, as in the tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in args.networks:
        compare(name, args.small, args.rounds)


def compare(name: str, small: bool, rounds: int) -> None:
    """Prints the medians of one network."""
    network, clip = REAL[name].build(small).eval(), tuple(REAL[name].entry(small).examples())
    with tempfile.TemporaryDirectory() as folder:
        files = {f"ONNX, {how} exporter": Path(folder) / f"{how}.onnx" for how in ("old", "new")}
        for how, path in files.items():
            torch.onnx.export(network, clip, str(path), dynamo="new" in how, verbose=False)
        compiled = [co3d.compile(network, clip)]
        sides: dict[str, Callable[[], object]] = {
            "PyTorch": lambda: compiled.append(co3d.compile(network, clip)),
            "verification": lambda: co3d.verify(compiled.pop(), network, clip),
        }
        sides |= {how: lambda path=path: co3d.compile(path) for how, path in files.items()}  # type: ignore[misc]
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):
            for side, run in sides.items():
                gc.collect()
                start = time.process_time()
                run()
                if turn:
                    seconds[side].append(time.process_time() - start)
    first = statistics.median(seconds["PyTorch"])
    for side, values in seconds.items():
        median = statistics.median(values)
        print(f"{name}, {side}: median {median:.2f} s, least {min(values):.2f} s, {median / first:.2f} of PyTorch's")


if __name__ == "__main__":
    main()
