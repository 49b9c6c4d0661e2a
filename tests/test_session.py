"""The running side: sessions over small hand-made ONNX models, against numpy."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from co3d_compile.buffers import Buffer
from co3d_compile.contract import Contract, InputSpec, OutputSpec, Recomputed, StateSpec, parse
from co3d_compile.errors import Co3dError, ContractError, LoadError, SessionError, UsageError
from co3d_compile.session import StreamSession

KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
FIR = ((0.5, -2.0),)  # the taps behind the newest frame, one tuple for each chain of states
ROOT = Path(__file__).parents[1]


class Nodes(list[onnx.NodeProto]):
    """A graph being written: ``nodes("Add", "a", "b")`` returns the name of the result."""

    def __call__(self, operator: str, *inputs: str, result: str | None = None, **attributes: Any) -> str:
        name = result or f"t{len(self)}"
        self.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: str = "float32") -> str:
        return self("Constant", value=onnx.numpy_helper.from_array(np.asarray(value, dtype)))


def build(nodes: Nodes, contract: Contract, metadata: str | None = None) -> bytes:
    inputs = [(item.name, item.dtype, item.shape) for item in contract.inputs]
    if contract.valid:
        inputs.append((contract.valid, "bool", ("N", contract.inputs[0].frames_per_step or 1)))
    inputs += [(state.input, state.dtype, state.shape) for state in contract.states]
    outputs = [(item.name, item.dtype, item.shape) for item in contract.outputs]
    renamed = {state.input for state in contract.states}
    outputs += [(state.output, state.dtype, state.shape) for state in contract.states if state.output not in renamed]
    sides = [[helper.make_tensor_value_info(n, KINDS[d], shape) for n, d, shape in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", sides[0], sides[1])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    helper.set_model_props(model, {"co3d": contract.to_json() if metadata is None else metadata})
    return model.SerializeToString()


def fir_parts(
    chains: tuple[tuple[float, ...], ...] = FIR, renamed: bool = False, initial: float = 0.0, reduce: str = "Add"
) -> tuple[Nodes, Contract]:
    """x (N, 2, T, 3) in the clip; y[n] = x[n] + sum over chains and k of taps[k] * x[n-1-k]; a state for each slot."""
    nodes, states = Nodes(), []
    total = nodes("Identity", "x")
    for c, taps in enumerate(chains):
        value = nodes("Identity", "x", result=f"next.{c}.0")
        for k, tap in enumerate(taps):
            name = f"state.conv.{c}.{k}"
            states.append(StateSpec(name, value, ("N", 2, 3), "float32", initial, 0))
            total = nodes(reduce, total, nodes("Mul", name, nodes.constant(tap)))
            if k + 1 < len(taps):
                value = name if renamed else nodes("Identity", name, result=f"next.{c}.{k + 1}")
    nodes("Identity", total, result="y")
    longest = max((len(taps) for taps in chains), default=0)
    contract = Contract(
        compiler_version="0",
        inputs=(InputSpec("x", ("N", 2, 3), "float32", 1, 2),),
        outputs=(OutputSpec("y", ("N", 2, 3), "float32", 0, True, 2, 1),),
        states=tuple(states),
        frames_per_step={"x": 1},
        receptive_field=longest + 1,
        warmup_steps=longest,
        recomputed=(Recomputed("aten.flip", "head", "looks ahead"),),
        options={"state_io": "renamed" if renamed else "paired"},
        labels=("a", "b"),
    )
    return nodes, contract


def fir(*args: Any, **kwargs: Any) -> bytes:
    return build(*fir_parts(*args, **kwargs))


def fir_oracle(x: np.ndarray, chains: tuple[tuple[float, ...], ...] = FIR) -> np.ndarray:
    """x and y (steps, N, 2, 3), zeros before the start."""
    y = x.copy()
    for taps in chains:
        for k, tap in enumerate(taps):
            y[k + 1 :] += np.float32(tap) * x[: max(len(x) - k - 1, 0)]
    return y


def pair() -> bytes:
    """Two inputs at two rates and one without time; two outputs; states of two dtypes, one with its batch at dim 1.

    fast (N, 4, 2), slow (N, 2), gain (N, 1); a = fast * gain + the slow before; b = slow + number of the step.
    """
    nodes = Nodes()
    before = nodes("Transpose", "state.before", perm=[1, 0, 2])
    nodes("Add", nodes("Mul", "fast", nodes("Unsqueeze", "gain", nodes.constant([2], "int64"))), before, result="a")
    nodes("Add", "slow", nodes("Cast", "state.count", to=TensorProto.FLOAT), result="b")
    nodes("Unsqueeze", "slow", nodes.constant([0], "int64"), result="next.before")
    nodes("Add", "state.count", nodes.constant(1, "int64"), result="next.count")
    contract = Contract(
        compiler_version="0",
        inputs=(
            InputSpec("fast", ("N", 4, 2), "float32", 4, 1),
            InputSpec("slow", ("N", 2), "float32", 1, 1),
            InputSpec("gain", ("N", 1), "float32", None, None),
        ),
        outputs=(
            OutputSpec("a", ("N", 4, 2), "float32", -1, True, 1, 4),
            OutputSpec("b", ("N", 2), "float32", 2, False, None, 1),
        ),
        states=(
            StateSpec("state.before", "next.before", (1, "N", 2), "float32", 0.0, 1),
            StateSpec("state.count", "next.count", ("N", 1), "int64", 5.0, 0),
        ),
        frames_per_step={"fast": 4, "slow": 1},
        receptive_field=None,
        warmup_steps=0,
    )
    return build(nodes, contract)


def exact(flush_steps: int = 2) -> bytes:
    """y[n] = x[n] + x[n-2] with x zero wherever it is not valid, two frames a step; x (N, 2, 3)."""
    nodes = Nodes()
    mask = nodes("Unsqueeze", "valid", nodes.constant([2], "int64"))
    inside = nodes("Where", mask, "x", nodes.constant(0.0))
    nodes("Add", inside, "state.0", result="y")
    nodes("Identity", inside, result="next.0")
    contract = Contract(
        compiler_version="0",
        inputs=(InputSpec("x", ("N", 2, 3), "float32", 2, 1),),
        outputs=(OutputSpec("y", ("N", 2, 3), "float32", 0, True, 1, 2),),
        states=(StateSpec("state.0", "next.0", ("N", 2, 3), "float32", 0.0, 0),),
        frames_per_step={"x": 2},
        receptive_field=3,
        warmup_steps=1,
        boundary="exact",
        valid="valid",
        flush_steps=flush_steps,
    )
    return build(nodes, contract)


def frames(steps: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, *shape)).astype(np.float32)


def run(session: StreamSession, x: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(session.step(frame)) for frame in x])


# --- stepping ---------------------------------------------------------------------------------------------------

CHAINS = {
    "fir": FIR,
    "one slot": ((3.0,),),
    "no state": (),
    "delay of 8": ((0.0,) * 7 + (1.0,),),
    "rings of 2, 3 and 5": ((1.0,), (0.5, 2.0), (0.0, 1.0, 0.0, 4.0)),
    "rings that never meet": tuple((float(k),) * k for k in (1, 2, 4, 6, 10)),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("renamed", [False, True], ids=["paired", "renamed"])
@pytest.mark.parametrize("chains", CHAINS.values(), ids=CHAINS)
def test_steps_equal_the_whole_stream(chains: tuple[tuple[float, ...], ...], renamed: bool, batch: int) -> None:
    x = frames(40, batch, 2, 3)
    session = StreamSession(fir(chains, renamed), batch=batch)
    np.testing.assert_allclose(run(session, x), fir_oracle(x, chains), rtol=1e-5, atol=1e-5)
    session.reset()
    np.testing.assert_allclose(run(session, x[7:]), fir_oracle(x[7:], chains), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chains", CHAINS.values(), ids=CHAINS)
def test_renamed_and_paired_hold_the_same_state(chains: tuple[tuple[float, ...], ...]) -> None:
    paired, renamed = StreamSession(fir(chains)), StreamSession(fir(chains, True))
    for frame in frames(20, 1, 2, 3):
        np.testing.assert_array_equal(paired.step(frame), renamed.step(frame))
        one, other = paired.get_state(), renamed.get_state()
        assert list(one) == list(other)
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_several_inputs_and_outputs_in_model_order() -> None:
    session = StreamSession(pair(), batch=2)
    fast, slow, gain = frames(5, 2, 4, 2), frames(5, 2, 2, seed=1), frames(5, 2, 1, seed=2)
    for n in range(5):
        arguments = (fast[n], slow[n], gain[n])
        a, b = session.step(*arguments) if n % 2 else session.step(list(arguments))
        before = slow[n - 1] if n else np.zeros_like(slow[0])
        np.testing.assert_allclose(a, fast[n] * gain[n][:, :, None] + before[:, None], rtol=1e-6)
        np.testing.assert_allclose(b, slow[n] + 5 + n, rtol=1e-6)


def test_start_values_that_are_not_finite() -> None:
    x = frames(6, 1, 2, 3)
    y = run(StreamSession(fir(((1.0, 1.0),), initial=-math.inf, reduce="Max")), x)
    np.testing.assert_array_equal(y, [x[max(n - 2, 0) : n + 1].max(axis=0) for n in range(6)])
    session = StreamSession(fir(renamed=True, initial=math.nan))
    y = run(session, x)
    assert np.isnan(y[: session.info.warmup_steps]).all()
    np.testing.assert_allclose(y[2:], fir_oracle(x)[2:], rtol=1e-5)


LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "as the ONNX input": lambda x: x,
    "a time dim of 1": lambda x: x[:, :, None],
    "in a tuple": lambda x: (x,),
    "in a list, with time": lambda x: [x[:, :, None]],
    "transposed memory": lambda x: np.asfortranarray(x),
    "every second element": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "backwards in memory": lambda x: x[::-1].copy()[::-1],
    "read only": lambda x: np.broadcast_to(x, x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_are_accepted(layout: Callable[[np.ndarray], Any]) -> None:
    x = frames(4, 2, 2, 3)
    session = StreamSession(fir(), batch=2)
    y = np.stack([np.asarray(session.step(layout(frame))) for frame in x])
    assert y.shape == x.shape
    np.testing.assert_allclose(y, fir_oracle(x), rtol=1e-5)


def test_results_are_the_callers_own() -> None:
    session = StreamSession(fir())
    x = frames(2, 1, 2, 3)
    first = session.step(x[0])
    assert isinstance(first, np.ndarray)
    kept = first.copy()
    x[0] = 9
    session.step(x[1])
    np.testing.assert_array_equal(first, kept)
    first[:] = np.nan
    assert np.isfinite(np.asarray(session.step(x[1]))).all()
    session.get_state()["state.conv.0.0"][:] = np.nan
    assert np.isfinite(np.asarray(session.step(x[1]))).all()


GOOD = np.zeros((2, 2, 3), np.float32)
BAD_STEPS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no input": ((), {}, "Got 0 inputs, expected 1.*x"),
    "two inputs": ((GOOD, GOOD), {}, "Got 2 inputs, expected 1"),
    "float64": ((GOOD.astype("float64"),), {}, r"dtype float64, expected float32.*astype\('float32'\)"),
    "uint8": ((GOOD.astype("uint8"),), {}, "dtype uint8, expected float32"),
    "foreign byte order": ((GOOD.astype(">f4"),), {}, "dtype >f4, expected float32"),
    "other batch": ((GOOD[:1],), {}, r"shape \(1, 2, 3\), expected \(2, 2, 3\)"),
    "no batch": ((GOOD[0],), {}, r"shape \(2, 3\), expected \(2, 2, 3\)"),
    "two frames": ((np.stack([GOOD, GOOD], axis=2),), {}, r"shape \(2, 2, 2, 3\), expected"),
    "time at the wrong dim": ((GOOD[:, None],), {}, r"shape \(2, 1, 2, 3\), expected"),
    "a string": (("frame.png",), {}, "is a str, expected a numpy array"),
    "none": ((None,), {}, "is a NoneType"),
    "valid": ((GOOD,), {"valid": np.ones((2, 1), bool)}, "takes no valid flags.*boundary="),
}


@pytest.mark.parametrize("args, kwargs, message", BAD_STEPS.values(), ids=BAD_STEPS)
def test_wrong_steps_change_nothing(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    session = StreamSession(fir(renamed=True), batch=2)
    session.step(GOOD + 1)
    before = session.snapshot()
    with pytest.raises(SessionError, match=message):
        session.step(*args, **kwargs)
    assert session.snapshot() == before


def test_a_failure_of_onnxruntime_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = StreamSession(fir(renamed=True), batch=2)
    x = frames(4, 2, 2, 3)
    run(session, x[:2])
    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run_with_iobinding", lambda *_: 1 / 0)
        with pytest.raises(SessionError, match="onnxruntime failed"):
            session.step(x[0])
    np.testing.assert_allclose(run(session, x[2:]), fir_oracle(x)[2:], rtol=1e-5)


def test_buffers_outside_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's buffers go through, short of the GPU: reads and writes by way of OrtValue only."""
    made = Buffer.__init__

    def make(self: Buffer, *args: Any) -> None:
        made(self, *args)
        self.host = None

    x = frames(8, 2, 2, 3)
    expected = StreamSession(fir(renamed=True), batch=2)
    monkeypatch.setattr(Buffer, "__init__", make)
    session = StreamSession(fir(renamed=True), batch=2)
    monkeypatch.undo()
    for one in (expected, session):
        one.step(x[0])
        one.reset(stream=1)
        one.restore(one.snapshot())
    np.testing.assert_array_equal(run(session, x[1:]), run(expected, x[1:]))
    assert session.snapshot() == expected.snapshot()


