"""The metadata of a compiled model: the JSON in ``metadata_props["co3d"]`` of an ONNX file (docs/contract.md).

Imports neither torch nor onnx, so that a machine that only runs models can read it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from co3d_compile.contract.json_readers import (
    MAX_ELEMENTS,
    Shape,
    fail,
    forbid,
)
from co3d_compile.errors import ContractError, UnsupportedError
from co3d_compile.support.plain_types import JsonObject
from co3d_compile.support.readable_numbers import plural

METADATA_KEY = "co3d"
REPORT_KEY = "co3d_report"  # what was done, for people; a reader needs none of it
VERSION = 1
NEWEST = 2
"""Of a file that a reader of version 1 would misread: it does not take sequences of any length, or it takes boxes."""
FIXED_LENGTH = 2**30
"""A multiple of frames that no stream has: with it, streams with exact ends are as long as the clip alone."""
T = TypeVar("T")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("float32", "float16", "float64", "bool", *INTEGERS)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One model input.

    ``shape`` is the shape of the ONNX input. ``time_dim`` is where time is in the clip model's layout: at
    ``frames_per_step`` 1 the ONNX input lacks that dim. Both are None for an input without time.

    One whose shape begins with "K" has rows of its own at each step, any number of them: boxes. ``waits`` is after how
    many steps they are answered, ``stream_column`` the column that says of which stream a row is, if one does.
    """

    name: str
    shape: Shape
    dtype: str
    frames_per_step: int | None
    time_dim: int | None
    waits: int | None = None
    stream_column: int | None = None


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
    """One state: ``input`` takes its next value from ``output``, an ONNX output or another state's input.

    ``unbounded``: what it once held has a part in every later value, as in a recurrent layer.
    """

    input: str
    output: str
    shape: Shape
    dtype: str
    initial: float
    batch_dim: int
    unbounded: bool = False


@dataclass(frozen=True, slots=True)
class Recomputed:
    """An operator that has no extension on a stream and runs again on a buffered window at every step."""

    operator: str
    module_path: str
    reason: str


