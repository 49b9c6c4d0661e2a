"""CPU milliseconds of a step in LiteRT beside StreamSession's in the same turns, one thread: what the time goes to.

    python benchmarks/bench_litert.py x3d_s

For both layouts of inputs and states: the reader of examples/litert, which hands buffers on; a run alone, whose states
stay as they are; and TensorFlow Lite's older interpreter with each state copied once, from view to view. Two more sides
say what a difference means: a second session of the same file, and the reader with XNNPACK's cache of packed weights.
The sides take turns in an order that is drawn anew each round. The environment is the one that `make test-targets`
makes: build/targets/litert/bin/python.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_targets import EXAMPLES, IGNORED, Frames, timed

import co3d_compile as co3d
from co3d_compile.contract.model_contract import resolve
from co3d_compile.targets.litert import Options, write_tflite

sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "litert")]
from networks import NETWORKS  # noqa: E402


class Viewed:
    """The older interpreter: views of its tensors, and a copy of each state."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter
        from stream import contract

        self.info = contract(path.read_bytes())
        self.interpreter = Interpreter(model_path=str(path), num_threads=1)
        self.interpreter.allocate_tensors()
        runner = self.interpreter.get_signature_runner(self.info["signature"])
        details = {**runner.get_input_details(), **runner.get_output_details()}
        self.places = {name: detail["index"] for name, detail in details.items()}
        self.moves = in_order({state["input"]: state["output"] for state in self.info["states"]})
        for state in self.info["states"]:
            self._view(state["input"])[...] = state["initial"]

    def step(self, frame: Any) -> Any:
        """Takes the next frame, and returns the answer."""
        self._view(self.info["inputs"][0]["name"])[...] = frame
        self.interpreter.invoke()
        for target, source in self.moves:
            np.copyto(self._view(target), self._view(source))
        return self._view(self.info["outputs"][0]["name"]).copy()

    def _view(self, name: str) -> Any:
        return self.interpreter.tensor(self.places[name])()


def in_order(sources: dict[str, str]) -> list[tuple[str, str]]:
    """The moves of states, so that none is overwritten before it has moved on."""
    found: list[tuple[str, str]] = []
    while len(found) < len(sources):
        left = {target: source for target, source in sources.items() if (target, source) not in found}
        found += [(target, source) for target, source in left.items() if target not in left.values()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=[name for name in NETWORKS if not name.startswith("r")])  # a frame a step
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = NETWORKS[arguments.network]
    compiled = co3d.compile(network.build().eval(), (torch.rand(network.clip_shape),))
    shape = resolve(compiled.info.inputs[0].shape, 1)
    generator = np.random.default_rng(0)
    frames = [generator.standard_normal(shape, dtype=np.float32) for _ in range(arguments.steps)]
    with tempfile.TemporaryDirectory() as folder:
        steps = sides(compiled, Path(folder), frames)
        spent: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for at in generator.permutation(len(steps)):
                name, (step, given) = list(steps.items())[at]
                spent[name].append(float(np.percentile(timed(step, given)[0][IGNORED:], 10)))
    base = np.array(spent["StreamSession"])
    for name, times in spent.items():
        ratios = times / base
        print(
            f"{name:44} {np.median(times):6.2f} ms  {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        )


def sides(compiled: Any, folder: Path, frames: Frames) -> dict[str, tuple[Any, Frames]]:
    """What is timed: a step, and the frames that it takes."""
    from stream import Stream

    from co3d_compile.targets.litert_file import transposed_bytes

    model = compiled.save(folder / "model.onnx")
    names = "StreamSession", "another StreamSession"
    found: dict[str, tuple[Any, Frames]] = {n: (co3d.StreamSession(model, threads=1).step, frames) for n in names}
    for layout in ("channels-first", "channels-last"):
        path = write_tflite(model, compiled.info, folder / f"{layout}.tflite", options=Options(tensors=layout))
        print(f"{layout}: transposes write {transposed_bytes(path.read_bytes()) / 1e6:.1f} MB in a step")
        last = layout == "channels-last"
        given = [np.ascontiguousarray(np.moveaxis(x, 1, -1)) for x in frames] if last else frames
        alone = Stream(str(path))
        alone.chains = []
        found[f"{layout}: the reader"] = (Stream(str(path)).step, given)
        cached = Stream(str(path), xnnpack_weight_cache_path=str(folder / f"{layout}.cache"))
        found[f"{layout}: the reader, weights cached"] = (cached.step, given)
        found[f"{layout}: a run alone"] = (alone.step, given)
        found[f"{layout}: states copied"] = (Viewed(path).step, given)
    return found


if __name__ == "__main__":
    main()
