"""What a compiled file computes inside: its values, step by step, as ONNX Runtime gives them.

The loop is that of the contract, with onnxruntime alone: it shares nothing with ``StreamSession``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.errors import LoadError

MOST = 2_000_000_000  # bytes of one ONNX file in memory


class InnerValues:
    """A file whose values can be looked at.

    Args:
        path: The compiled file.
        info: Its contract.
        batch: Streams.

    Raises:
        LoadError: It is over 2 GB.
    """

    def __init__(self, path: str | os.PathLike[str], info: Contract, batch: int) -> None:
        self.model = onnx.load(path)
        if sum(len(tensor.raw_data) for tensor in self.model.graph.initializer) > MOST:
            raise LoadError("The file is over 2 GB: its values cannot be looked at.")
        self.info, self.batch = info, batch
        self.names = {name for node in self.model.graph.node for name in node.output if name}

    def of_steps(
        self, names: Sequence[str], frames: Iterable[Sequence[Any]], keep: range, base: int
    ) -> dict[int, dict[str, Any]]:
        """The values of some steps.

        Args:
            names: Of the values.
            frames: The inputs of every step, as the ONNX file takes them.
            keep: The steps whose values are returned.
            base: The number of the first step. States are as at the start of a stream.
        """
        session = self._session(names)
        outputs = [output.name for output in session.get_outputs()]
        states = {s.input: np.full(resolve(s.shape, self.batch), float(s.initial), s.dtype) for s in self.info.states}
        flags = np.ones((self.batch, self.info.inputs[0].frames_per_step or 1), np.bool_)
        fixed = {} if self.info.valid is None else {self.info.valid: flags}
        found = {}
        for step, arrays in enumerate(frames, base):
            inputs = {spec.name: x for spec, x in zip(self.info.inputs, arrays, strict=True)}
            values = {**inputs, **states, **fixed}
            values |= zip(outputs, session.run(outputs, values), strict=True)
            states = {state.input: values[state.output] for state in self.info.states}
            if step in keep:
                found[step] = {name: values[name] for name in names}
        return found

    def _session(self, names: Sequence[str]) -> Any:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        there = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in there)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


__all__ = ["InnerValues"]