@dataclass(frozen=True, slots=True)
class LocalRegion:
    """A part of the network that has no extension on a stream, but is local in time: a step runs it on a few entries.

    Each block of ``period`` entries depends on its own ones, ``before`` in front of them and ``after`` behind them.
    ``result`` and ``inputs`` are names in the captured graph, ``time_dim`` is that of the result. ``least_frames`` is
    how long, in frames of the first input, a stream must be for its ends to be exact; 0: any length does.
    """

    operator: str
    module_path: str
    before: int
    after: int
    period: int
    entries: int
    multiply_adds: int
    result: str
    inputs: tuple[str, ...]
    time_dim: int
    least_frames: int = 0

    @property
    def place(self) -> str:
        """Where it begins, for people."""
        return f"{self.operator} in {self.module_path or 'the model'}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
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
    regions: tuple[LocalRegion, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    boundary: Literal["stream", "exact"] = "stream"
    valid: str | None = None
    flush_steps: int = 0
    counters: tuple[str, ...] = ()
    length_multiple: int = 1
    length_remainder: int = 0
    preprocess: Mapping[str, Any] | None = None
    labels: tuple[Any, ...] | None = None
    native: int | None = None
    weights_sha256: str | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_names(self)
        _check_time(self)
        _check_shapes(self)
        self.chains()

    def __repr__(self) -> str:
        return f"<Contract: {contract_text(self)}>"

    @property
    def free_rows(self) -> str | None:
        """The name of an input with rows of its own at each step, any number of them; None: no input has."""
        return next((spec.name for spec in self.inputs if "K" in spec.shape), None)

    @property
    def delays(self) -> dict[str, int]:
        """Delay of every output, in entries of that output."""
        return {output.name: output.delay for output in self.outputs}

    @property
    def shortest(self) -> LocalRegion | None:
        """The region that needs the longest stream for exact ends, if one needs any length."""
        return max((part for part in self.regions if part.least_frames), key=lambda p: p.least_frames, default=None)

    @property
    def lengths(self) -> str:
        """Says which streams have exact ends, if not all do."""
        part, multiple = self.shortest, self.length_multiple
        said = [f"of {part.least_frames} frames or more, for {part.place} is local in time"] if part is not None else []
        if multiple >= FIXED_LENGTH:
            return f"of {plural(self.length_remainder, 'frame')} alone, for frames are taken by their number"
        if multiple > 1:
            more = f"{self.length_remainder} more than " if self.length_remainder else ""
            said.append(f"of {more}a multiple of {multiple} frames, for what is behind a stride is up-sampled")
        return ", and ".join(said)

    def chains(self) -> list[tuple[StateSpec, ...]]:
        """Groups the states by the ONNX output that feeds them, in the order in which a value moves.

        A paired state is a group of one. Raises ContractError where states do not pair.
        """
        inputs = {state.input for state in self.states}
        taker: dict[str, StateSpec] = {}
        for state in self.states:
            if state.output in taker:
                fail(f"'{state.output}' feeds two states, '{taker[state.output].input}' and '{state.input}'")
            taker[state.output] = state
        chains = []
        for state in self.states:
            if state.output not in inputs:
                chain = [state]
                while chain[-1].input in taker:
                    chain.append(taker[chain[-1].input])
                chains.append(tuple(chain))
        for name in sorted(inputs - {state.input for chain in chains for state in chain}):
            fail(f"state '{name}' takes its value from a ring of states that no output of the model feeds")
        return chains

    def to_json(self) -> str:
        """Gives the metadata as strict JSON: an infinite or NaN initial value is a string, ``"-inf"`` or ``"nan"``."""
        data = {**_as_dict(self), "states": [_as_dict(state) for state in self.states]}
        if self.free_rows is None:
            unknown = ("waits", "stream_column")
            data["inputs"] = [{k: v for k, v in _as_dict(i).items() if k not in unknown} for i in self.inputs]
        for state in data["states"]:
            if not state["unbounded"]:
                del state["unbounded"]
            if not math.isfinite(state["initial"]):
                state["initial"] = str(float(state["initial"]))
        try:
            return json.dumps(data, allow_nan=False, default=_as_dict)
        except (TypeError, ValueError, RecursionError) as error:
            raise ContractError(
                f"The metadata cannot be written as JSON: {error}.",
                hint="Use numbers, strings, lists and dicts in options, preprocess and labels.",
            ) from error


class GraphValue(Protocol):
    """An input or output as ONNX Runtime describes it."""

    name: str
    shape: Sequence[int | str | None]
    type: str


def check_graph(contract: Contract, inputs: Sequence[GraphValue], outputs: Sequence[GraphValue], batch: int) -> None:
    """Compares with what onnxruntime says of the graph: nodes with name, shape and type. Raises ContractError."""
    frames = contract.inputs[0].frames_per_step or 1
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
        | {chain[0].output: (chain[0].shape, chain[0].dtype) for chain in contract.chains()},
        batch,
    )


def contract_text(contract: Contract) -> str:
    """Describes a compiled model in one line: what goes in and comes out, how far it sees, how long it warms up."""
    inputs, outputs = (
        ", ".join(f"{spec.name} ({', '.join(map(str, spec.shape))})" for spec in specs)
        for specs in (contract.inputs, contract.outputs)
    )
    field = "unbounded" if contract.receptive_field is None else plural(contract.receptive_field, "frame")
    more = f"receptive field {field}, warm-up {plural(contract.warmup_steps, 'step')}"
    return f"{inputs} -> {outputs}; {more}, {plural(len(contract.states), 'state')}"


def resolve(shape: Shape, batch: int) -> tuple[int, ...]:
    """Puts the number of streams in place of ``"N"``, and no rows where any number may be."""
    return tuple(batch if dim == "N" else 0 if dim == "K" else dim for dim in shape)


def refuse_free_rows(contract: Contract, what: str) -> None:
    """Raises UnsupportedError for what has no place for rows of their own at each step."""
    if contract.free_rows is not None:
        raise UnsupportedError(
            f"{what} has no place for the input '{contract.free_rows}', of which each step has any number of rows.",
            hint="Run it with StreamSession, or by the loop of the contract.",
        )


def _as_dict(item: object) -> JsonObject:
    """Lists one level of a dataclass; json.dumps asks again for what is below."""
    if isinstance(item, Mapping):
        return dict(item)
    if not dataclasses.is_dataclass(item):
        raise TypeError(f"a {type(item).__name__} is no JSON value")
    return {part.name: getattr(item, part.name) for part in dataclasses.fields(item)}


