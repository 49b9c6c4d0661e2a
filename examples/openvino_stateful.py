"""A compiled model in OpenVINO with its own form of state: OpenVINO keeps the states inside the inference request.

    pip install openvino
    python examples/openvino_stateful.py MODEL.onnx

Needs OpenVINO and numpy, neither ONNX Runtime nor this package: the metadata is in the file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as operators
from openvino._offline_transformations import apply_make_stateful_transformation

VIEWS = {"Identity", "Reshape", "Squeeze", "Unsqueeze"}


def copy_moved(model: ov.Model) -> None:
    """Copies inputs that are the next value of a state as they are, or in another shape (a state that moves by a slot).

    Without it OpenVINO's CPU plugin (2026.4) may overwrite such a state before it is read: wrong numbers, no error.
    An operator that changes nothing, and that the plugin does not remove, is such a copy.
    """
    for result in model.get_results():
        moved = result.input_value(0)
        source = moved
        while source.get_node().get_type_name() in VIEWS:
            source = source.get_node().input_value(0)
        if source.get_node().get_type_name() != "Parameter":
            continue
        kind, names = moved.get_element_type(), moved.get_names()
        if kind == ov.Type.boolean:
            raise ValueError(f"OpenVINO may overwrite the flags that move to {', '.join(names)}: use stateful=False.")
        # OpenVINO has whole numbers of 64 bits in 32.
        most = np.inf if kind.is_real() else min(np.iinfo(kind.to_dtype()).max, np.iinfo(np.int32).max)
        copy = operators.minimum(moved, operators.constant(np.array(most, kind.to_dtype())))
        result.input(0).replace_source_output(copy.output(0))
        if moved.get_node().get_type_name() != "Parameter":
            moved.set_names(set())
            copy.output(0).set_names(names)


class OpenVINOStream:
    """A compiled model and the state of ``batch`` streams that advance together.

    Args:
        path: A file compiled with ``--state-io paired``.
        batch: Number of streams.
        threads: CPU threads of one step; default OpenVINO's choice.
        device: OpenVINO's name of the device.
        stateful: False leaves the states as inputs and outputs, handed on by this class.
        precision: "bf16" calculates in bfloat16 where the CPU does.

    Raises:
        ValueError: The file was not compiled by co3d-compile, or with ``--state-io renamed``.
    """

    def __init__(
        self,
        path: str | Path,
        batch: int = 1,
        threads: int | None = None,
        device: str = "CPU",
        stateful: bool = True,
        precision: str = "f32",
    ) -> None:
        core = ov.Core()
        model = core.read_model(path)
        if not model.has_rt_info(["framework", "co3d"]):
            raise ValueError(f"{path} was not compiled by co3d-compile.")
        self.info: dict[str, Any] = json.loads(model.get_rt_info(["framework", "co3d"]).astype(str))
        if self.info["version"] != 1:
            raise ValueError(f"This reader for OpenVINO knows contract version 1, not {self.info['version']}.")
        states = self.info["states"]
        if {s["output"] for s in states} & {s["input"] for s in states}:
            raise ValueError("OpenVINO wants an output per state: compile with --state-io paired.")
        self.batch, self.stateful = batch, stateful
        # Kernels for known sizes are faster, and states need them.
        model.reshape({item.get_any_name(): self._shape(item.partial_shape) for item in model.inputs})
        if stateful and states:
            copy_moved(model)
            apply_make_stateful_transformation(model, {s["input"]: s["output"] for s in states})
        # By themselves some CPUs would calculate in bfloat16.
        hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            hints["INFERENCE_NUM_THREADS"] = threads
        self.request = core.compile_model(model, device, hints).create_infer_request()
        self.state: dict[str, Any] = {}
        self.reset()

    def _shape(self, shape: Any) -> list[int]:
        return [self.batch if size.is_dynamic or size == "N" else int(str(size)) for size in shape]

    def reset(self) -> None:
        """Puts the states of all streams back to their start."""
        initial = {}
        for s in self.info["states"]:
            shape = [self.batch if size == "N" else size for size in s["shape"]]
            initial[s["input"]] = np.full(shape, float(s["initial"]), s["dtype"])
        if not self.stateful:
            self.state = initial
            return
        self.request.reset_state()  # zeros
        ids = {s["input"] + s["output"]: s["input"] for s in self.info["states"]}
        for variable in self.request.query_state():
            if initial[ids[variable.name]].any():
                variable.state = ov.Tensor(initial[ids[variable.name]])

    def step(self, *frames: Any, valid: Any = None) -> tuple[Any, ...]:
        """Advances all streams by one step: an array per model input in, one per model output out.

        ``valid`` is for files with ``boundary="exact"``; default: all frames are there.
        """
        values = dict(self.state)
        values.update(zip([i["name"] for i in self.info["inputs"]], frames, strict=True))
        if self.info["valid"]:
            shape = self.batch, self.info["inputs"][0]["frames_per_step"] or 1
            values[self.info["valid"]] = np.ones(shape, bool) if valid is None else valid
        self.request.infer(values)
        if not self.stateful:  # copies: the request writes to its own outputs again
            states = self.info["states"]
            self.state = {s["input"]: self.request.get_tensor(s["output"]).data.copy() for s in states}
        return tuple(self.request.get_tensor(o["name"]).data.copy() for o in self.info["outputs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    stream = OpenVINOStream(arguments.model)
    shapes = [[1 if size == "N" else size for size in item["shape"]] for item in stream.info["inputs"]]
    frames = [np.random.default_rng(0).random(shape, dtype=np.float32) for shape in shapes]
    for _ in range(max(3, stream.info["warmup_steps"])):
        stream.step(*frames)
    start = time.perf_counter()
    for _ in range(arguments.steps):
        stream.step(*frames)
    print(f"{(time.perf_counter() - start) / arguments.steps * 1e3:.2f} ms per step")


if __name__ == "__main__":
    main()
