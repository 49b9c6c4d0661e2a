"""The running side: sessions over small hand-made ONNX models, against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hand_made import (
    CHAINS,
    GOOD,
    exact,
    fir,
    fir_oracle,
    frames,
    pair,
    run,
)
from layouts import session_layout  # noqa: F401  all tests here run in both

from co3d_compile.errors import SessionError
from co3d_compile.runtime.buffers import Buffer
from co3d_compile.runtime.session import StreamSession

# --- stepping ---------------------------------------------------------------------------------------------------


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


def test_inputs_and_outputs_by_name() -> None:
    by_order, by_name = StreamSession(pair(), batch=2), StreamSession(pair(), batch=2)
    fast, slow, gain = frames(5, 2, 4, 2), frames(5, 2, 2, seed=1), frames(5, 2, 1, seed=2)
    inputs, outputs = ([spec.name for spec in specs] for specs in (by_name.info.inputs, by_name.info.outputs))
    for arrays in zip(fast, slow, gain, strict=True):
        given = dict(zip(inputs, arrays, strict=True))
        results = by_name.run(dict(reversed(given.items())))
        assert list(results) == outputs
        for result, expected in zip(results.values(), by_order.step(*arrays), strict=True):
            np.testing.assert_array_equal(result, expected)
    with pytest.raises(SessionError, match=f"no_input.*takes {', '.join(inputs)}"):
        by_name.run({**given, "no_input": fast[0]})
    with pytest.raises(SessionError, match=r"this model has 3 and 2.*run"):
        by_name.step_one(fast[0])


def test_one_array_in_and_one_array_out() -> None:
    steps, ones, named = (StreamSession(fir(), batch=3) for _ in range(3))
    for frame in frames(5, 3, 2, 3):
        expected = steps.step(frame)
        np.testing.assert_array_equal(ones.step_one(frame), expected)
        (result,) = named.run({"x": frame}).values()
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(
        ones.step_one(frame[:2], streams=[0, 2]),
        named.run({"x": frame[:2]}, streams=[0, 2])[named.info.outputs[0].name],
    )
    with pytest.raises(SessionError, match="valid"):
        ones.step_one(frame, valid=np.ones(3, bool))


def test_start_values_that_are_not_finite() -> None:
    x = frames(6, 1, 2, 3)
    y = run(StreamSession(fir(((1.0, 1.0),), initial=-math.inf, reduce="Max")), x)
    np.testing.assert_array_equal(y, [x[max(n - 2, 0) : n + 1].max(axis=0) for n in range(6)])
    session = StreamSession(fir(renamed=True, initial=math.nan))
    y = run(session, x)
    assert np.isnan(y[: session.info.warmup_steps]).all()
    np.testing.assert_allclose(y[2:], fir_oracle(x)[2:], rtol=1e-5)


class Picture(np.ndarray):
    """An array of another kind."""


LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "as the ONNX input": lambda x: x,
    "a time dim of 1": lambda x: x[:, :, None],
    "in a tuple": lambda x: (x,),
    "in a list, with time": lambda x: [x[:, :, None]],
    "transposed memory": lambda x: np.asfortranarray(x),
    "every second element": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "backwards in memory": lambda x: x[::-1].copy()[::-1],
    "read only": lambda x: np.broadcast_to(x, x.shape),
    "not aligned": lambda x: np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    "a subclass": lambda x: x.view(Picture),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_are_accepted(layout: Callable[[np.ndarray], Any]) -> None:
    x = frames(4, 2, 2, 3)
    session = StreamSession(fir(), batch=2)
    y = np.stack([np.asarray(session.step(layout(frame))) for frame in x])
    assert y.shape == x.shape
    np.testing.assert_allclose(y, fir_oracle(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("taps", "gap", "arrays"),
    [(2, 1, 1), (2, 2, 1), (2, 1, 3), (40, 1, 1), (40, 2, 1), (40, 1, 3)],
    ids=["one array", "with gaps", "three arrays", "long period", "long period, gaps", "long period, three arrays"],
)
def test_frames_may_change_after_a_step(taps: int, gap: int, arrays: int) -> None:
    """Arrays in which the next frame is written, two frames each before the next array, and results that are kept."""
    chains = ((0.5,) * taps,)
    x, places = frames(160, 1, 2, 3), [np.empty((1, 2, 3 * gap), np.float32)[:, :, ::gap] for _ in range(arrays)]
    session, results = StreamSession(fir(chains, renamed=True)), []
    for i, each in enumerate(x):
        frame = places[i // 2 % arrays]
        frame[...] = each
        results.append(session.step(frame))
        frame[...] = np.nan
        if len(results) == 7:  # what failed leaves nothing bound
            with pytest.raises(SessionError):
                session.step(frame.astype("float64"))
    np.testing.assert_allclose(np.stack(results), fir_oracle(x, chains), rtol=1e-4, atol=1e-4)


def test_a_list_of_frames_is_the_callers_own() -> None:
    chains = ((0.5,) * 40,)  # so long a period that frames are copied
    x, session, results = frames(3, 1, 2, 3), StreamSession(fir(chains, renamed=True)), []
    for each in x:
        inputs = [each]
        results.append(session.step(inputs))
        inputs.clear()
    np.testing.assert_allclose(np.stack(results), fir_oracle(x, chains), rtol=1e-5)


def test_flags_are_no_frames() -> None:
    with pytest.raises(SessionError, match="Got 2 inputs, expected 1"):
        StreamSession(exact()).step(np.zeros((1, 2, 3), np.float32), np.ones((1, 2), bool))


@pytest.mark.parametrize("batch", [1, 5000], ids=["small", "large"])
def test_results_are_the_callers_own(batch: int) -> None:
    session, x = StreamSession(fir(), batch), frames(40, batch, 2, 3)
    results = []
    for each in x:
        result = np.asarray(session.step(each))
        results.append(result.copy())
        result[:] = np.nan  # into no other result, and into no state
    np.testing.assert_allclose(np.stack(results), fir_oracle(x), rtol=1e-5, atol=1e-5)
    kept = [session.step(each) for each in x]
    copies = np.stack(kept)
    run(session, x)
    session.close()
    np.testing.assert_array_equal(np.stack(kept), copies)


def test_states_that_are_read_are_copies() -> None:
    session, x = StreamSession(fir()), frames(2, 1, 2, 3)
    session.step(x[0])
    session.get_state()["state.conv.0.0"][:] = np.nan
    assert np.isfinite(np.asarray(session.step(x[1]))).all()


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
