"""A shard by itself, without Ray: order, batches, limits, snapshots; every stream against a session of its own."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.serve.engine import TENSOR, Engine
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.shard import Shard
from co3d_compile.serve.store import SnapshotStore
from co3d_compile.serve.stream import Frame
from co3d_compile.serve.watch import Watch

pytestmark = pytest.mark.slow

Reply = dict[str, Any]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "one frame per step": ("p3d", {}),
    "several frames per step": ("c3d", {}),
    "exact ends": ("p3d", {"boundary": "exact"}),
    "several outputs": ("two_heads", {}),
    "recurrent, renamed": ("cnn_lstm", {"state_io": "renamed"}),
}


@cache
def compiled_row(row: str) -> Any:
    name, options = ROWS[row]
    entry = SMALL[name]
    return co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **{**entry.options, **options})


def payloads(engine: Engine, count: int, seed: int) -> list[bytes]:
    """Random frames of a stream, as tensors."""
    generator = np.random.default_rng(seed)
    shapes = [(shape, spec.dtype) for shape, spec in zip(engine.pulse.shapes, engine.info.inputs, strict=True)]
    return [
        b"".join(generator.standard_normal(shape).astype(dtype).tobytes() for shape, dtype in shapes)
        for _ in range(count)
    ]


def alone(row: str, engine: Engine, frames: list[bytes]) -> list[list[Any]]:
    """What a plain session gives for the same frames: the outputs of each step."""
    session = co3d.StreamSession(compiled_row(row), threads=1)
    results, arrays = [], [engine.prepare(TENSOR, frame) for frame in frames]
    for start in range(0, len(arrays) - engine.pulse.frames + 1, engine.pulse.frames):
        inputs, valid = engine.pulse.step(arrays[start : start + engine.pulse.frames])
        result = session.step(inputs, valid=valid)
        results.append([r.tolist() for r in (result if isinstance(result, tuple) else (result,))])
    if session.info.boundary == "exact":
        results += [[np.asarray(result).tolist()] for result in session.flush()]
    return results


def same(replies: list[Reply], expected: list[list[Any]]) -> None:
    for reply, outputs in zip(replies, expected, strict=True):
        for one, other in zip(reply["outputs"].values(), outputs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def frame(name: str, number: int, payload: bytes, **more: Any) -> Frame:
    return Frame(stream=name, number=number, **{"kind": TENSOR, "payload": payload, **more})


def with_shard(
    row: str, work: Callable[[Shard, Engine], Awaitable[None]], store: Path | None = None, **options: Any
) -> None:
    """Runs ``work`` with a shard that is closed afterwards."""

    async def main() -> None:
        settings = ServeOptions(**{"max_streams": 8, **options})
        engine = Engine(compiled_row(row), settings)
        shard = Shard(engine, settings, "shard-0", SnapshotStore(store) if store else None)
        shard.start()
        try:
            await asyncio.wait_for(work(shard, engine), 120)  # a guard, no limit
        finally:
            await shard.close()

    asyncio.run(main())


@pytest.mark.parametrize("row", ROWS)
def test_each_stream_gives_what_it_gives_alone(row: str) -> None:
    """Eight streams at random speeds, pipelined, and their ends."""

    async def work(shard: Shard, engine: Engine) -> None:
        least = (engine.info.warmup_steps + 3) * engine.pulse.frames

        async def one(seed: int) -> None:
            chance, films = random.Random(seed), payloads(engine, least + seed, seed)
            waiting = []
            for number, payload in enumerate(films):
                waiting.append(asyncio.ensure_future(shard.frame(frame(f"s{seed}", number, payload))))
                if chance.random() < 0.5 or len(waiting) % 4 == 0:
                    await asyncio.gather(*waiting)
            replies = await asyncio.gather(*waiting)
            assert [reply["frame"] for reply in replies] == list(range(len(films)))
            steps = [reply for reply in replies if reply["status"] == 200]
            assert [reply["step"] for reply in steps] == list(range(len(films) // engine.pulse.frames))
            warmup = engine.info.warmup_steps
            assert [reply["warm"] for reply in steps] == [step >= warmup for step in range(len(steps))]
            assert {reply["status"] for reply in replies if reply not in steps} <= {202}
            late = engine.info.outputs[0].delay
            if engine.pulse.frames == 1 and engine.info.outputs[0].frames_per_entry in (None, 1):
                assert [reply["about"] for reply in steps] == [
                    step - late if step >= late else None for step in range(len(steps))
                ]
            ended = await shard.end(f"s{seed}")
            same(steps + ended["flushed"], alone(row, engine, films))

        await asyncio.gather(*map(one, range(8)))
        read = shard.metrics()
        assert read["streams"] == 0 and not read["refused"]

    with_shard(row, work)


def test_frames_that_wait_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is held up all streams bring a frame: the next run takes as many of them as may go together."""

    async def work(shard: Shard, engine: Engine) -> None:
        first = payloads(engine, 1, 0)[0]
        step, go, inside = engine.session.step, threading.Event(), threading.Event()

        def held(*arguments: Any, **more: Any) -> Any:
            inside.set()
            assert go.wait(60)
            return step(*arguments, **more)

        for number in range(8):
            assert (await shard.frame(frame(f"s{number}", 0, first)))["status"] == 200
        monkeypatch.setattr(engine.session, "step", held)
        before = shard.metrics()["counts"]["runs"]
        flying = [asyncio.ensure_future(shard.frame(frame("s0", 1, first)))]
        while not inside.is_set():
            await asyncio.sleep(0.01)
        flying += [asyncio.ensure_future(shard.frame(frame(f"s{number}", 1, first))) for number in range(1, 8)]
        decoded = lambda: [s.queue[0].arrays for s in shard._streams.values() if s.queue]  # noqa: E731
        while len(decoded()) < 7 or any(arrays is None for arrays in decoded()):
            await asyncio.sleep(0.01)
        go.set()
        assert [reply["status"] for reply in await asyncio.gather(*flying)] == [200] * 8
        assert shard.metrics()["counts"]["runs"] - before == 1 + 2  # one alone, then at most four together
        assert shard.metrics()["batch_fill"]["p99"] > 3

    with_shard("one frame per step", work, max_batch=4)


