"""What a compiled file computes inside: its values, step by step, as ONNX Runtime gives them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnxruntime as ort

from co3d_compile.contract.model_contract import Contract
from co3d_compile.contract.reader_loop import Values, stepped
from co3d_compile.errors import LoadError
from co3d_compile.support.cpu_session import by_name, cpu_session
from co3d_compile.support.plain_types import Array

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

    def has(self, names: Iterable[str]) -> bool:
        """Says whether the file computes these values, or those that they are entries of."""
        return self.names.issuperset(name.partition("@")[0] for name in names)

    def of_steps(
        self, names: Sequence[str], frames: Iterable[Sequence[Array]], keep: range, base: int
    ) -> dict[int, Values]:
        """Computes the values of some steps.

        Args:
            names: Of the values. ``conv1d@2,5`` is what lies at place 5 of dim 2 of ``conv1d``.
            frames: The inputs of every step, as the ONNX file takes them.
            keep: The steps whose values are returned.
            base: The number of the first step. States are as at the start of a stream.
        """
        values = enumerate(stepped(self.info, self.batch, frames, by_name(self._session(names))), base)
        return {step: {name: found[name] for name in names} for step, found in values if step in keep}

    def _session(self, names: Sequence[str]) -> ort.InferenceSession:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        there = {output.name for output in model.graph.output}
        for name in (n for n in dict.fromkeys(names) if "@" in n):
            value, _, place = name.partition("@")
            dim, index = map(int, place.split(","))
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(index), f"{name}.index"))
            model.graph.node.append(onnx.helper.make_node("Gather", [value, f"{name}.index"], [name], axis=dim))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in there)
        return cpu_session(model.SerializeToString())
