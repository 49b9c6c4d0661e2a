"""A model repository of Triton Inference Server: the sequence batcher keeps the states, one set per sequence.

Imports neither torch nor onnx. The format is that of Triton's ``model_config.proto``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from co3d_compile.contract.model_contract import Contract, StateSpec, refuse_free_rows
from co3d_compile.errors import OutputError, UnsupportedError, UsageError
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.targets.settings import Settings, setting

TYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64", "bool": "BOOL"}
# A message of the text format: names and values in order; a value is a message, a list of them, or a word or number.
Message: TypeAlias = "list[tuple[str, Any]]"


@dataclass(frozen=True)
class Options(Settings):
    """How the server runs the model.

    Raises:
        UsageError: A number that makes no sense, or another word.
    """

    strategy: str = setting(
        "oldest",
        "How sequences are batched: the oldest requests of all, or each sequence in a slot of its own.",
        choices=("oldest", "direct"),
    )
    max_batch: int = setting(8, "Sequences in one batch.")
    max_sequences: int = setting(64, "With oldest: sequences that one instance holds.")
    queue_delay: int = setting(1000, "Microseconds that a request may wait for others.", least=0, metavar="US")
    idle: int = setting(10_000_000, "Microseconds after which a sequence without requests is dropped.", metavar="US")
    instances: int = setting(1, "Copies of the model, on each device.")
    device: str = setting("cpu", "Where the instances run.", choices=("cpu", "gpu"))


def write_repository(
    model: str | os.PathLike[str],
    contract: Contract,
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    options: Options | None = None,
) -> Path:
    """Writes ``repository/name`` with the model as version 1, ``config.pbtxt`` and initial states; returns it.

    Args:
        model: The compiled ONNX file; weights in a second file beside it go with it.
        contract: Its metadata.
        repository: Folder of the repository, made if it is missing.
        name: The model's name for clients; default that of the file.
        options: How the server runs it.

    Raises:
        UnsupportedError: The model has states or a batch that Triton cannot hold.
        UsageError: The name is no folder name. OutputError: The folder is there, or cannot be written.
    """
    refuse_free_rows(contract, "Triton")
    source, root = Path(model), Path(repository)
    name = source.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
        raise UsageError(f"{name!r} is no name for a model.", hint="Use letters, digits, '_', '-' and '.'.")
    text = config(contract, name, options or Options())
    target = root / name
    if target.exists():
        raise OutputError(f"{target} is there already.", hint="Remove it, or give another name.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as folder:
            written = Path(folder, name)
            _write(written, source, contract, text)
            os.replace(written, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target


def _write(folder: Path, source: Path, contract: Contract, text: str) -> None:
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(source, folder / "1" / "model.onnx")
    data = source.with_name(source.name + ".data")
    if data.exists():  # the ONNX file names it
        shutil.copyfile(data, folder / "1" / data.name)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")
    for index, state in enumerate(contract.states):
        if _is_zero(state):
            continue
        (folder / "initial_state").mkdir(exist_ok=True)
        shape = [int(size) for size in state.shape if size != "N"]
        (folder / "initial_state" / _file(index)).write_bytes(np.full(shape, state.initial, state.dtype).tobytes())


def config(contract: Contract, name: str, options: Options) -> str:
    """Writes the content of ``config.pbtxt``.

    Raises:
        UnsupportedError: The model has states or a batch that Triton cannot hold.
    """
    batched = _check(contract)
    inputs = [_tensor(i.name, i.dtype, i.shape, batched) for i in contract.inputs]
    if contract.valid is not None:
        inputs.append(_tensor(contract.valid, "bool", ("N", contract.inputs[0].frames_per_step or 1), batched))
    message: Message = [
        ("name", _text(name)),
        ("platform", _text("onnxruntime_onnx")),
        ("max_batch_size", options.max_batch if batched else 0),
        *[("input", each) for each in inputs],
        *[("output", _tensor(o.name, o.dtype, o.shape, batched)) for o in contract.outputs],
        *_batching(contract, options, batched),
        ("instance_group", [("count", options.instances), ("kind", f"KIND_{options.device.upper()}")]),
        *[("parameters", _parameter(key, value)) for key, value in _facts(contract).items()],
    ]
    return "# Written by co3d export: the sequence batcher holds the model's state, one set per sequence.\n" + _lines(
        message
    )


def _check(contract: Contract) -> bool:
    """Says whether the batch is free; refuses what Triton cannot hold."""
    given = {output.name for output in contract.outputs} | {state.input for state in contract.states}
    if any(state.output in given for state in contract.states):
        raise UnsupportedError(
            "States that only move have no output of their own, and Triton needs one per state.",
            hint="Compile with --state-io paired.",
        )
    if contract.lengths:
        raise UnsupportedError(
            f"Ends are exact only in streams {contract.lengths}. Triton does not count frames.",
            hint="Compile it with boundary='stream'.",
        )
    states = [state.shape for state in contract.states]
    shapes = [*(i.shape for i in contract.inputs), *(o.shape for o in contract.outputs), *states]
    batched = all(shape and shape[0] == "N" for shape in shapes)
    if not batched and any("N" in shape for shape in states):
        raise UnsupportedError(
            "An output has no batch in front, so Triton cannot tell sequences apart in a batch.",
            hint="Let the model return the batch as dim 0.",
        )
    if not batched and any(shape[0] not in (1, "N") for shape in shapes if shape):
        raise UnsupportedError(
            "The model was compiled for a fixed number of clips, and a sequence is one stream.",
            hint="Compile it from a model that takes any batch, or a batch of one.",
        )
    return batched


def _batching(contract: Contract, options: Options, batched: bool) -> Message:
    delay = [("max_queue_delay_microseconds", options.queue_delay)]
    if not contract.states:
        return [("dynamic_batching", delay)] if batched else []
    if options.strategy == "direct" or not batched:
        strategy = ("direct", delay)
    else:
        sequences = max(options.max_sequences, options.max_batch)
        strategy = ("oldest", [("max_candidate_sequences", sequences), *delay])
    states = [("state", _state(index, state, batched)) for index, state in enumerate(contract.states)]
    return [("sequence_batching", [("max_sequence_idle_microseconds", options.idle), strategy, *states])]


def _state(index: int, state: StateSpec, batched: bool) -> Message:
    """Puts a state in a buffer of its own for each side: others may read it when its next value is there already."""
    dims = _dims(state.shape, batched)
    value = ("zero_data", "true") if _is_zero(state) else ("data_file", _text(_file(index)))
    initial: Message = [("name", _text("initial")), ("data_type", _type(state.dtype)), *dims, value]
    return [
        ("input_name", _text(state.input)),
        ("output_name", _text(state.output)),
        ("data_type", _type(state.dtype)),
        *dims,
        ("initial_state", initial),
    ]


def _tensor(name: str, dtype: str, shape: tuple[Any, ...], batched: bool) -> Message:
    tensor: Message = [("name", _text(name)), ("data_type", _type(dtype))]
    dims = _dims(shape, batched)
    if dims:
        return [*tensor, *dims]
    return [*tensor, ("dims", 1), ("reshape", [])]  # a number per stream: Triton wants a dim where ONNX has none


def _dims(shape: tuple[Any, ...], batched: bool) -> Message:
    """Leaves the batch out where Triton batches."""
    return [("dims", 1 if size == "N" else int(size)) for size in (shape[1:] if batched else shape)]


def _facts(contract: Contract) -> JsonObject:
    """Lists what a client should know, and what the server passes on untouched."""
    facts: JsonObject = {"co3d.warmup_steps": contract.warmup_steps}
    facts |= {f"co3d.delay.{name}": delay for name, delay in contract.delays.items()}
    facts |= {f"co3d.frames_per_step.{name}": count for name, count in contract.frames_per_step.items()}
    if contract.receptive_field is not None:
        facts["co3d.receptive_field"] = contract.receptive_field
    if contract.valid is not None:
        facts["co3d.flush_steps"] = contract.flush_steps
    return facts


def _parameter(key: str, value: Any) -> Message:
    return [("key", _text(key)), ("value", [("string_value", _text(str(value)))])]


def _is_zero(state: StateSpec) -> bool:
    return state.initial == 0 and math.copysign(1, state.initial) > 0


def _file(index: int) -> str:
    return f"state_{index}"


def _type(dtype: str) -> str:
    return f"TYPE_{TYPES.get(dtype, dtype.upper())}"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(message: Message, indent: str = "") -> str:
    """Writes the text format of protobuf."""
    lines = []
    for key, value in message:
        if isinstance(value, list):
            lines.append(f"{indent}{key} {{\n{_lines(value, indent + '  ')}{indent}}}\n")
        else:
            lines.append(f"{indent}{key}: {value}\n")
    return "".join(lines)
