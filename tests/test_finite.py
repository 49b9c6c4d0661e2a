"""One frame that is not finite: what it does to a stream, and what a session does about it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import CHAINS, Nodes, build, fir, frames, run
from layouts import session_layout  # noqa: F401  all tests here run in both
from torch import nn

import co3d_compile as co3d
from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec, StateSpec
from co3d_compile.errors import SessionError, UsageError
from co3d_compile.media.predictor import Predictor
from co3d_compile.media.video import VideoFrame
from co3d_compile.runtime.session import StreamSession


def average(unbounded: bool = True) -> bytes:
    """h = h / 2 + x of (N, 2), forever; y = h between -1 and 1: finite where h is infinite."""
    nodes = Nodes()
    nodes("Add", nodes("Mul", "state.h", nodes.constant(0.5)), "x", result="next.h")
    nodes("Clip", "next.h", nodes.constant(-1.0), nodes.constant(1.0), result="y")
    contract = Contract(
        compiler_version="0",
        inputs=(InputSpec("x", ("N", 2), "float32", 1, 1),),
        outputs=(OutputSpec("y", ("N", 2), "float32", 0, True, 1, 1),),
        states=(StateSpec("state.h", "next.h", ("N", 2), "float32", 0.0, 0, unbounded),),
        frames_per_step={"x": 1},
        receptive_field=None,
        warmup_steps=0,
    )
    return build(nodes, contract)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("some", [False, True], ids=["all streams", "some streams"])
def test_reset_starts_the_spoilt_stream_anew_and_no_other(value: float, some: bool) -> None:
    x = frames(12, 3, 2)
    x[4, 1, 0] = value
    session, fresh, plain = (StreamSession(average(), 3, finite=f) for f in ("reset", "ignore", "ignore"))
    streams = [0, 1] if some else None
    for n in range(12):
        frame = x[n, :2] if some else x[n]
        y, before = session.step_one(frame, streams=streams), plain.step_one(frame, streams=streams)
        assert list(session.spoilt) == ([1] if n == 4 else [])
        np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(before, 1, 0))
        if n > 4:  # the others go on, this one is as one that has just begun
            np.testing.assert_array_equal(y[1], fresh.step_one(frame, streams=streams)[1])
    assert "state 'state.h' is not finite" in next(iter(session.spoilt.values()), "state 'state.h' is not finite")
    assert not np.isfinite(plain.get_state()["state.h"][1]).all() or math.isinf(value)


@pytest.mark.parametrize("streams", [None, [0, 2]], ids=["all streams", "some streams"])
@pytest.mark.parametrize("model", ["chains", "average"])
def test_raise_leaves_the_states_of_before(model: str, streams: list[int] | None) -> None:
    """Also where states move through a ring of buffers: all phases of it."""
    source = average() if model == "average" else fir(CHAINS["rings of 2, 3 and 5"], True)
    shape = (2,) if model == "average" else (2, 3)
    session, plain = StreamSession(source, 3, finite="raise"), StreamSession(source, 3)
    for n, frame in enumerate(frames(9, 3, *shape)):
        given = frame if streams is None else frame[streams]
        before = session.get_state()
        bad = given.copy()
        bad[-1, 0] = math.nan
        with pytest.raises(
            SessionError, match=r"stream 2: (output 'y' holds NaN|state .* not finite).*before the step"
        ):
            session.step(bad, streams=streams)
        for name, value in session.get_state().items():
            np.testing.assert_array_equal(value, before[name], err_msg=f"{name} at step {n}")
        np.testing.assert_array_equal(session.step_one(given, streams=streams), plain.step_one(given, streams=streams))


def test_infinite_answers_and_bounded_states_are_no_fault() -> None:
    x = frames(6, 1, 2, 3)
    x[2, 0, 1] = -math.inf
    session, plain = StreamSession(fir(), finite="raise"), StreamSession(fir())
    np.testing.assert_array_equal(run(session, x), run(plain, x))


def test_start_values_that_are_infinite_are_forgiven_until_the_warm_up_is_over() -> None:
    session = StreamSession(fir(((1.0, 0.0),), initial=-math.inf), finite="raise")  # 0 * -inf is NaN for two steps
    y = run(session, frames(6, 1, 2, 3))
    assert np.isnan(y[:2]).all() and np.isfinite(y[2:]).all()
    with pytest.raises(SessionError, match="output 'y' holds NaN"):
        session.step(np.full((1, 2, 3), math.nan, np.float32))
    session.reset()
    assert np.isnan(session.step_one(np.zeros((1, 2, 3), np.float32))).all()


def test_files_that_do_not_say_which_states_never_forget() -> None:
    """NaN in any of them counts, infinity does not: it may be one of a max pool."""
    session = StreamSession(average(unbounded=False), finite="raise")
    session.step(np.array([[math.inf, 0]], np.float32))
    with pytest.raises(SessionError, match=r"not finite.*output 'y' holds NaN"):
        session.step(np.array([[-math.inf, 0]], np.float32))
    with pytest.raises(UsageError, match="finite is 'no', not one of ignore, reset, raise"):
        StreamSession(average(), finite="no")  # type: ignore[arg-type]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv3d(3, 4, (3, 1, 1)), nn.GRU(4, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.conv(x).mean((3, 4)).transpose(1, 2))[0][:, -1]


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("recurrent") / "model.onnx"
    return co3d.compile(Recurrent().eval(), (torch.zeros(1, 3, 6, 8, 8),)).save(path)


def test_the_compiler_says_which_states_never_forget(recurrent: Path) -> None:
    states = [state for state in StreamSession(recurrent).info.states if state.dtype == "float32"]
    assert [state.unbounded for state in states] == ["gru" in state.input for state in states]
    assert {state.unbounded for state in states} == {True, False}


def test_a_compiled_recurrent_network_recovers(recurrent: Path) -> None:
    x = frames(20, 1, 3, 8, 8)
    x[7, 0, 1, 2, 3] = math.nan
    session, plain, fresh = StreamSession(recurrent, finite="reset"), StreamSession(recurrent), StreamSession(recurrent)
    y, poisoned = run(session, x), run(plain, x)
    assert np.isnan(poisoned[7:]).all()  # for good
    np.testing.assert_array_equal(y[:7], poisoned[:7])
    np.testing.assert_array_equal(y[8:], run(fresh, x[8:]))


def test_a_predictor_counts_the_warm_up_again(recurrent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from co3d_compile.media import preprocess

    def spoilt(self: preprocess.Preprocess, image: np.ndarray) -> np.ndarray:
        return np.full((1, 3, 8, 8), math.nan if image.max() == 255 else 0.5, np.float32)

    monkeypatch.setattr(preprocess.Preprocess, "__call__", spoilt)
    with Predictor(recurrent, finite="reset") as predictor:
        marked = {}
        for n in range(20):
            image = np.full((8, 8, 3), 255 if n == 9 else 0, np.uint8)
            for prediction in predictor.push(VideoFrame(image, n / 10, n)):
                marked[prediction.newest_frame] = prediction.warmup
        warmup = predictor.info.warmup_steps
        expected = {n for n in marked if n < warmup or 9 <= n < 10 + warmup}
        assert {n for n, early in marked.items() if early} == expected
        assert predictor.resets == 1 and 19 in marked and not marked[19]