@pytest.mark.parametrize("row", ["one frame per step", "several frames per step", "recurrent, renamed"])
def test_another_shard_goes_on_from_a_snapshot(row: str, tmp_path: Path) -> None:
    """A shard dies without a word: the next one says which frame it wants, and is exact from there."""
    films: dict[str, list[bytes]] = {}
    answers: dict[str, dict[int, Reply]] = {"a": {}, "b": {}}

    async def first(shard: Shard, engine: Engine) -> None:
        least = (engine.info.warmup_steps + 7) * engine.pulse.frames
        for seed, name in enumerate(answers):
            films[name] = payloads(engine, least, seed)
            for number, payload in enumerate(films[name][: least - engine.pulse.frames]):
                reply = await shard.frame(frame(name, number, payload))
                answers[name][number] = reply
        for name in answers:  # a snapshot is written in the background
            while (await shard.status(name))["saved"] is None:
                await asyncio.sleep(0.02)
        shard.close = lambda: asyncio.sleep(0)  # type: ignore[method-assign]  # dies instead

    async def second(shard: Shard, engine: Engine) -> None:
        for name in films:
            newest = len(films[name]) - 1
            refused = await shard.frame(frame(name, newest + 1, b"any"))
            assert (refused["status"], refused["code"]) == (409, "gap")
            expected = refused["expected"]
            assert 0 < expected <= newest and refused["epoch"] == answers[name][0]["epoch"]
            again = await shard.frame(frame(name, expected - 1, films[name][expected - 1]))
            assert again["repeated"] and again["frame"] == expected - 1
            for number in range(expected, newest + 1):
                reply = await shard.frame(frame(name, number, films[name][number], epoch=refused["epoch"]))
                assert reply["epoch"] == refused["epoch"] and reply["restart"] is None
                answers[name][number] = reply
            steps = [reply for _, reply in sorted(answers[name].items()) if reply["status"] == 200]
            same(steps, alone(row, engine, films[name]))
        assert shard.metrics()["counts"]["restored"] == 2

    with_shard(row, first, tmp_path, snapshot_every=3)
    with_shard(row, second, tmp_path, snapshot_every=3)


def test_a_shard_that_is_stopped_saves_its_streams(tmp_path: Path) -> None:
    async def first(shard: Shard, engine: Engine) -> None:
        for number, payload in enumerate(payloads(engine, 5, 0)):
            await shard.frame(frame("a", number, payload))

    async def second(shard: Shard, engine: Engine) -> None:
        assert (await shard.status("a"))["expected"] == 5
        assert (await shard.end("a"))["last"] == 4
        assert (await shard.status("a"))["status"] == 404

    with_shard("one frame per step", first, tmp_path)
    with_shard("one frame per step", second, tmp_path)
    assert not list(tmp_path.iterdir())


def test_snapshots_that_are_damaged_or_of_another_model_are_none(tmp_path: Path) -> None:
    async def one_frame(shard: Shard, engine: Engine) -> None:
        for name in ("a", "b", "c"):
            await shard.frame(frame(name, 0, payloads(engine, 1, 0)[0]))

    async def other_model(shard: Shard, engine: Engine) -> None:
        assert (await shard.status("c"))["code"] == "unknown"

    async def nothing(shard: Shard, engine: Engine) -> None:
        states = [(await shard.status(name))["status"] for name in ("a", "b", "c")]
        assert sorted(states) == [200, 404, 404]

    with_shard("one frame per step", one_frame, tmp_path)
    with_shard("several outputs", other_model, tmp_path)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-1])
    text = files[1].read_bytes()
    files[1].write_bytes(text.replace(b'"frame": 0', b'"frame": 9'))
    with_shard("one frame per step", nothing, tmp_path)


