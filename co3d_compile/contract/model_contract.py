"""The metadata of a compiled model: the JSON in ``metadata_props["co3d"]`` of an ONNX file (docs/contract.md).

Imports neither torch nor onnx, so that a machine that only runs models can read it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, cast

from co3d_compile.contract.json_readers import (
    _HINT,
    MAX_ELEMENTS,
    Shape,
    _a,
    _each,
    _fail,
    _frames,
    _number,
    _one_of,
    _or_null,
    _Read,
    _shape,
    _text,
    _whole,
)
from co3d_compile.errors import ContractError

METADATA_KEY = "co3d"
REPORT_KEY = "co3d_report"  # what was done, for people; a reader needs none of it
VERSION = 1
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("float32", "float16", "float64", "bool", *INTEGERS)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One model input.

    ``shape`` is the shape of the ONNX input. ``time_dim`` is where time is in the clip model's layout: at
    ``frames_per_step`` 1 the ONNX input lacks that dim. Both are None for an input without time.
    """

    name: str
    shape: Shape
    dtype: str
    frames_per_step: int | None
    time_dim: int | None


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One model output; ``delay`` counts entries, each ``frames_per_entry`` frames of the first input (contract.md)."""

    name: str
    shape: Shape
    dtype: str
    delay: int
    has_time: bool
    time_dim: int | None
    entries_per_step: int
    frames_per_entry: float | None = None


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state: ``input`` takes its next value from ``output``, an ONNX output or another state's input."""

    input: str
    output: str
    shape: Shape
    dtype: str
    initial: float
    batch_dim: int


@dataclass(frozen=True, slots=True)
class Recomputed:
    """An operator that has no extension on a stream and runs again on a buffered window at every step."""

    operator: str
    module_path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What a reader of a compiled model needs to know. Also what ``StreamSession.info`` returns.

    Raises:
        ContractError: The parts contradict each other, wherever they come from.
    """

    compiler_version: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    states: tuple[StateSpec, ...]
    frames_per_step: Mapping[str, int]
    receptive_field: int | None
    warmup_steps: int
    window: int | None = None
    recomputed: tuple[Recomputed, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    boundary: Literal["stream", "exact"] = "stream"
    valid: str | None = None
    flush_steps: int = 0
    preprocess: Mapping[str, Any] | None = None
    labels: tuple[Any, ...] | None = None
    native: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_names(self)
        _check_time(self)
        _check_shapes(self)
        self.chains()

    @property
    def delays(self) -> dict[str, int]:
        """Delay of every output, in entries of that output."""
        return {output.name: output.delay for output in self.outputs}

    def chains(self) -> list[tuple[StateSpec, ...]]:
        """States grouped by the ONNX output that feeds them, each group in the order in which a value moves.

        A paired state is a group of one. Raises ContractError where states do not pair.
        """
        inputs = {state.input for state in self.states}
        taker: dict[str, StateSpec] = {}
        for state in self.states:
            if state.output in taker:
                _fail(f"'{state.output}' feeds two states, '{taker[state.output].input}' and '{state.input}'")
            taker[state.output] = state
        chains = []
        for state in self.states:
            if state.output not in inputs:
                chain = [state]
                while chain[-1].input in taker:
                    chain.append(taker[chain[-1].input])
                chains.append(tuple(chain))
        for name in sorted(inputs - {state.input for chain in chains for state in chain}):
            _fail(f"state '{name}' takes its value from a ring of states that no output of the model feeds")
        return chains

    def to_json(self) -> str:
        """The metadata as strict JSON: an infinite or NaN initial value is a string, ``"-inf"`` or ``"nan"``."""
        data = {**_as_dict(self), "states": [_as_dict(state) for state in self.states]}
        for state in data["states"]:
            if not math.isfinite(state["initial"]):
                state["initial"] = str(float(state["initial"]))
        try:
            return json.dumps(data, allow_nan=False, default=_as_dict)
        except (TypeError, ValueError, RecursionError) as error:
            raise ContractError(
                f"The metadata cannot be written as JSON: {error}.",
                hint="Use numbers, strings, lists and dicts in options, preprocess and labels.",
            ) from error


def parse(text: str) -> Contract:
    """Read the JSON of ``metadata_props["co3d"]``.

    Raises:
        ContractError: Not JSON, another version, a missing key, a wrong type or a contradiction.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"The co3d metadata is not JSON: {str(error)[:200]}.", hint=_HINT) from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ContractError(
            f"The co3d metadata has contract version {reprlib.repr(version)}; this reader knows {VERSION}.",
            hint="Install the co3d-compile that wrote the file, or compile the model again.",
        )
    return cast(Contract, _build(Contract, data, "metadata"))


