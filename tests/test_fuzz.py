"""Anything may stand in a file from elsewhere: reading it ends in an error with a name, or in something that works.

The metadata of a compiled file, its report and its preprocessing; snapshots and states of a session. Drawn by
hypothesis: 60 cases of each in the suite. By hand for as long as one likes, in seconds for all together:

    FUZZ_SECONDS=600 pytest tests/test_fuzz.py --hypothesis-profile thorough --hypothesis-seed 7 -s
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
import torch
from film import Brightness
from hand_made import exact, fir, metadata, pair
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from marks import all_but

import co3d_compile as co3d
from co3d_compile.contract.model_contract import METADATA_KEY, REPORT_KEY
from co3d_compile.contract.read_contract import parse
from co3d_compile.contract.stored_report import stored_report
from co3d_compile.errors import Co3dError, ContractError, SessionError
from co3d_compile.report.web_page import page
from co3d_compile.runtime.session import StreamSession

MODELS = {"fir": fir(), "renamed": fir(renamed=True), "pair": pair(), "exact": exact()}
FEW = 60  # cases of each test in the suite; by hand as many at a time
Property: TypeAlias = tuple[Callable[[Any], None], st.SearchStrategy[Any]]  # what must hold, and for what

numbers = st.integers(-2, 9) | st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 2**63, 10**30])
WORDS = ("N", "x", "y", "valid", "state.0", "float32", "int64", "exact", "nan", "-inf", "NCTHW", "rgb", "")
words = st.sampled_from(WORDS)
leaves = st.none() | st.booleans() | numbers | words | st.text(max_size=8)
values = st.recursive(
    leaves,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(words | st.text(max_size=4), below, max_size=4),
    max_leaves=12,
)


@st.composite
def edited(draw: st.DrawFn, original: Any) -> Any:
    """JSON data with one to four places replaced, removed, doubled or swapped."""
    data = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 4))):
        at: Any = data
        while isinstance(at, (dict, list)) and at:
            keys = sorted(at, key=str) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from(keys))
            below = at[key]
            if isinstance(below, (dict, list)) and below and draw(st.integers(0, 3)):
                at = below
                continue
            what = draw(st.sampled_from(["replace", "replace", "remove", "double", "swap"]))
            if what == "replace":
                at[key] = draw(values)
            elif what == "remove":
                del at[key]
            elif what == "double" and isinstance(at, list):
                at.append(copy.deepcopy(below))
            else:
                other = draw(st.sampled_from(keys))
                at[key], at[other] = at[other], at[key]
            break
    return data


def as_text(data: Any) -> str:
    return json.dumps(data)  # NaN and infinity as Python writes them: they are tried too


def with_metadata(model: bytes, key: str, text: str) -> bytes:
    proto = onnx.load_from_string(model)
    for entry in proto.metadata_props:
        if entry.key == key:
            entry.value = text
    return proto.SerializeToString()


# --- what must hold


def reads(text: str) -> None:
    """Metadata is refused, or means the same when it is written and read again."""
    try:
        contract = parse(text)
    except ContractError:
        return
    try:
        again = contract.to_json()
    except ContractError:  # a number that JSON has no word for, in a part of free form
        return
    assert parse(again).to_json() == again
    assert contract.delays.keys() == {output.name for output in contract.outputs}


def runs(model: bytes, text: str) -> None:
    """A file with this metadata does not open, or steps as the metadata says."""
    try:
        session = StreamSession(with_metadata(model, METADATA_KEY, text), threads=1)
    except Co3dError:
        return
    with session:
        frames = [np.zeros([1 if d == "N" else d for d in i.shape], i.dtype) for i in session.info.inputs]
        results = session.step(frames)
        results = results if isinstance(results, tuple) else (results,)
        assert [r.dtype.name for r in results] == [o.dtype for o in session.info.outputs]
        session.restore(session.snapshot())
        session.reset(stream=0)


@functools.cache
def classifier() -> bytes:
    preprocess = {"size": 16, "mean": [0.1] * 3}
    clip = torch.zeros(1, 3, 8, 16, 16)
    compiled = co3d.compile(Brightness().eval(), (clip,), preprocess=preprocess, labels=["a", "b"])
    return compiled.to_bytes()


def predicts(text: str) -> None:
    """A classifier with this metadata is refused, or predicts."""
    from co3d_compile.media.video import VideoFrame

    try:
        predictor = co3d.Predictor(with_metadata(classifier(), METADATA_KEY, text), threads=1)
    except Co3dError:
        return
    with predictor:
        for index in range(3):
            predictor.push(VideoFrame(np.zeros((18, 20, 3), np.uint8), index / 10, index))


def draws(info: str, text: str) -> None:
    """A report is refused, or becomes a page."""
    try:
        assert page(stored_report(text), parse(info)).startswith("<!doctype html>")
    except ContractError:
        return


def restores(session: StreamSession, blob: bytes) -> None:
    """A snapshot is refused and changes nothing, or is the state from then on."""
    before = session.snapshot()
    try:
        session.restore(blob)
    except SessionError:
        assert session.snapshot() == before
    else:
        assert session.snapshot() == blob


def takes(session: StreamSession, state: dict[Any, Any]) -> None:
    """States are refused and change nothing, or are there afterwards."""
    before = session.snapshot()
    try:
        session.set_state(state)
    except SessionError:
        assert session.snapshot() == before
    else:
        for name, value in session.get_state().items():
            np.testing.assert_array_equal(value, state[name])


# --- what is drawn


@st.composite
def blobs(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes; parts of a snapshot; a snapshot with other bytes, its check sum wrong or set right again."""
    if not draw(st.integers(0, 4)):
        return draw(st.binary(max_size=200))
    body = bytearray(good[:-32])
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(body)))
        body[place : place + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    right = draw(st.booleans())
    return bytes(body) + (hashlib.sha256(body).digest() if right else draw(st.binary(min_size=32, max_size=32)))


@st.composite
def states(draw: st.DrawFn, good: dict[str, np.ndarray]) -> dict[Any, Any]:
    """States of which some are missing, foreign, of another shape or type, or no arrays."""
    state: dict[Any, Any] = {name: value + 1 for name, value in good.items()}
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=2)):
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        dtype = draw(st.sampled_from(["float32", "float64", "int64", "bool", "S3", "O", ">f4", "float16", "M8[s]"]))
        arrays = [np.zeros(shape, dtype), np.zeros(good[name].shape, dtype), good[name][..., :1]]
        state[name] = draw(st.sampled_from(arrays) | leaves)
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=1)):
        del state[name]
    for key in draw(st.lists(leaves, max_size=1)):
        state[key] = draw(leaves)
    return state


