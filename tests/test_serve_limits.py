"""What a shard refuses, drops or begins anew, without Ray: limits, silence, numbers that are none."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from shards import Reply, alone, frame, payloads, same, with_shard

import co3d_compile as co3d
from co3d_compile.serve.engine import TENSOR, Engine
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.shard import Shard
from co3d_compile.serve.store import SnapshotStore
from co3d_compile.serve.watch import Watch

pytestmark = pytest.mark.slow


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