def check_graph(contract: Contract, inputs: Sequence[Any], outputs: Sequence[Any], batch: int) -> None:
    """Compare with what onnxruntime says of the graph: nodes with name, shape and type. Raises ContractError."""
    frames = contract.inputs[0].frames_per_step or 1
    chains = contract.chains()
    _check_nodes(
        "input",
        {node.name: node for node in inputs},
        {item.name: (item.shape, item.dtype) for item in contract.inputs}
        | ({contract.valid: (("N", frames), "bool")} if contract.valid else {})
        | {state.input: (state.shape, state.dtype) for state in contract.states},
        batch,
    )
    _check_nodes(
        "output",
        {node.name: node for node in outputs},
        {item.name: (item.shape, item.dtype) for item in contract.outputs}
        | {chain[0].output: (chain[0].shape, chain[0].dtype) for chain in chains},
        batch,
    )


def resolve(shape: Shape, batch: int) -> tuple[int, ...]:
    """The shape with ``"N"`` replaced by the number of streams."""
    return tuple(batch if dim == "N" else dim for dim in shape)


def _as_dict(item: Any) -> dict[str, Any]:
    """One level of a dataclass; json.dumps asks again for what is below."""
    if not dataclasses.is_dataclass(item):
        if isinstance(item, Mapping):
            return dict(item)
        raise TypeError(f"a {type(item).__name__} is no JSON value")
    return {part.name: getattr(item, part.name) for part in dataclasses.fields(item)}


def _build(cls: type, data: Any, where: str) -> Any:
    """A dataclass from a JSON object. Keys whose field has a default may be left out, unknown ones are skipped."""
    _a(dict)(data, where)
    readers = _READERS[cls]
    for part in dataclasses.fields(cls):
        if part.name not in data and part.default is MISSING and part.default_factory is MISSING:
            _fail(f"{where}.{part.name} is missing")
    return cls(**{key: read(data[key], f"{where}.{key}") for key, read in readers.items() if key in data})


def _all(cls: type) -> _Read:
    return _each(lambda value, where: _build(cls, value, where))


_TENSOR: dict[str, _Read] = {"shape": _shape, "dtype": _one_of(*DTYPES)}
_READERS: dict[type, dict[str, _Read]] = {
    InputSpec: {
        "name": _text,
        **_TENSOR,
        "frames_per_step": _or_null(_whole(1)),
        "time_dim": _or_null(_whole(0)),
    },
    OutputSpec: {
        "name": _text,
        **_TENSOR,
        "delay": _whole(-MAX_ELEMENTS),
        "has_time": _a(bool),
        "time_dim": _or_null(_whole(0)),
        "entries_per_step": _whole(0),
        "frames_per_entry": _or_null(_a(int, float)),
    },
    StateSpec: {"input": _text, "output": _text, **_TENSOR, "initial": _number, "batch_dim": _whole(0)},
    Recomputed: {"operator": _text, "module_path": _a(str), "reason": _a(str)},
    Contract: {
        "compiler_version": _text,
        "inputs": _all(InputSpec),
        "outputs": _all(OutputSpec),
        "states": _all(StateSpec),
        "frames_per_step": _frames,
        "receptive_field": _or_null(_whole(1)),
        "warmup_steps": _whole(0),
        "window": _or_null(_whole(1)),
        "recomputed": _all(Recomputed),
        "options": _a(dict),
        "boundary": _one_of("stream", "exact"),
        "valid": _or_null(_text),
        "flush_steps": _whole(0),
        "preprocess": _or_null(_a(dict)),
        "labels": _or_null(_each(lambda value, where: value)),
        "native": _or_null(_whole(2)),
        "version": _whole(VERSION),
    },
}


