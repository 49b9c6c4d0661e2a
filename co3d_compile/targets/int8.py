"""8-bit convolutions by ONNX Runtime's own quantisation, calibrated on a stream: states go from step to step."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.runtime.session import StreamSession
from co3d_compile.support.plain_types import JsonObject

OPERATORS = ["Conv", "Gemm", "MatMul"]


class StreamReader(CalibrationDataReader):
    """A reader that gives the calibration one step after the other, with the states as they are on that stream.

    Args:
        path: The compiled file, which runs beside the calibration to know its states.
        frames: What ``StreamSession.step`` takes, step by step.
    """

    def __init__(self, path: Path, frames: Iterable[Any]) -> None:
        self._session = StreamSession(path, layout="plain")
        self._frames = iter(frames)
        self.steps = 0

    def get_next(self) -> JsonObject | None:
        """Gives everything that the file's inputs take at the next step; None behind the last."""
        frames = next(self._frames, None)
        if frames is None:
            self._session.close()
            return None
        given = tuple(frames) if isinstance(frames, (tuple, list)) else (frames,)
        states = self._session.get_state()
        self._session.step(given)  # which also says what is wrong with the frames
        self.steps += 1
        shaped = {
            spec.name: x.reshape([1 if dim == "N" else dim for dim in spec.shape])
            for spec, x in zip(self._session.info.inputs, given, strict=True)
        }
        return {**shaped, **states}


def to_int8(model: ir.Model, contract: Contract, frames: Iterable[Any]) -> tuple[ir.Model, Contract]:
    """Makes the convolutions and matrix products of a model 8-bit; everything between them is left in float32.

    Weights take 7 bits, per output channel, so that processors without VNNI do not overflow.

    Args:
        model: The step model.
        contract: Its contract.
        frames: Calibration frames, as ``StreamSession.step`` takes them for one stream, longer than the warm-up.

    Returns:
        Another model, and its contract with ``options["int8"]``. States are as they were.

    Raises:
        UsageError: No more frames than the warm-up takes, a file that was laid out for one machine, or one with valid
            flags. SessionError: Frames that the model does not take. Co3dError: ONNX Runtime cannot quantise it.
    """
    if contract.native is not None or contract.valid is not None:
        what = "a native model" if contract.native is not None else 'a model with boundary="exact"'
        raise UsageError(
            f"{what[0].upper()}{what[1:]} cannot be quantised to int8.", hint="Compile it without that option."
        )
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        ir.save(model, plain)
        reader = StreamReader(plain, frames)
        try:
            with _quiet():
                quantize_static(
                    plain,
                    quantised,
                    reader,
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=OPERATORS,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    reduce_range=True,
                    extra_options={"TensorQuantOverrides": _known_ranges(model)},
                )
        except Co3dError:
            raise
        except Exception as error:
            if reader.steps:
                raise Co3dError(f"ONNX Runtime cannot quantise the model: {error}") from error
        if reader.steps <= contract.warmup_steps:
            what = f"Calibration had {reader.steps} steps, and the model needs {contract.warmup_steps} to warm up."
            raise UsageError(what, hint="Give a longer video.")
        result = ir.load(quantised)
        result = ir.external_data.load_to_model(result)
    result.metadata_props.update(model.metadata_props)
    return result, dataclasses.replace(contract, options={**contract.options, "int8": True})


def _known_ranges(model: ir.Model) -> dict[str, list[dict[str, np.float32]]]:
    """Says which values lie between 0 and 1, whatever calibration sees.

    ONNX Runtime's softmax in 8 bits overflows where the scale of its result is finer than that of this range.
    """
    names = [node.outputs[0].name for node in model.graph if node.op_type == "Softmax"]
    return {name: [{"rmin": np.float32(0), "rmax": np.float32(1)}] for name in names if name}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences ONNX Runtime's quantiser, which asks for steps before it that a compiled graph does not need."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    logging.root.addFilter(drop)
    try:
        yield
    finally:
        logging.root.removeFilter(drop)
