"""What a session is given from elsewhere: states, snapshots and the metadata of a file, whole, foreign and damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import (
    CHAINS,
    GOOD,
    ROOT,
    build,
    change,
    exact,
    fir,
    fir_oracle,
    fir_parts,
    frames,
    metadata,
    pair,
    python,
    run,
)
from layouts import session_layout  # noqa: F401  all tests here run in both

from co3d_compile.contract.read_contract import parse
from co3d_compile.errors import ContractError, SessionError, UsageError
from co3d_compile.runtime.session import StreamSession
from co3d_compile.runtime.stored_metadata import read_contract

# --- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("renamed", [False, True], ids=["paired", "renamed"])
@pytest.mark.parametrize("initial", [0.0, -7.0])
def test_reset_of_one_stream(step: int, renamed: bool, initial: float) -> None:
    model = fir(CHAINS["rings of 2, 3 and 5"], renamed, initial)
    x = frames(12, 3, 2, 3)
    session, apart = StreamSession(model, batch=3), [StreamSession(model) for _ in range(3)]
    for n, frame in enumerate(x):
        if n == step:
            session.reset(stream=1)
            apart[1].reset()
        together = session.step(frame)
        alone = [np.asarray(one.step(frame[i : i + 1])) for i, one in enumerate(apart)]
        np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)


def test_reset_knows_where_the_batch_is() -> None:
    session = StreamSession(pair(), batch=2)
    session.step(*(np.ones(shape, np.float32) for shape in ((2, 4, 2), (2, 2), (2, 1))))
    session.reset(stream=1)
    state = session.get_state()
    np.testing.assert_array_equal(state["state.before"], [[[1, 1], [0, 0]]])
    np.testing.assert_array_equal(state["state.count"], [[6], [5]])
    odd: tuple[Any, ...] = (2, -1, 0.5, "0")
    for stream in odd:
        with pytest.raises(UsageError, match="from 0 to 1"):
            session.reset(stream=stream)


def test_state_can_be_taken_out_and_put_back() -> None:
    x = frames(9, 2, 2, 3)
    one, other = (StreamSession(fir(CHAINS["rings of 2, 3 and 5"], True), batch=2) for _ in range(2))
    run(one, x[:4])
    run(other, x[:1])
    other.set_state(one.get_state())
    np.testing.assert_array_equal(run(one, x[4:]), run(other, x[4:]))


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda s: {k: s[k] for k in list(s)[1:]}, "not the states of this model: state.conv.0.0"),
    "too many": (lambda s: {**s, "more": GOOD}, "not the states of this model: more"),
    "shape": (lambda s: {**s, "state.conv.0.1": GOOD[:1]}, r"'state.conv.0.1' has shape \(1, 2, 3\), expected"),
    "dtype": (lambda s: {**s, "state.conv.0.1": GOOD.astype(int)}, "'state.conv.0.1' has dtype int64, expected"),
    "a list": (lambda s: {**s, "state.conv.0.1": [0.0]}, "'state.conv.0.1' is a list"),
}


@pytest.mark.parametrize("change, message", BAD_STATES.values(), ids=BAD_STATES)
def test_foreign_states_change_nothing(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    session = StreamSession(fir(renamed=True), batch=2)
    session.step(GOOD + 1)
    before = session.snapshot()
    with pytest.raises(SessionError, match=message):
        session.set_state(change({name: value + 5 for name, value in session.get_state().items()}))
    assert session.snapshot() == before


def test_snapshot_goes_back_in_the_same_session() -> None:
    x = frames(9, 2, 2, 3)
    session = StreamSession(fir(CHAINS["rings that never meet"], True), batch=2)
    run(session, x[:3])
    blob = session.snapshot()
    y = run(session, x[3:])
    session.restore(blob)
    np.testing.assert_array_equal(run(session, x[3:]), y)


IN_ANOTHER_PROCESS = """
import sys, numpy as np
from co3d_compile.runtime.session import StreamSession
model, blob, x, y = sys.argv[1:]
session = StreamSession(model, batch=2)
session.restore(open(blob, "rb").read())
np.save(y, np.stack([session.step(frame) for frame in np.load(x)]))
"""


@pytest.mark.parametrize("optimize", [[], ["-O"]], ids=["python", "python -O"])
def test_snapshot_goes_on_in_another_process(tmp_path: Path, optimize: list[str]) -> None:
    paths = [tmp_path / name for name in ("m.onnx", "state.bin", "x.npy", "y.npy")]
    x = frames(9, 2, 2, 3)
    paths[0].write_bytes(fir(CHAINS["rings of 2, 3 and 5"], True))
    session = StreamSession(paths[0], batch=2)
    run(session, x[:4])
    paths[1].write_bytes(session.snapshot())
    np.save(paths[2], x[4:])
    python(*optimize, "-c", IN_ANOTHER_PROCESS, *paths)
    np.testing.assert_array_equal(np.load(paths[3]), run(session, x[4:]))


def forged(blob: bytes) -> bytes:
    """A snapshot that is too short, with a check sum that is right."""
    import hashlib

    body = blob[:-36]
    return body + hashlib.sha256(body).digest()


BAD_BLOBS: dict[str, tuple[Callable[[bytes], Any], str]] = {
    "empty": (lambda blob: b"", "damaged"),
    "cut": (lambda blob: blob[:-1], "damaged"),
    "too long": (lambda blob: blob + b"\0", "damaged"),
    "a bit flipped": (lambda blob: blob[:60] + bytes([blob[60] ^ 1]) + blob[61:], "damaged"),
    "forged": (forged, "damaged"),
    "text": (lambda blob: "state", "damaged"),
    "another model": (lambda blob: StreamSession(fir(((0.5, -2.5),)), batch=2).snapshot(), "another model"),
    "another batch": (lambda blob: StreamSession(fir(renamed=True)).snapshot(), "holds 1 streams, not 2"),
}


@pytest.mark.parametrize("change, message", BAD_BLOBS.values(), ids=BAD_BLOBS)
def test_foreign_snapshots_change_nothing(change: Callable[[bytes], Any], message: str) -> None:
    session = StreamSession(fir(renamed=True), batch=2)
    session.step(GOOD + 1)
    before = session.snapshot()
    with pytest.raises(SessionError, match=message):
        session.restore(change(before))
    assert session.snapshot() == before


# --- the metadata -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [fir(), fir(renamed=True, initial=-math.inf), pair(), exact()])
def test_metadata_round_trip(model: bytes) -> None:
    data = metadata(model)
    assert json.loads(parse(json.dumps(data)).to_json()) == data
    assert parse(json.dumps({**data, "key of a later compiler": 1})) == parse(json.dumps(data))


def test_infinite_values_are_strict_json() -> None:
    text = fir_parts(initial=-math.inf)[1].to_json()
    assert '"-inf"' in text
    assert math.isnan(parse(text.replace('"-inf"', "NaN")).states[0].initial)
    with pytest.raises(ContractError, match="cannot be written"):
        dataclasses.replace(fir_parts()[1], options={"x": math.inf}).to_json()


BAD_METADATA = {
    "version 3": ("version", 3, "contract version 3; this reader knows 1 and 2"),
    "counters that are no states": ("counters", ["a", "b"], "counters names two states"),
    "no version": ("version", ..., "contract version None"),
    "missing key": ("states", ..., "metadata.states is missing"),
    "wrong type": ("inputs", {}, r"metadata.inputs must be list, not dict \{\}"),
    "wrong type below": ("states.1.initial", [0], r"metadata.states\[1\].initial must be int or float or str"),
    "no number": ("states.1.initial", "much", r"states\[1\].initial is not a number"),
    "true is no number": ("warmup_steps", True, "warmup_steps must be int, not bool"),
    "negative": ("warmup_steps", -1, "warmup_steps must be from 0"),
    "no inputs": ("inputs", [], "at least one input"),
    "huge dim": ("states.0.shape", ["N", 10**30], "must be from 1 to"),
    "huge tensor": ("outputs.0.shape", ["N", 2**20, 2**20], "more than"),
    "huge rank": ("outputs.0.shape", [1] * 1000, "has 1000 dims"),
    "no dim": ("states.0.shape", ["N", 0], "from 1 to"),
    "named dim": ("states.0.shape", ["N", "M"], "must be int, not str"),
    "dtype": ("inputs.0.dtype", "complex64", "dtype must be one of float32"),
    "boundary": ("boundary", "soft", "must be one of stream, exact"),
    "exact without valid": ("boundary", "exact", "valid names an input where"),
    "valid without exact": ("valid", "valid", "valid names an input where"),
    "input twice": ("states.1.input", "x", "input 'x' is there twice"),
    "output twice": ("states.0.output", "y", "output 'y' is there twice"),
    "two states of one output": ("states.1.output", "next.0.0", "'next.0.0' feeds two states"),
    "ring of states": ("states.0.output", "state.conv.0.1", "no output of the model feeds"),
    "shapes that do not pair": ("states.1.shape", ["N", 3, 2], "of another shape or dtype"),
    "two batches": ("states.1.shape", ["N", "N", 3], "no single batch at dim 0"),
    "no batch dim": ("states.1.batch_dim", 3, "no single batch at dim 3"),
    "integer from NaN": (
        "states.1",
        {**metadata(fir())["states"][1], "dtype": "int64", "initial": "nan"},
        "cannot start at nan",
    ),
    "time without frames": ("inputs.0.frames_per_step", None, "but not the other"),
    "frames that contradict": ("frames_per_step", {"x": 2}, "does not repeat"),
    "time outside": ("inputs.0.time_dim", 4, "time at dim 4 of 4"),
    "no room for frames": ("inputs.0.frames_per_step", 4, "lacks 4 frames at dim 2"),
    "time of an output outside": ("outputs.0.time_dim", 4, "time at dim 4 of 3"),
}


@pytest.mark.parametrize("path, value, message", BAD_METADATA.values(), ids=BAD_METADATA)
def test_bad_metadata(path: str, value: Any, message: str) -> None:
    data = metadata(fir(renamed=True))
    change(path, value)(data)
    with pytest.raises(ContractError, match=message):
        parse(json.dumps(data))


@pytest.mark.parametrize("key", [b"compiler_version", b"co3d"])
def test_bytes_that_are_no_text(key: bytes, tmp_path: Path) -> None:
    model = fir()
    at = model.rindex(key)
    bad = model[:at] + b"\xa2" + model[at + 1 :]
    (tmp_path / "model.onnx").write_bytes(bad)
    for read in (lambda: StreamSession(bad), lambda: read_contract(tmp_path / "model.onnx")):
        with pytest.raises(ContractError, match="is no text"):
            read()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "9" * 5000, "[" * 100_000, '{"version": 1}'])
def test_text_that_is_no_metadata(text: str) -> None:
    with pytest.raises(ContractError):
        parse(text)


def paths_of(data: Any, prefix: str = "") -> list[str]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in [f"{prefix}{key}", *paths_of(value, f"{prefix}{key}.")]]


@pytest.mark.parametrize("value", [None, True, -1, 1.5, 10**30, "", "N", [], [[]], {}, {"a": None}, math.nan, ...])
@pytest.mark.parametrize("model", [fir(renamed=True), pair(), exact()], ids=["fir", "pair", "exact"])
def test_damaged_metadata_is_never_a_traceback(model: bytes, value: Any) -> None:
    for path in paths_of(metadata(model)):
        data = metadata(model)
        change(path, value)(data)
        try:
            contract = parse(json.dumps(data))
            text = contract.to_json()
        except ContractError:
            continue
        assert parse(text).to_json() == text


BAD_GRAPHS = {
    "other input": ("inputs.0.name", "z", "the same inputs: x, z"),
    "other output": ("outputs.0.name", "z", "the same outputs: y, z"),
    "other state": ("states.1.output", "z", "the same outputs: next.0.1, z"),
    "other shape": (
        "outputs.0.shape",
        ["N", 2, 4],
        r"'y' is float32 \[1, 2, 4\] by the metadata, float32 \['N', 2, 3\]",
    ),
    "other rank": ("outputs.0.shape", ["N", 2], r"\[1, 2\] by the metadata"),
    "other dtype": ("outputs.0.dtype", "int64", "'y' is int64"),
}


@pytest.mark.parametrize("path, value, message", BAD_GRAPHS.values(), ids=BAD_GRAPHS)
def test_metadata_that_contradicts_the_graph(path: str, value: Any, message: str) -> None:
    nodes, contract = fir_parts()
    data = json.loads(contract.to_json())
    change(path, value)(data)
    if path.startswith("inputs"):
        data["frames_per_step"] = {value: 1}
    with pytest.raises(ContractError, match=message):
        StreamSession(build(nodes, contract, json.dumps(data)))


@pytest.mark.parametrize("renamed", [False, True], ids=["paired", "renamed"])
def test_the_loop_on_the_page_runs(renamed: bool, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "contract.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "m.onnx"
    path.write_bytes(fir(CHAINS["rings of 2, 3 and 5"], renamed))
    x = frames(6, 1, 2, 3)
    names: dict[str, Any] = {"path": str(path), "frames": x}
    exec(code, names)
    np.testing.assert_allclose(
        np.stack(names["results"]), fir_oracle(x, CHAINS["rings of 2, 3 and 5"]), rtol=1e-5, atol=1e-5
    )
