"""Streams frames through a LiteRT file of co3d export, with ai-edge-litert and numpy alone.

    python stream.py model.tflite frames.npy results.npy

``frames.npy`` holds the frames of each step of a model with one input, shaped as the file takes them, on a first dim.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Options

Array = np.ndarray[Any, Any]


class Stream:
    """A model and its states. A state moves by handing its buffer on: no value is copied.

    Args:
        path: The ``.tflite`` file.
        threads: CPU threads of a step.
        more: Other options of the CPU, by the names of ``CpuOptions``.

    Attributes:
        info: The contract in the file (docs/litert.md).
    """

    def __init__(self, path: str, threads: int = 1, **more: Any) -> None:
        with open(path, "rb") as file:
            content = file.read()
        self.info, cpu = contract(content), CpuOptions(num_threads=threads, **more)
        if self.info["version"] != 1:
            raise ValueError(f"This reader for LiteRT knows contract version 1, not {self.info['version']}.")
        self.model = CompiledModel.from_buffer(content, options=Options(cpu_options=cpu))
        key = self.info["signature"]
        given, made = self.model.get_input_tensor_details(key), self.model.get_output_tensor_details(key)
        self.inputs = {name: self.model.create_input_buffer_by_name(key, name) for name in given}
        self.outputs = {name: self.model.create_output_buffer_by_name(key, name) for name in made}
        self.shapes = {name: tuple(details["shape"]) for name, details in (given | made).items()}
        # Where each value comes from that is kept, and the states that it moves through: one to the next at each step.
        states = {state["input"] for state in self.info["states"]}
        after = {state["output"]: state["input"] for state in self.info["states"]}
        self.chains = []
        for source in after.keys() - states:
            chain = [after[source]]
            while chain[-1] in after:
                chain.append(after[chain[-1]])
            self.chains.append((source, chain))
        self.reset()

    def reset(self) -> None:
        """Puts every state back to its start."""
        for state in self.info["states"]:
            self.inputs[state["input"]].write(np.full(state["shape"], float(state["initial"]), state["dtype"]))

    def step(self, *frames: Array, valid: Array | bool = True) -> list[Array]:
        """Takes the next frames of every input, and returns the results."""
        for spec, frame in zip(self.info["inputs"], frames, strict=True):
            self.inputs[spec["name"]].write(np.ascontiguousarray(frame, spec["dtype"]))
        if flags := self.info["valid"]:
            self.inputs[flags].write(np.ascontiguousarray(np.broadcast_to(valid, self.shapes[flags])))
        self.model.run_by_name(self.info["signature"], self.inputs, self.outputs)
        for source, chain in self.chains:
            place = self.outputs if source in self.outputs else self.inputs  # a frame may be a state's next value
            spare = self.inputs[chain[-1]]
            for older, newer in zip(chain[:0:-1], chain[-2::-1], strict=True):
                self.inputs[older] = self.inputs[newer]
            self.inputs[chain[0]], place[source] = place[source], spare
        return [self._read(spec) for spec in self.info["outputs"]]

    def _read(self, spec: dict[str, Any]) -> Array:
        shape = self.shapes[spec["name"]]
        return self.outputs[spec["name"]].read(math.prod(shape), np.dtype(spec["dtype"])).reshape(shape)


def contract(content: bytes) -> dict[str, Any]:
    """The metadata entry ``co3d`` of a LiteRT file."""
    model = schema.Model.GetRootAs(content)
    for at in range(model.MetadataLength()):
        entry = model.Metadata(at)
        if entry.Name() == b"co3d":
            return json.loads(bytes(model.Buffers(entry.Buffer()).DataAsNumpy()))
    raise SystemExit("This file was not written by co3d export --litert.")


if __name__ == "__main__":
    model_path, frames_path, results_path = sys.argv[1:]
    stream = Stream(model_path)
    np.save(results_path, np.stack([stream.step(frame)[0] for frame in np.load(frames_path)]))
