"""A shard by itself, without Ray: order, batches, limits, snapshots; every stream against a session of its own."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from shards import ROWS, Reply, alone, frame, payloads, same, with_shard

import co3d_compile as co3d
from co3d_compile.serve.engine import Engine
from co3d_compile.serve.shard import Shard

pytestmark = pytest.mark.slow


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