# --- ends -------------------------------------------------------------------------------------------------------


def test_valid_flags_and_flush() -> None:
    x = frames(3, 2, 2, 3)
    session = StreamSession(exact(), batch=2)
    alive = np.array([[True, True], [True, False]])
    y = [session.step(x[0]), session.step(x[1], valid=alive), session.step(x[2], valid=np.array([True, False]))]
    x[1:, 1, 1:], x[2, 1] = 0, 0
    rest = session.flush()
    assert len(rest) == 2
    expected = np.concatenate([x, np.zeros_like(x)])
    expected[1:] += expected[:-1].copy()
    np.testing.assert_allclose(np.stack(y + rest), expected[:5], rtol=1e-6)


def test_flush_needs_a_model_with_ends() -> None:
    with pytest.raises(SessionError, match='boundary="exact"'):
        StreamSession(fir()).flush()
    assert StreamSession(exact(flush_steps=0)).flush() == []


BAD_FLAGS = {
    "numbers": (np.ones((2, 2), np.float32), "dtype float32, expected bool"),
    "other length": (np.ones((2, 3), bool), r"shape \(2, 3\), expected \(2, 2\)"),
    "a flag": (True, "is a bool"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_wrong_flags(flags: Any, message: str) -> None:
    with pytest.raises(SessionError, match=message):
        StreamSession(exact(), batch=2).step(np.zeros((2, 2, 3), np.float32), valid=flags)


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
from co3d_compile.session import StreamSession
model, blob, x, y = sys.argv[1:]
session = StreamSession(model, batch=2)
session.restore(open(blob, "rb").read())
np.save(y, np.stack([session.step(frame) for frame in np.load(x)]))
"""


def python(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


# --- opening and closing ----------------------------------------------------------------------------------------


class Compiled:
    def to_bytes(self) -> bytes:
        return fir()


def test_models_that_open(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside.onnx", tmp_path / "outside.onnx"
    inside.write_bytes(fir())
    onnx.save(
        onnx.load_from_string(fir()), outside, save_as_external_data=True, size_threshold=0, convert_attribute=True
    )
    assert len(list(tmp_path.iterdir())) == 3
    x = frames(4, 1, 2, 3)
    models: tuple[Any, ...] = (inside, str(inside), outside, fir(), bytearray(fir()), Compiled())
    for model in models:
        np.testing.assert_allclose(run(StreamSession(model, threads=1), x), fir_oracle(x), rtol=1e-5)


def test_info() -> None:
    info = StreamSession(pair()).info
    assert info.frames_per_step == {"fast": 4, "slow": 1}
    assert info.delays == {"a": -1, "b": 2}
    assert (info.receptive_field, info.warmup_steps, info.window, info.recomputed) == (None, 0, None, ())
    assert [state.input for state in info.states] == ["state.before", "state.count"]
    assert [item.name for item in info.inputs] == ["fast", "slow", "gain"]
    assert StreamSession(fir()).info.recomputed[0].operator == "aten.flip"


def plain() -> bytes:
    model = onnx.load_from_string(fir())
    del model.metadata_props[:]
    return model.SerializeToString()


def fixed() -> bytes:
    nodes, contract = fir_parts()
    fixed_states = tuple(dataclasses.replace(state, shape=(1, 2, 3)) for state in contract.states)
    return build(nodes, dataclasses.replace(contract, states=fixed_states))


BAD_MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Co3dError], str]] = {
    "no file": (lambda: "nowhere.onnx", {}, LoadError, r"nowhere\.onnx"),
    "a folder": (lambda: ROOT, {}, LoadError, "Cannot read"),
    "a null byte": (lambda: "\0", {}, LoadError, "Cannot read"),
    "not onnx": (lambda: b"not onnx", {}, LoadError, "cannot open"),
    "half a file": (lambda: fir()[:-50], {}, Co3dError, "open|metadata"),
    "a number": (lambda: 3, {}, UsageError, "A int is no model"),
    "not compiled": (plain, {}, ContractError, "no co3d metadata.*co3d-compile"),
    "no streams": (fir, {"batch": 0}, UsageError, "batch is 0.*from 1"),
    "half a stream": (fir, {"batch": 1.5}, UsageError, "batch is 1.5"),
    "more streams than memory": (fir, {"batch": 10**18}, SessionError, "no memory.*smaller batch"),
    "fixed batch": (fixed, {"batch": 2}, UsageError, "batch of 1, not 2"),
    "no threads": (fir, {"threads": 0}, UsageError, "threads is 0"),
    "no provider": (fir, {"providers": []}, UsageError, "no provider.*CPUExecutionProvider"),
    "unknown provider": (fir, {"providers": ["Abacus"]}, UsageError, "no provider Abacus.*CPUExecutionProvider"),
    "unknown with options": (fir, {"providers": [("Abacus", {})]}, UsageError, "no provider Abacus"),
}


@pytest.mark.parametrize("model, options, error, message", BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_do_not_open(
    model: Callable[[], Any], options: dict[str, Any], error: type[Co3dError], message: str
) -> None:
    with pytest.raises(error, match=message):
        StreamSession(model(), **options)


def test_a_provider_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider"])
    with pytest.raises(UsageError, match="could not start CPU"):
        StreamSession(fir())


def test_a_closed_session_says_so() -> None:
    with StreamSession(exact()) as session:
        session.step(np.zeros((1, 2, 3), np.float32))
    calls = (
        lambda: session.step(GOOD),
        session.flush,
        session.reset,
        session.get_state,
        session.snapshot,
        session.close,
    )
    for call in calls:
        with pytest.raises(SessionError, match="closed"):
            call()
    with StreamSession(fir()) as session:
        session.close()


def test_a_second_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session = StreamSession(exact())
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(20)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", wait)
    frame = np.zeros((1, 2, 3), np.float32)
    thread = threading.Thread(target=session.step, args=(frame,))
    thread.start()
    try:
        assert inside.wait(20)
        calls = (lambda: session.step(frame), session.flush, session.reset, session.get_state, session.snapshot)
        for call in calls:
            with pytest.raises(SessionError, match=r"another thread.*of its own"):
                call()
    finally:
        go_on.set()
        thread.join()
    session.step(frame)


def test_importing_the_session_needs_neither_torch_nor_onnx() -> None:
    code = """
import sys, time
start = time.perf_counter()
import co3d_compile.session
print(time.perf_counter() - start, sorted({"torch", "onnx", "onnxscript", "onnx_ir"} & set(sys.modules)))
"""
    seconds, modules = python("-c", code).split(maxsplit=1)
    assert modules.strip() == "[]"
    assert float(seconds) < 1


# --- the metadata -----------------------------------------------------------------------------------------------


def metadata(model: bytes) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(onnx.load_from_string(model).metadata_props[0].value)
    return data


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


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of metadata: ``states.0.shape`` becomes value; deleted if value is Ellipsis."""

    def edit(data: Any) -> None:
        *steps, last = path.split(".")
        for step in steps:
            data = data[int(step) if isinstance(data, list) else step]
        key = int(last) if isinstance(data, list) else last
        if value is ...:
            del data[key]
        else:
            data[key] = value

    return edit


BAD_METADATA = {
    "version 2": ("version", 2, "contract version 2; this reader knows 1"),
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