def opened(model: bytes) -> StreamSession:
    """A session that has made a step."""
    session = StreamSession(model, threads=1)
    session.step([np.ones([1 if d == "N" else d for d in i.shape], i.dtype) for i in session.info.inputs])
    return session


def of_text() -> Property:
    return reads, st.text() | values.map(as_text) | st.binary().map(lambda b: b.decode("latin-1"))


def of_metadata(model: bytes) -> Property:
    return reads, edited(metadata(model)).map(as_text)


def of_file(model: bytes) -> Property:
    return functools.partial(runs, model), edited(metadata(model)).map(as_text)


def of_snapshot(model: bytes) -> Property:
    session = opened(model)
    return functools.partial(restores, session), blobs(session.snapshot())


def of_states(model: bytes) -> Property:
    session = opened(model)
    return functools.partial(takes, session), states(session.get_state())


def of_predictor() -> Property:
    return predicts, edited(json.loads(stored(METADATA_KEY))).map(as_text)


def of_report() -> Property:
    report = json.loads(stored(REPORT_KEY))
    return functools.partial(draws, stored(METADATA_KEY)), edited(report).map(as_text)


def stored(key: str) -> str:
    return next(str(e.value) for e in onnx.load_from_string(classifier()).metadata_props if e.key == key)


PROPERTIES: dict[str, Callable[[], Property]] = {"text": of_text, "predictor": of_predictor, "report": of_report}
for kind in (of_metadata, of_file, of_snapshot, of_states):
    for model in MODELS:
        PROPERTIES[f"{kind.__name__[3:]}, {model}"] = functools.partial(kind, MODELS[model])


def check(name: str, cases: int, number: int) -> None:
    body, strategy = PROPERTIES[name]()

    def holds(data: Any) -> None:
        body(data)

    profile = settings(settings.get_profile("networks"), max_examples=cases)
    seed(number)(profile(given(strategy)(holds)))()


@pytest.mark.parametrize("name", all_but(PROPERTIES, "text", "report"))
def test_what_is_read_from_elsewhere(name: str, request: pytest.FixtureRequest) -> None:
    given_seed = int(request.config.getoption("--hypothesis-seed", None) or 0)
    thorough = request.config.getoption("--hypothesis-profile", None) == "thorough"
    end = time.monotonic() + (float(os.environ.get("FUZZ_SECONDS", "600")) / len(PROPERTIES) if thorough else 0)
    cases = 0
    while True:
        check(name, FEW, given_seed * 1_000_000 + cases)
        cases += FEW
        if time.monotonic() >= end:
            break
    print(f"--hypothesis-seed {given_seed}, {name}: {cases} cases")
