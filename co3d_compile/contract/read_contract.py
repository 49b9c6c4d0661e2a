"""Reads the metadata of a compiled model: each key by a reader that checks its type (docs/contract.md)."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from dataclasses import MISSING
from typing import Any, TypeVar

from co3d_compile.contract.json_readers import (
    HINT,
    MAX_ELEMENTS,
    Json,
    Reader,
    counts,
    each,
    fail,
    number,
    or_null,
    shape,
    text,
    typed,
    whole,
)
from co3d_compile.contract.model_contract import (
    DTYPES,
    NEWEST,
    VERSION,
    Contract,
    InputSpec,
    LocalRegion,
    OutputSpec,
    Recomputed,
    StateSpec,
)
from co3d_compile.errors import ContractError

T = TypeVar("T")


def parse(text: str) -> Contract:
    """Reads the JSON of ``metadata_props["co3d"]``.

    Raises:
        ContractError: Not JSON, another version, a missing key, a wrong type or a contradiction.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"The co3d metadata is not JSON: {str(error)[:200]}.", hint=HINT) from error
    version = data.get("version") if isinstance(data, dict) else None
    if version not in (VERSION, NEWEST):
        known = f"this reader knows {VERSION} and {NEWEST}"
        raise ContractError(
            f"The co3d metadata has contract version {reprlib.repr(version)}; {known}.",
            hint="Install the co3d-compile that wrote the file, or compile the model again.",
        )
    return record(Contract, data, "metadata")


def record(cls: type[T], data: Json, where: str) -> T:
    """Reads a dataclass from a JSON object.

    Keys whose field has a default may be left out, unknown ones are skipped.
    """
    given = typed(dict)(data, where)
    for part in dataclasses.fields(cls):  # type: ignore[arg-type]
        if part.name not in given and part.default is MISSING and part.default_factory is MISSING:
            fail(f"{where}.{part.name} is missing")
    readers = _READERS[cls].items()
    return cls(**{name: read(given[name], f"{where}.{name}") for name, read in readers if name in given})


def records(cls: type[T]) -> Reader[tuple[T, ...]]:
    """Reads a list of JSON objects."""
    return each(lambda value, where: record(cls, value, where))


_TENSOR: dict[str, Reader[Any]] = {"shape": shape, "dtype": text(*DTYPES)}
_READERS: dict[type, dict[str, Reader[Any]]] = {
    InputSpec: {
        "name": text(),
        **_TENSOR,
        "frames_per_step": or_null(whole(1)),
        "time_dim": or_null(whole(0)),
        "waits": or_null(whole(0)),
        "stream_column": or_null(whole(0)),
    },
    OutputSpec: {
        "name": text(),
        **_TENSOR,
        "delay": whole(-MAX_ELEMENTS),
        "has_time": typed(bool),
        "time_dim": or_null(whole(0)),
        "entries_per_step": whole(0),
        "frames_per_entry": or_null(typed(int, float)),
    },
    StateSpec: {
        "input": text(),
        "output": text(),
        **_TENSOR,
        "initial": number,
        "batch_dim": whole(0),
        "unbounded": typed(bool),
    },
    Recomputed: {"operator": text(), "module_path": typed(str), "reason": typed(str)},
    LocalRegion: {
        "operator": text(),
        "module_path": typed(str),
        "before": whole(0),
        "after": whole(0),
        "period": whole(1),
        "entries": whole(1),
        "multiply_adds": whole(0),
        "result": text(),
        "inputs": each(text()),
        "time_dim": whole(0),
        "least_frames": whole(0),
    },
    Contract: {
        "compiler_version": text(),
        "inputs": records(InputSpec),
        "outputs": records(OutputSpec),
        "states": records(StateSpec),
        "frames_per_step": counts,
        "receptive_field": or_null(whole(1)),
        "warmup_steps": whole(0),
        "window": or_null(whole(1)),
        "recomputed": records(Recomputed),
        "regions": records(LocalRegion),
        "options": typed(dict),
        "boundary": text("stream", "exact"),
        "valid": or_null(text()),
        "flush_steps": whole(0),
        "counters": each(text()),
        "length_multiple": whole(1),
        "length_remainder": whole(0),
        "preprocess": or_null(typed(dict)),
        "labels": or_null(each(lambda value, where: value)),
        "native": or_null(whole(2)),
        "weights_sha256": or_null(text()),
        "version": whole(VERSION),
    },
}
