"""The gateway by itself: HTTP and WebSocket as ASGI messages, with shards that answer when the test lets them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("starlette", reason="Starlette is not installed")
from co3d_compile.errors import Co3dError
from co3d_compile.serve import client
from co3d_compile.serve.gateway import SPILL, Gateway
from co3d_compile.serve.options import ServeOptions

Reply = dict[str, Any]


class Held:
    """Shards that answer no frame before ``go``; ``ended``: what they say at the end of a stream."""

    def __init__(self, ended: Reply | None = None) -> None:
        self.go, self.taken, self.ended = asyncio.Event(), 0, ended or {"status": 200, "code": "idle"}

    async def call(self, stream: str, method: str, *arguments: Any) -> Reply:
        if method == "frame":
            self.taken += 1
            await self.go.wait()
            return {"status": 200, "outputs": {}}
        return self.ended if method == "end" else {"status": 404, "code": "unknown"}

    async def all(self, method: str) -> list[Reply]:
        return [{"shard": "shard-0", "healthy": self.go.is_set()}]


class Socket:
    """The other side of a WebSocket."""

    def __init__(self, shards: Held, **options: Any) -> None:
        self.to_server: asyncio.Queue[Reply] = asyncio.Queue()
        self.from_server: asyncio.Queue[Reply] = asyncio.Queue()
        scope = {"type": "websocket", "path": "/v1/streams/a", "query_string": b"format=tensor", "headers": []}
        app = Gateway(shards, ServeOptions(**options)).app()
        self.to_server.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.ensure_future(app(scope, self.to_server.get, self.from_server.put))

    def send(self, number: int) -> None:
        self.to_server.put_nowait({"type": "websocket.receive", "bytes": number.to_bytes(8) + b"frame"})

    async def hear(self) -> Reply:
        """The next message, as JSON; the code of a close."""
        message = await self.from_server.get()
        if message["type"] == "websocket.send":
            data: Reply = json.loads(message["text"])
            return data
        return {"type": message["type"].removeprefix("websocket."), "code": message.get("code")}


def test_the_client_takes_the_address_that_the_server_prints() -> None:
    async def first() -> None:
        async for _ in client.stream("http://127.0.0.1:9/", "a", [], patience=0):
            raise AssertionError

    with pytest.raises(Co3dError, match=r"no server at ws://127\.0\.0\.1:9/v1/streams/a"):
        asyncio.run(first())


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 60)  # a guard

    asyncio.run(main())


def test_more_frames_than_the_window() -> None:
    """While the shard is busy: as many as may wait are taken, and the next one ends the conversation."""

    async def work() -> None:
        shards = Held()
        socket = Socket(shards, queue=4)
        assert (await socket.hear())["type"] == "accept"
        hello = await socket.hear()
        assert (hello["type"], hello["window"], hello["code"]) == ("hello", 4, "unknown")
        for number in range(5):
            socket.send(number)
        refused = await socket.hear()
        assert (refused["type"], refused["code"], refused["status"]) == ("refused", "window", 429)
        assert await socket.hear() == {"type": "close", "code": 4429} and shards.taken <= 4
        await socket.task

    run(work)


def test_as_many_frames_as_the_window_are_answered_in_order() -> None:
    async def work() -> None:
        shards = Held()
        socket = Socket(shards, queue=4)
        await socket.hear()
        await socket.hear()
        for number in range(4):
            socket.send(number)
        shards.go.set()
        assert [(await socket.hear())["frame"] for _ in range(4)] == [0, 1, 2, 3]
        socket.to_server.put_nowait({"type": "websocket.receive", "text": '{"type": "end"}'})
        assert (await socket.hear())["type"] == "ended"
        assert await socket.hear() == {"type": "close", "code": 1000}

    run(work)


@pytest.mark.parametrize("first", ["gateway", "shard"])
def test_a_silent_stream_is_told_the_same_whoever_drops_it(first: str) -> None:
    """Gateway and shard count on their own; that the shard was faster makes no difference to the client."""

    async def work() -> None:
        dropped = {"status": 410, "code": "dropped", "reason": "idle", "last": 7, "epoch": "e"}
        socket = Socket(Held(None if first == "gateway" else dropped), idle=0.01)
        await socket.hear()
        await socket.hear()
        last = await socket.hear()
        assert (last["type"], last["code"]) == ("dropped", "idle")
        assert await socket.hear() == {"type": "close", "code": 4408}

    run(work)


@pytest.mark.parametrize(("length", "declared"), [(101, True), (SPILL * 100, False), (SPILL * 100 + 1, False)])
def test_a_frame_that_is_too_large_is_told_so(length: int, declared: bool) -> None:
    """Once it is read, so that a client that is still sending hears the answer; one far too large is cut off."""

    async def work() -> None:
        left = [b"0" * 10] * (length // 10) + [b"0" * (length % 10)] * bool(length % 10)
        heard: list[Reply] = []

        async def receive() -> Reply:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message: Reply) -> None:
            heard.append(message)

        headers = [(b"content-type", b"application/octet-stream")]
        headers += [(b"content-length", str(length).encode())] if declared else []
        path = "/v1/streams/a/frames/0"
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        shards = Held()
        await Gateway(shards, ServeOptions(max_bytes=100)).app()(scope, receive, send)
        assert heard[0]["status"] == 413 and json.loads(heard[1]["body"])["code"] == "size"
        assert not left and shards.taken == 0

    run(work)


def test_one_shard_that_is_ill_makes_the_server_ill() -> None:
    async def work() -> None:
        shards, found = Held(), []
        for _ in range(2):
            heard: list[Reply] = []

            async def send(message: Reply, heard: list[Reply] = heard) -> None:
                heard.append(message)

            scope = {"type": "http", "method": "GET", "path": "/v1/health", "query_string": b"", "headers": []}
            await Gateway(shards, ServeOptions(token="digest")).app()(scope, asyncio.Queue[Reply]().get, send)
            found.append(heard[0]["status"])
            shards.go.set()
        assert found == [503, 200]

    run(work)


def get(path: str, shards: Held, given: str | None = None, **options: Any) -> tuple[int, str]:
    """The status and the text of a GET."""
    sent: list[Reply] = []

    async def work() -> None:
        headers = [] if given is None else [(b"authorization", f"Bearer {given}".encode())]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}

        async def receive() -> Reply:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Reply) -> None:
            sent.append(message)

        await Gateway(shards, ServeOptions(**options)).app()(scope, receive, send)

    run(work)
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent).decode()


class Counted(Held):
    """One shard that has counted, and one that does not answer."""

    async def all(self, method: str) -> list[Reply]:
        counted = {
            "streams": 3,
            "max_streams": 64,
            "waiting": 1,
            "counts": {"frames": 12345678},
            "refused": {"full": 2},
        }
        latency = {"latency_ms": {"p50": 1.5, "p99": None}, "batch_fill": {"p50": 2.0, "mean": 1.9}}
        up = {"shard": "shard-0", "healthy": True, **counted, **latency}
        return [up, {"shard": 'shard-"1"', "healthy": False}]


def test_metrics_for_prometheus() -> None:
    status, text = get("/metrics", Counted())
    assert status == 200
    for line in (
        'co3d_up{shard="shard-0"} 1',
        'co3d_up{shard="shard-\\"1\\""} 0',
        'co3d_streams{shard="shard-0"} 3',
        'co3d_events_total{shard="shard-0",what="frames"} 12345678',
        'co3d_refused_total{shard="shard-0",code="full"} 2',
        'co3d_latency_ms{shard="shard-0",quantile="0.50"} 1.5',
    ):
        assert line in text.splitlines(), text
    assert "mean" not in text and "None" not in text


def test_metrics_want_the_token_unless_told_otherwise() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    assert get("/metrics", Counted(), token=digest)[0] == 401
    assert get("/metrics", Counted(), "wrong", token=digest)[0] == 401
    assert get("/metrics", Counted(), "secret", token=digest)[0] == 200
    assert get("/metrics", Counted(), token=digest, open_metrics=True)[0] == 200
