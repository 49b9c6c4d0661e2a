"""The step as a module that LiteRT converts, and the file beside ONNX Runtime."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from co3d_compile.capture.onnx_reader.onnx_file import prepared
from co3d_compile.capture.onnx_reader.onnx_module import OnnxModule, identifier
from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.errors import UnsupportedError, VerificationError, first_line
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.plain_types import Array, JsonObject
from co3d_compile.targets.litert_file import merged_outputs, signature_tensors
from co3d_compile.targets.litert_graph import separated

SIGNATURE = "step"
CHANNELS_LAST = (0, 2, 3, 1)
TOLERANCE = 1e-3  # standard deviations of the results; deep networks round to 1e-4 of them in any runtime
STEPS = 4  # compared beyond the warm-up
ELSEWHERE = "Run the ONNX file, or export it for another target (docs/targets.md)."
log = logging.getLogger(__name__)


class LiteRtStep(nn.Module):
    """The step as LiteRT converts it: arguments and results by the names of the signature.

    Args:
        model: The compiled ONNX file.
        contract: Its metadata.
        batch: Streams that advance together.
        channels_last: Whether tensors of four dims enter and leave with their channels last.
    """

    def __init__(self, model: str | os.PathLike[str], contract: Contract, batch: int, *, channels_last: bool) -> None:
        super().__init__()
        self.info, self.batch, self.channels_last = contract, batch, channels_last
        graph = prepared(ir.load(os.fspath(model)))
        self.moved = separated(graph, len(contract.outputs), {s.input: s.output for s in contract.states})
        self.step = OnnxModule(graph).eval()
        self.shapes = {identifier(v.name): self._sizes(v) for v in graph.graph.inputs}
        self.dtypes = {identifier(v.name): str(v.dtype.numpy()) for v in graph.graph.inputs if v.dtype is not None}

    def _sizes(self, value: ir.Value) -> tuple[int, ...]:
        assert value.shape is not None
        return tuple(size if isinstance(size, int) else self.batch for size in value.shape)

    def forward(self, **values: Tensor) -> dict[str, Tensor]:
        """Computes one step."""
        results = self.step(*[self._entering(values[name]) for name in self.shapes])
        return {name: self._leaving(x) for name, x in results.items()}

    def _turned(self, rank: int) -> bool:
        return self.channels_last and rank == 4

    def _entering(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._turned(x.dim()) else x

    def _leaving(self, x: Tensor) -> Tensor:
        return x.permute(CHANNELS_LAST) if self._turned(x.dim()) else x

    def _dim(self, dim: int | None, rank: int) -> int | None:
        """Finds where a dim of the ONNX file is in this one."""
        return CHANNELS_LAST.index(dim) if dim is not None and self._turned(rank) else dim

    def outside(self, x: Array) -> Array:
        """Lays an array of the ONNX file out as this file has it."""
        return np.ascontiguousarray(x.transpose(CHANNELS_LAST)) if self._turned(x.ndim) else x

    def outer(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Writes a shape as the file has it."""
        return tuple(shape[d] for d in CHANNELS_LAST) if self._turned(len(shape)) else tuple(shape)

    def converted(self) -> bytes:
        """Converts the step to a LiteRT file, without metadata.

        Raises:
            UnsupportedError: LiteRT's converter does not take the step, or makes one of several outputs.
        """
        import litert_torch

        samples = {n: torch.zeros(self.outer(s), dtype=getattr(torch, self.dtypes[n])) for n, s in self.shapes.items()}
        try:
            made = litert_torch.signature(SIGNATURE, self.eval(), sample_kwargs=samples).convert()
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever the converter meets
            why = f"LiteRT's converter does not take this step: {first_line(error)[:200]}."
            raise UnsupportedError(why, hint=ELSEWHERE) from error
        content: bytes = made.model_content()
        if merged := merged_outputs(content, SIGNATURE):
            raise UnsupportedError(f"LiteRT's converter makes one tensor of the outputs {merged}.", hint=ELSEWHERE)
        return content

    def contract(self, content: bytes) -> JsonObject:
        """Writes the contract of the file.

        As in the ONNX file, with the names, shapes and dtypes that the signature has.
        """
        tensors = signature_tensors(content, SIGNATURE)
        data: JsonObject = json.loads(self.info.to_json())
        data["weights_sha256"] = None  # of the ONNX file
        data["signature"], data["channels_last"] = SIGNATURE, self.channels_last
        for spec in (*data["inputs"], *data["outputs"]):
            spec["name"] = identifier(spec["name"])
            spec["shape"], spec["dtype"] = tensors[spec["name"]]
            if spec.get("frames_per_step", spec.get("entries_per_step")) != 1:
                spec["time_dim"] = self._dim(spec["time_dim"], len(spec["shape"]))
        for state in data["states"]:
            source = self.moved.get(state["output"], state["output"])
            state["input"], state["output"] = identifier(state["input"]), identifier(source)
            state["shape"], state["dtype"] = tensors[state["input"]]
            state["batch_dim"] = self._dim(state["batch_dim"], len(state["shape"]))
        data["counters"] = [identifier(name) for name in data["counters"]]
        data["valid"] = None if data["valid"] is None else identifier(data["valid"])
        data["frames_per_step"] = {identifier(n): count for n, count in data["frames_per_step"].items()}
        return data


def compare(content: bytes, model: Path, step: LiteRtStep) -> None:
    """Runs the file beside ONNX Runtime on random frames.

    Raises:
        VerificationError: The results differ.
    """
    from ai_edge_litert.interpreter import Interpreter

    data, info = step.contract(content), step.info
    run = Interpreter(model_content=content).get_signature_runner(SIGNATURE)
    states = {s["input"]: np.full(s["shape"], float(s["initial"]), s["dtype"]) for s in data["states"]}
    flags = {} if data["valid"] is None else {data["valid"]: np.ones(step.shapes[data["valid"]], np.bool_)}
    generator = np.random.default_rng(0)
    expected: list[Array] = []
    found: list[Array] = []
    with StreamSession(model, step.batch, layout="plain") as session:
        for number in range(info.warmup_steps + STEPS):
            frames = [_random(generator, resolve(i.shape, step.batch), i.dtype) for i in info.inputs]
            values = {spec["name"]: step.outside(x) for spec, x in zip(data["inputs"], frames, strict=True)}
            values |= flags | states
            values |= run(**values)
            states = {s["input"]: values[s["output"]] for s in data["states"]}
            results = session.step(tuple(frames))
            if number >= info.warmup_steps:
                given = results if isinstance(results, tuple) else (results,)
                expected += [step.outside(x).ravel() for x in given]
                found += [values[spec["name"]].ravel() for spec in data["outputs"]]
    right = np.concatenate(expected).astype(np.float64)
    error = float(np.abs(np.concatenate(found) - right).max() / (right.std() or 1.0))
    log.info("LiteRT and ONNX Runtime differ by %.1e standard deviations of the results", error)
    if not error <= TOLERANCE:
        raise VerificationError(
            f"LiteRT gives other results than ONNX Runtime: {error:.1e} standard deviations of them apart.",
            hint="Nothing was written. Run the ONNX file instead, and report the model.",
        )


def _random(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if np.issubdtype(np.dtype(dtype), np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)