def test_what_breaks_the_order_is_refused_or_begins_an_epoch() -> None:
    async def work(shard: Shard, engine: Engine) -> None:
        film = payloads(engine, 40, 0)

        async def send(number: int, **more: Any) -> Reply:
            return await shard.frame(frame("a", number, film[number], **more))

        assert (await send(3))["code"] == "unknown"
        first = await send(0)
        assert (first["status"], first["restart"], first["started"], first["warm"]) == (200, None, 0, False)
        assert (await send(0))["repeated"]
        assert (await send(1))["epoch"] == first["epoch"]
        duplicate, gap, epoch = await send(0), await send(5), await send(2, epoch="another")
        assert [r["code"] for r in (duplicate, gap, epoch)] == ["duplicate", "gap", "epoch"]
        assert [r["status"] for r in (duplicate, gap, epoch)] == [409] * 3
        assert {r["expected"] for r in (duplicate, gap, epoch)} == {2}
        after_gap = await send(5, on_gap="restart")
        assert (after_gap["restart"], after_gap["started"], after_gap["step"]) == ("gap", 5, 0)
        assert after_gap["epoch"] != first["epoch"] and not after_gap["warm"]
        asked = await send(0, start=True)
        assert (asked["restart"], asked["started"]) == ("asked", 0)
        replies = [asked] + [await send(number) for number in range(1, 40)]
        same(replies, alone("one frame per step", engine, film))
        await shard.frame(frame("b", 0, film[0], start=True))  # as a client does at its first frame
        counts = shard.metrics()["counts"]
        assert (counts["starts"], counts["restarts"]) == (2, 2)

    with_shard("one frame per step", work)


def test_a_frame_that_is_no_frame_takes_those_behind_it_along() -> None:
    async def work(shard: Shard, engine: Engine) -> None:
        film = payloads(engine, 6, 0)
        sent = [film[0], film[1], b"short", film[3], film[4]]
        replies = await asyncio.gather(*(shard.frame(frame("a", n, p)) for n, p in enumerate(sent)))
        assert [reply["status"] for reply in replies] == [200, 200, 400, 409, 409]
        assert {reply["expected"] for reply in replies[2:]} == {2}
        replies = replies[:2] + [await shard.frame(frame("a", n, film[n])) for n in range(2, 6)]
        same(replies, alone("one frame per step", engine, film))

    with_shard("one frame per step", work)


def test_a_run_that_fails_leaves_the_streams_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(shard: Shard, engine: Engine) -> None:
        film = payloads(engine, 16, 0)
        replies = [await shard.frame(frame("a", n, film[n])) for n in range(10)]
        advance, expected = engine.session.step, 10

        def fails(*_: Any, **__: Any) -> None:
            raise co3d.SessionError("onnxruntime failed: no memory")

        for _ in range(3):
            assert shard.healthy()
            monkeypatch.setattr(engine.session, "step", fails)
            tries = await asyncio.gather(*(shard.frame(frame("a", n, film[n])) for n in range(expected, 16)))
            assert {reply["status"] for reply in tries} <= {202, 500, 409}
            monkeypatch.setattr(engine.session, "step", advance)
            expected = (await shard.status("a"))["expected"]
            assert expected == 10 // engine.pulse.frames * engine.pulse.frames
        assert not shard.healthy()
        replies = replies[:expected] + [await shard.frame(frame("a", n, film[n])) for n in range(expected, 16)]
        same([r for r in replies if r["status"] == 200], alone("several frames per step", engine, film))
        assert shard.healthy()

    with_shard("several frames per step", work)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(shard: Shard, engine: Engine) -> None:
        film = payloads(engine, 20, 0)
        advance, go = engine.session.step, threading.Event()
        monkeypatch.setattr(engine.session, "step", lambda *a, **k: go.wait(30) and advance(*a, **k))
        flood = [asyncio.ensure_future(shard.frame(frame("a", n, film[n]))) for n in range(20)]
        refused = await flood[3]  # while the model is held up: three wait, and no more do
        assert (refused["status"], refused["code"]) == (429, "queue") and refused["retry_after"] > 0
        go.set()
        replies = await asyncio.gather(*flood)
        assert [reply["status"] for reply in replies] == [200] * 3 + [429] + [409] * 16
        large = await shard.frame(frame("a", 3, b"0" * 100_001))
        assert (large["status"], large["code"]) == (413, "size")
        assert (await shard.frame(frame("b", 0, film[0])))["status"] == 200
        full = await shard.frame(frame("c", 0, film[0]))
        assert (full["status"], full["code"]) == (503, "full") and full["retry_after"] > 0
        await shard.end("b")
        assert (await shard.frame(frame("c", 0, film[0])))["status"] == 200
        assert shard.metrics()["refused"]["full"] == 1

    with_shard("one frame per step", work, queue=3, max_bytes=100_000, max_streams=2)