def _check_names(contract: Contract) -> None:
    forbid(
        not contract.inputs or not contract.outputs,
        "a model has at least one input and one output",
    )
    forbid(
        (contract.valid is not None) != (contract.boundary == "exact") or contract.valid == "",
        "valid names an input where boundary is 'exact', and is null otherwise",
    )
    state_inputs = [state.input for state in contract.states]
    valid = [contract.valid] if contract.valid else []
    _check_unique("input", [item.name for item in contract.inputs] + valid + state_inputs)
    own = {state.output for state in contract.states} - set(state_inputs)
    lost = set(contract.counters) - set(state_inputs)
    forbid(
        bool(lost) or (bool(contract.lengths) and len(contract.counters) != 2),
        "counters names two states where streams do not have any length",
    )
    forbid(contract.length_remainder >= contract.length_multiple, "length_remainder is below length_multiple")
    _check_unique("output", [item.name for item in contract.outputs] + sorted(own))


def _check_unique(what: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        forbid(
            count > 1,
            f"{what} '{name}' is there twice",
        )


def _check_time(contract: Contract) -> None:
    for item in contract.inputs:
        frames, dim = item.frames_per_step, item.time_dim
        forbid(
            (frames is None) != (dim is None),
            f"input '{item.name}' has one of frames_per_step and time_dim, but not the other",
        )
        forbid(
            frames == 1 and dim is not None and dim > len(item.shape),
            f"input '{item.name}' has its time at dim {dim} of {len(item.shape) + 1}",
        )
        forbid(
            frames is not None and frames > 1 and (item.shape[dim:] or ("",))[0] != frames,
            f"input '{item.name}' of shape {list(item.shape)} lacks {frames} frames at dim {dim}",
        )
    frames_of = {item.name: item.frames_per_step for item in contract.inputs if item.frames_per_step is not None}
    forbid(
        dict(contract.frames_per_step) != frames_of,
        "frames_per_step does not repeat what the inputs say",
    )
    forbid(
        contract.valid is not None and contract.inputs[0].frames_per_step is None,
        "valid counts the frames of the first input, and that has no time",
    )
    for output in contract.outputs:
        forbid(
            output.time_dim is not None and output.time_dim > len(output.shape),
            f"output '{output.name}' has its time at dim {output.time_dim} of {len(output.shape)}",
        )


def _check_shapes(contract: Contract) -> None:
    forbid(contract.free_rows is not None and contract.version == VERSION, f"version {VERSION} has no shape with a 'K'")
    by_input = {state.input: state for state in contract.states}
    for state in contract.states:
        forbid(
            state.batch_dim >= len(state.shape) or state.shape.count("N") > (state.shape[state.batch_dim] == "N"),
            f"state '{state.input}' of shape {list(state.shape)} has no single batch at dim {state.batch_dim}",
        )
        forbid(
            not state.dtype.startswith("float") and not (math.isfinite(state.initial) and state.initial.is_integer()),
            f"state '{state.input}' of {state.dtype} cannot start at {state.initial}",
        )
        source = by_input.get(state.output, state)
        forbid(
            (source.shape, source.dtype, source.batch_dim) != (state.shape, state.dtype, state.batch_dim),
            f"state '{state.input}' takes its value from '{source.input}' of another shape or dtype",
        )
    tensors: list[InputSpec | OutputSpec | StateSpec] = [*contract.inputs, *contract.outputs, *contract.states]
    forbid(
        sum(math.prod(resolve(tensor.shape, 1)) for tensor in tensors) > MAX_ELEMENTS,
        f"the declared shapes hold more than {MAX_ELEMENTS} elements for a single stream",
    )


def _check_nodes(what: str, nodes: Mapping[str, GraphValue], said: Mapping[str, tuple[Shape, str]], batch: int) -> None:
    odd = sorted(nodes.keys() ^ said.keys())
    forbid(
        bool(odd),
        f"metadata and graph do not have the same {what}s: {', '.join(odd[:5])}",
    )
    for name, (dims, dtype) in said.items():
        node, sizes = nodes[name], resolve(dims, batch)
        kind = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(node.type, node.type[7:-1])
        fits = (size == got or not isinstance(got, int) for size, got in zip(sizes, node.shape, strict=False))
        forbid(
            kind != dtype or len(node.shape) != len(sizes) or not all(fits),
            f"{what} '{name}' is {dtype} {list(sizes)} by the metadata, {kind} {node.shape} in the graph",
        )