def _check_names(contract: Contract) -> None:
    if not contract.inputs or not contract.outputs:
        _fail("a model has at least one input and one output")
    if (contract.valid is not None) != (contract.boundary == "exact") or contract.valid == "":
        _fail("valid names an input where boundary is 'exact', and is null otherwise")
    state_inputs = [state.input for state in contract.states]
    valid = [contract.valid] if contract.valid else []
    _check_unique("input", [item.name for item in contract.inputs] + valid + state_inputs)
    own = {state.output for state in contract.states} - set(state_inputs)
    _check_unique("output", [item.name for item in contract.outputs] + sorted(own))


def _check_unique(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            _fail(f"{what} '{name}' is there twice")
        seen.add(name)


def _check_time(contract: Contract) -> None:
    for item in contract.inputs:
        frames, dim = item.frames_per_step, item.time_dim
        if (frames is None) != (dim is None):
            _fail(f"input '{item.name}' has one of frames_per_step and time_dim, but not the other")
        if frames == 1 and dim is not None and dim > len(item.shape):
            _fail(f"input '{item.name}' has its time at dim {dim} of {len(item.shape) + 1}")
        if frames is not None and frames > 1 and (item.shape[dim:] or ("",))[0] != frames:
            _fail(f"input '{item.name}' of shape {list(item.shape)} lacks {frames} frames at dim {dim}")
    frames_of = {item.name: item.frames_per_step for item in contract.inputs if item.frames_per_step is not None}
    if dict(contract.frames_per_step) != frames_of:
        _fail("frames_per_step does not repeat what the inputs say")
    if contract.valid and contract.inputs[0].frames_per_step is None:
        _fail("valid counts the frames of the first input, and that has no time")
    for output in contract.outputs:
        if output.time_dim is not None and output.time_dim > len(output.shape):
            _fail(f"output '{output.name}' has its time at dim {output.time_dim} of {len(output.shape)}")


def _check_shapes(contract: Contract) -> None:
    by_input = {state.input: state for state in contract.states}
    for state in contract.states:
        if state.batch_dim >= len(state.shape) or state.shape.count("N") > (state.shape[state.batch_dim] == "N"):
            _fail(f"state '{state.input}' of shape {list(state.shape)} has no single batch at dim {state.batch_dim}")
        if not state.dtype.startswith("float") and not (math.isfinite(state.initial) and state.initial.is_integer()):
            _fail(f"state '{state.input}' of {state.dtype} cannot start at {state.initial}")
        source = by_input.get(state.output, state)
        if (source.shape, source.dtype, source.batch_dim) != (state.shape, state.dtype, state.batch_dim):
            _fail(f"state '{state.input}' takes its value from '{source.input}' of another shape or dtype")
    tensors: list[InputSpec | OutputSpec | StateSpec] = [*contract.inputs, *contract.outputs, *contract.states]
    if sum(math.prod(resolve(tensor.shape, 1)) for tensor in tensors) > MAX_ELEMENTS:
        _fail(f"the declared shapes hold more than {MAX_ELEMENTS} elements for a single stream")


def _check_nodes(what: str, nodes: Mapping[str, Any], said: Mapping[str, tuple[Shape, str]], batch: int) -> None:
    odd = sorted(nodes.keys() ^ said.keys())
    if odd:
        _fail(f"metadata and graph do not have the same {what}s: {', '.join(odd[:5])}")
    for name, (shape, dtype) in said.items():
        node, dims = nodes[name], resolve(shape, batch)
        kind = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(node.type, node.type[7:-1])
        fits = (dim == got or not isinstance(got, int) for dim, got in zip(dims, node.shape, strict=False))
        if kind != dtype or len(node.shape) != len(dims) or not all(fits):
            _fail(f"{what} '{name}' is {dtype} {list(dims)} by the metadata, {kind} {node.shape} in the graph")