def test_too_many_frames_per_second() -> None:
    async def work(shard: Shard, engine: Engine) -> None:
        film = payloads(engine, 4, 0)
        replies = [await shard.frame(frame("a", n, film[n])) for n in range(3)]
        assert [reply["status"] for reply in replies] == [200, 200, 429]
        assert replies[2]["code"] == "rate" and 0 < replies[2]["retry_after"] <= 1000
        assert replies[2]["expected"] == 2

    with_shard("one frame per step", work, queue=2, max_fps=0.001)


def test_a_silent_stream_is_dropped_and_says_so(tmp_path: Path) -> None:
    async def work(shard: Shard, engine: Engine) -> None:
        film = payloads(engine, 3, 0)
        before = await shard.frame(frame("a", 0, film[0]))
        while shard.metrics()["streams"]:
            await asyncio.sleep(0.02)
        dropped = await shard.frame(frame("a", 1, film[1]))
        assert (dropped["status"], dropped["code"], dropped["reason"]) == (410, "dropped", "idle")
        assert (dropped["last"], dropped["epoch"]) == (0, before["epoch"])
        afresh = await shard.frame(frame("a", 1, film[1], on_gap="restart"))
        assert (afresh["status"], afresh["restart"], afresh["warm"]) == (200, "dropped", False)
        assert not list(tmp_path.iterdir())

    with_shard("one frame per step", work, tmp_path, idle=0.2)


def test_models_and_options_that_cannot_be_served() -> None:
    for bad in ({"max_streams": 0}, {"idle": 0}, {"max_fps": -1.0}, {"queue": 1.5}, {"wait_ms": float("nan")}):
        with pytest.raises(co3d.UsageError, match=next(iter(bad))):
            ServeOptions(**bad)
    file = Path(__file__)
    with pytest.raises(co3d.OutputError):
        SnapshotStore(file / "x")


def test_a_frame_that_is_not_finite_starts_its_stream_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Its answer says so, the next ones are of another epoch and equal a stream that has just begun."""
    spoilt, count = 5, 12

    async def work(shard: Shard, engine: Engine) -> None:
        films = {name: payloads(engine, count, seed) for seed, name in enumerate(("door", "yard"))}
        bad = engine.prepare(TENSOR, films["door"][spoilt])[0].copy()
        bad.flat[0] = np.nan
        films["door"][spoilt] = bad.tobytes()
        replies: dict[str, list[Reply]] = {name: [] for name in films}
        for number in range(count):
            for reply in await shard.frames([frame(name, number, film[number]) for name, film in films.items()]):
                replies[reply["stream"]].append(reply)
        door = replies["door"]
        assert "NaN" in door[spoilt]["not_finite"] and not door[spoilt]["warm"]
        assert [reply["restart"] for reply in door] == [None] * (spoilt + 1) + ["not_finite"] * (count - spoilt - 1)
        assert [reply["started"] for reply in door] == [0] * (spoilt + 1) + [spoilt + 1] * (count - spoilt - 1)
        assert [reply["step"] for reply in door] == [*range(spoilt + 1), *range(count - spoilt - 1)]
        assert len({reply["epoch"] for reply in door}) == 2 and len({reply["epoch"] for reply in replies["yard"]}) == 1
        same(door[spoilt + 1 :], alone("recurrent, renamed", engine, films["door"][spoilt + 1 :]))
        same(replies["yard"], alone("recurrent, renamed", engine, films["yard"]))
        assert shard.metrics()["counts"]["not_finite"] == 1
        assert any("stream door" in record.getMessage() for record in caplog.records)

    with_shard("recurrent, renamed", work)


def test_what_becomes_of_the_shards_is_said_once() -> None:
    door = {"shard": "shard-0", "pid": 7, "streams": ["door", "hall"]}
    watch, silent, back = Watch(), {"shard": "shard-0"}, {**door, "pid": 9, "streams": []}
    looks = [[door], [silent], [door], [silent], [silent], [silent], [back], [back], [silent], [silent], [back]]
    said = [line for shards in looks for line in watch.look(shards)]
    assert said == [
        "shard-0 does not answer (process 7); its streams wait: door, hall",
        "shard-0 died and is back as process 9, before 7; what goes on from snapshots: door, hall",
        "shard-0 does not answer (process 9); it had no streams",
        "shard-0 answers again",
    ]
