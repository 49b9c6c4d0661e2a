"""HTTP and WebSocket in front of the shards (docs/serve.md): an ASGI application that knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from co3d_compile.serve.engine import RGB, TENSOR
from co3d_compile.serve.options import MAX_NAME, ServeOptions
from co3d_compile.serve.prometheus import prometheus_text
from co3d_compile.serve.stream import Frame, Refused, Reply

KINDS = {"jpeg": "image/jpeg", "png": "image/png", "rgb": RGB, "tensor": TENSOR}
Work: TypeAlias = Callable[[Request], Awaitable[Reply]]
HEADER = 8  # bytes before each frame on a WebSocket: its number, big-endian
MAX_TOP = 100
WANTS_TOKEN = "This server wants a token: Authorization: Bearer …."
SPILL = 4  # times the limit that is still read of a frame too large: who is cut off while sending hears no answer
# Close codes of a WebSocket, from the range for applications: 4000 and the HTTP status.
DROPPED, WINDOW = 4408, 4429


class Shards(Protocol):
    """What a gateway needs of the shards. Raises Refused where one does not answer."""

    async def call(self, stream: str, method: str, *arguments: Any) -> Reply:
        """Calls a method of the ``Shard`` that holds the stream."""
        ...

    async def all(self, method: str) -> list[Reply]:
        """Calls a method of every shard. One that does not answer gives its name, and ``healthy`` false."""
        ...


class Gateway:
    """The routes. All settings of a stream are in the query of its URL."""

    def __init__(self, shards: Shards, options: ServeOptions) -> None:
        self._shards, self._options = shards, options

    def app(self) -> Starlette:
        """Builds the ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/health", self._health),
                Route("/v1/metrics", self._guarded(self._metrics)),
                Route("/metrics", self._prometheus),
                Route("/v1/model", self._guarded(self._model)),
                Route("/v1/streams/{name}", self._guarded(self._of_stream("status")), methods=["GET"]),
                Route("/v1/streams/{name}", self._guarded(self._of_stream("end")), methods=["DELETE"]),
                Route("/v1/streams/{name}/frames/{number:int}", self._guarded(self._frame), methods=["POST"]),
                WebSocketRoute("/v1/streams/{name}", self._socket),
            ]
        )

    def _guarded(self, work: Work) -> Callable[[Request], Awaitable[Response]]:
        """Wraps a route for those who have the token; what is refused becomes a response."""

        async def route(request: Request) -> Response:
            try:
                if not self._allowed(request):
                    raise Refused(401, "token", WANTS_TOKEN)
                return _response(await work(request))
            except Refused as refused:
                return _response(refused.reply)

        return route

    async def _health(self, request: Request) -> Response:
        shards = await self._shards.all("metrics")
        found = {each["shard"]: bool(each["healthy"]) for each in shards}
        return _response({"status": 200 if all(found.values()) else 503, "shards": found})

    async def _metrics(self, request: Request) -> Reply:
        shards = await self._shards.all("metrics")
        total = {key: sum(shard.get(key, 0) for shard in shards) for key in ("streams", "max_streams", "waiting")}
        return {"status": 200, **total, "shards": shards}

    async def _prometheus(self, request: Request) -> Response:
        """Writes the metrics as Prometheus reads them."""
        if not (self._options.open_metrics or self._allowed(request)):
            return _response(Refused(401, "token", WANTS_TOKEN).reply)
        text = prometheus_text(await self._shards.all("metrics"))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _model(self, request: Request) -> Reply:
        return await self._shards.call("", "model")

    def _of_stream(self, method: str) -> Work:
        """Makes the work of a route that is one method of a stream's shard."""

        async def work(request: Request) -> Reply:
            name = _name(request)
            return await self._shards.call(name, method, name)

        return work

    async def _frame(self, request: Request) -> Reply:
        name, number = _name(request), int(request.path_params["number"])
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        settings = _settings(request.query_params)
        declared = request.headers.get("content-length", "0")
        payload = bytearray()
        if declared.isdigit() and int(declared) <= SPILL * self._options.max_bytes:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size <= self._options.max_bytes:
                    payload += chunk
                elif size > SPILL * self._options.max_bytes:
                    break
            if size <= self._options.max_bytes:
                frame = Frame(stream=name, number=number, payload=bytes(payload), **{**settings, "kind": kind})
                return await self._shards.call(name, "frame", frame)
        raise Refused(413, "size", f"A frame has at most {self._options.max_bytes} bytes.", stream=name, frame=number)

    async def _socket(self, socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", [])
        if not self._allowed(socket, offered):
            await socket.close(4401)
            return
        try:
            name, settings = _name(socket), _settings(socket.query_params)
        except Refused as refused:
            await socket.accept()
            await _close(socket, {"type": "refused", **refused.reply}, 4400)
            return
        await socket.accept("co3d" if "co3d" in offered else None)
        await _Conversation(socket, self._shards, self._options, name, settings).hold()

    def _allowed(self, request: HTTPConnection, offered: list[str] | None = None) -> bool:
        """Says whether the token is right.

        Browsers cannot set headers of a WebSocket: there it may be a subprotocol.
        """
        if self._options.token is None:
            return True
        given = [request.headers.get("authorization", "").removeprefix("Bearer ")]
        given += [each.removeprefix("token.") for each in offered or [] if each.startswith("token.")]
        digests = [hashlib.sha256(each.encode()).hexdigest() for each in given]
        return any(hmac.compare_digest(digest, self._options.token) for digest in digests)


class _Conversation:
    """One WebSocket: frames of one stream come in, answers go out, at most a window of frames between them."""

    def __init__(self, socket: WebSocket, shards: Shards, options: ServeOptions, name: str, settings: Reply) -> None:
        self._socket, self._shards, self._options = socket, shards, options
        self._name, self._settings = name, settings
        self._start = settings["start"]
        self._open: set[asyncio.Task[None]] = set()
        self._newest: asyncio.Task[None] | None = None

    async def hold(self) -> None:
        """Holds the connection until either side ends it."""
        try:
            await self._send({"type": "hello", "window": self._options.queue, **await self._call("status", self._name)})
            while True:
                try:
                    message = await asyncio.wait_for(self._socket.receive(), self._options.idle)
                except TimeoutError:
                    ended = await self._call("end", self._name, "idle")
                    code = ended.get("reason", ended["code"])  # the shard, which counts too, may have been faster
                    await _close(self._socket, {"type": "dropped", **ended, "code": code}, DROPPED)
                    return
                if message["type"] == "websocket.disconnect" or not await self._take(message):
                    return
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: the other side closed while this one sent
            return
        finally:
            for task in self._open:
                task.cancel()

    async def _take(self, message: Mapping[str, Any]) -> bool:
        """Handles one message; False ends the conversation."""
        data = message.get("bytes")
        if data is None:
            if _json(message.get("text")) != {"type": "end"}:
                return await self._refuse("message", 'Send frames as binary messages, or {"type": "end"}.', 4400)
            if self._open:
                await asyncio.wait(self._open)
            await _close(self._socket, {"type": "ended", **await self._call("end", self._name)}, 1000)
            return False
        if len(data) < HEADER:
            return await self._refuse("message", f"A frame begins with its number, in {HEADER} bytes.", 4400)
        if len(data) - HEADER > self._options.max_bytes:
            return await self._refuse("size", f"A frame has at most {self._options.max_bytes} bytes.", 4413)
        if len(self._open) >= self._options.queue:
            return await self._refuse("window", f"{self._options.queue} frames wait for their answers.", WINDOW)
        settings = {**self._settings, "start": self._start}
        self._start = False  # only the first frame begins afresh
        frame = Frame(stream=self._name, number=int.from_bytes(data[:HEADER]), payload=bytes(data[HEADER:]), **settings)
        task = self._newest = asyncio.ensure_future(self._answer(frame, self._newest))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        return True

    async def _answer(self, frame: Frame, before: asyncio.Task[None] | None) -> None:
        """Answers go out in the order of the frames, whatever the order in which they come."""
        reply = await self._call("frame", frame)
        if before is not None:
            await asyncio.wait([before])
        kind = "answer" if reply["status"] < 300 else "refused"
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._send({"type": kind, "stream": self._name, "frame": frame.number, **reply})

    async def _call(self, method: str, *arguments: Any) -> Reply:
        try:
            return await self._shards.call(self._name, method, *arguments)
        except Refused as refused:
            return refused.reply

    async def _refuse(self, code: str, message: str, close: int) -> bool:
        await _close(self._socket, {"type": "refused", "status": close - 4000, "code": code, "message": message}, close)
        return False

    async def _send(self, data: Reply) -> None:
        await self._socket.send_text(json.dumps(data))


async def _close(socket: WebSocket, last: Reply, code: int) -> None:
    """Says why, then closes."""
    await socket.send_text(json.dumps(last))
    await socket.close(code)


def _response(reply: Reply) -> Response:
    headers = {}
    if "retry_after" in reply:
        headers["Retry-After"] = str(max(1, math.ceil(reply["retry_after"])))
    if reply["status"] == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(reply), reply["status"], headers, "application/json")


