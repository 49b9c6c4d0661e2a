"""Some streams of a session advance in one call, and a stream moves from one session to another."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from layouts import session_layout  # noqa: F401  all tests here run in both
from zoo.small import SMALL

import co3d_compile as co3d

pytestmark = pytest.mark.slow

# One for every kind of state.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "past entries": ("p3d", {}),
    "renamed": ("p3d", {"state_io": "renamed"}),
    "flags and counters": ("p3d", {"boundary": "exact"}),
    "renamed, flags": ("resnext3d", {"boundary": "exact", "state_io": "renamed"}),
    "recurrent": ("cnn_lstm", {}),
    "several rates": ("audio_visual", {}),
    "several outputs": ("two_heads", {}),
    "blocked layout": ("p3d", {"native": True}),
}
BATCH, STEPS = 5, 12
ALL = list(range(BATCH))


@cache
def compiled_row(row: str) -> Any:
    name, options = ROWS[row]
    entry, options = SMALL[name], dict(options)
    native = options.pop("native", False)
    options = {**entry.options, **options}
    compiled = co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **options)
    return compiled.to_native() if native else compiled


def frames_of(info: co3d.Contract, count: int, seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((count, *spec.shape[1:])).astype(spec.dtype) for spec in info.inputs]


def tuple_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("row", ROWS)
def test_each_stream_gives_what_it_gives_alone(row: str) -> None:
    """Random choices of streams in random order, steps of all between them, and one reset."""
    compiled = compiled_row(row)
    alone = [co3d.StreamSession(compiled, threads=1) for _ in range(BATCH)]
    chance = np.random.default_rng(0)
    with co3d.StreamSession(compiled, batch=BATCH, threads=1) as session:
        for step in range(STEPS):
            chosen = chance.permutation(BATCH)[: 1 + step % BATCH].tolist() if step % 4 else ALL
            frames = frames_of(session.info, len(chosen), step)
            valid = None
            if session.info.valid:
                valid = chance.random((len(chosen), session.info.inputs[0].frames_per_step or 1)) < 0.9
            results = tuple_of(session.step(frames, valid=valid, streams=chosen if step % 4 else None))
            for place, stream in enumerate(chosen):
                flags = None if valid is None else valid[place : place + 1]
                own = tuple_of(alone[stream].step([frame[place : place + 1] for frame in frames], valid=flags))
                for one, other in zip(results, own, strict=True):
                    np.testing.assert_allclose(one[place], other[0], rtol=1e-4, atol=1e-4)
            if step == STEPS // 2:
                session.reset(stream=2)
                alone[2].reset()


@pytest.mark.parametrize("row", ROWS)
def test_a_stream_moves_to_another_session(row: str) -> None:
    compiled = compiled_row(row)
    session = co3d.StreamSession(compiled, batch=3, threads=1)
    for step in range(4):
        session.step(frames_of(session.info, 3, step))
    alone = co3d.StreamSession(compiled, threads=1)
    alone.restore(session.snapshot(stream=1))
    assert alone.snapshot() == session.snapshot(stream=1)
    before = session.snapshot(stream=0), session.snapshot(stream=1)
    session.restore(alone.snapshot(), stream=2)
    assert (session.snapshot(stream=0), session.snapshot(stream=1)) == before
    frames = frames_of(session.info, 3, 9)
    expected = tuple_of(alone.step([frame[2:] for frame in frames]))
    for one, other in zip(tuple_of(session.step(frames)), expected, strict=True):
        np.testing.assert_allclose(one[2], other[0], rtol=1e-4, atol=1e-4)


def test_a_failed_step_changes_nothing() -> None:
    session = co3d.StreamSession(compiled_row("past entries"), batch=3, threads=1)
    session.step(frames_of(session.info, 3, 0))
    before = session.snapshot()
    for streams, count in (([0, 0], 2), ([3], 1), ([], 0), ([-1], 1), ([0, 2], 3)):
        with pytest.raises((co3d.UsageError, co3d.SessionError)):
            session.step(frames_of(session.info, count, 1), streams=streams)
    for action in (lambda: session.snapshot(stream=3), lambda: session.restore(before, stream=1)):
        with pytest.raises((co3d.UsageError, co3d.SessionError)):
            action()
    assert session.snapshot() == before