def _json(text: str | None) -> object:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _name(request: HTTPConnection) -> str:
    name = str(request.path_params["name"])
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise Refused(400, "name", f"A stream's name has 1 to {MAX_NAME} printable characters.")
    return name


def _settings(query: Mapping[str, str]) -> Reply:
    """Reads the settings of a frame, or of all frames of a WebSocket, from a query. Raises Refused."""
    known = ("format", "width", "height", "start", "on_gap", "epoch", "top", "values")
    odd = sorted(set(query) - set(known))
    if odd:
        raise Refused(400, "query", f"There is no {odd[0][:100]!r}: {', '.join(known)}.")
    on_gap, kind = query.get("on_gap", "refuse"), query.get("format", "jpeg")
    if on_gap not in ("refuse", "restart") or kind not in KINDS:
        raise Refused(400, "query", f"on_gap is refuse or restart, format one of {', '.join(KINDS)}.")
    size = (_number(query, "height", 0, 65_535), _number(query, "width", 0, 65_535))
    return {
        "kind": KINDS[kind],
        "size": size if min(size) else None,
        "start": bool(_number(query, "start", 0, 1)),
        "on_gap": on_gap,
        "epoch": query.get("epoch"),
        "top": _number(query, "top", 0, MAX_TOP),
        "values": bool(_number(query, "values", 1, 1)),
    }


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most):
        raise Refused(400, "query", f"{name} is a whole number from 0 to {most}.")
    return int(text)
