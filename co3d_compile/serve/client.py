"""One stream to a server, from Python: keeps what the server could still lose, and sends it again.

async for message in client.stream("ws://127.0.0.1:8000", "camera-1", jpegs):
    print(message)
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any
from urllib.parse import quote, urlencode

from co3d_compile.errors import Co3dError, UsageError
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.plain_types import JsonObject

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import ConnectionClosed, InvalidHandshake
except ImportError as error:
    raise Co3dError("The client needs the package websockets.", hint=install_command("co3d-compile[serve]")) from error

Message = JsonObject
BACKOFF = (0.1, 2.0)  # seconds between two tries to connect, first and longest


async def stream(
    url: str,
    name: str,
    frames: Iterable[bytes],
    *,
    token: str | None = None,
    keep: int = 256,
    patience: float = 60.0,
    **settings: Any,
) -> AsyncIterator[Message]:
    """Sends frames, and yields what the server says of them, in order, each frame once.

    Frames that no snapshot of the server covers yet are kept and sent again if it lost them. Messages by ``type``:

    - ``answer``: of frame ``frame``. The frames from ``started`` on, in one ``epoch``, are one unbroken stream.
    - ``missing``: the frame counts, but its answer was lost.
    - ``restarted``: the server lost more than was kept; the stream begins afresh with ``frame``, and warms up again.
    - ``ended``: the last one.

    Args:
        url: Of the server, ``http://HOST:PORT`` or ``ws://HOST:PORT``.
        frames: The payload of each, from frame 0; drawn as fast as the server answers.
        keep: Frames that are kept; more than the server's steps between two snapshots.
        patience: Seconds without a server after which to give up.
        settings: Of the stream, as in the query of its URL (docs/serve.md): format, width, height, top, values.

    Raises:
        UsageError: The server refuses a frame, a setting or the token. Co3dError: It is not there.
    """
    sender = _Sender(url, name, iter(frames), token, keep, patience, settings)
    try:
        async for message in sender.run():
            yield message
    finally:
        await sender.close()


class _Lost(Exception):
    """The server has no state that the kept frames lead on from."""


class _Sender:
    def __init__(
        self, url: str, name: str, frames: Iterator[bytes], token: str | None, keep: int, patience: float,
        settings: Message,
    ) -> None:  # fmt: skip
        server = "ws" + url.removeprefix("http") if url.startswith("http") else url
        self._url, self._settings = f"{server.rstrip('/')}/v1/streams/{quote(name, safe='')}", settings
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._frames, self._size, self._patience = frames, keep, patience
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._drawn = 0  # frames taken from the source
        self._next = 0  # the frame that is sent next
        self._due = 0  # the frame whose answer is given next
        self._flying = 0  # frames sent on this connection and not answered
        self._back: int | None = None  # go back to this frame once nothing flies; -1: to the first that is due
        self._epoch: str | None = None
        self._socket: ClientConnection | None = None
        self._window = 1
        self._all_drawn = False
        self._drawing: asyncio.Future[bytes | None] | None = None
        self._receiving: asyncio.Future[str | bytes] | None = None

    async def run(self) -> AsyncIterator[Message]:
        while True:
            try:
                if self._socket is None:
                    for message in await self._connect():
                        yield message
                await self._send()
                if self._all_drawn and self._next == self._drawn and not self._flying:
                    yield await self._end()
                    return
                for message in await self._wait():
                    yield message
            except (ConnectionClosed, OSError):
                await self._disconnect()
            except _Lost as lost:
                await self._disconnect()
                yield self._afresh(str(lost))

    async def close(self) -> None:
        if self._drawing is not None:
            self._drawing.cancel()
        await self._disconnect()

    async def _disconnect(self) -> None:
        socket, self._socket = self._socket, None
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None
        if socket is not None:
            await socket.close()

    async def _connect(self) -> list[Message]:
        """Connects, and finds out where the server stands."""
        begun = time.monotonic()
        wait = BACKOFF[0]
        query = {**self._settings, **({"start": 1} if self._epoch is None else {})}
        while True:
            try:
                self._socket = await connect(
                    f"{self._url}?{urlencode(query)}", additional_headers=self._headers, max_size=None
                )
                hello = json.loads(await self._socket.recv())
                if hello.get("status") != 503:
                    break
                await self._disconnect()
            except InvalidHandshake as error:
                status = getattr(getattr(error, "response", None), "status_code", 0)
                if status in (401, 403):
                    raise UsageError("The server refuses the token.") from error
            except (ConnectionClosed, OSError):
                pass
            if time.monotonic() - begun > self._patience:
                raise Co3dError(f"There is no server at {self._url} for {self._patience:g} seconds.")
            await asyncio.sleep(wait)
            wait = min(2 * wait, BACKOFF[1])
        if hello["type"] == "refused":
            raise UsageError(f"The server refuses the stream: {hello['message']}")
        self._window, self._flying, self._back = hello["window"], 0, None
        if self._epoch is None:  # begins afresh with what is sent next
            return []
        if hello["status"] != 200 or hello["epoch"] != self._epoch:
            raise _Lost(str(hello.get("reason") or hello.get("code") or "restarted"))
        return self._go_back(hello["expected"])

    async def _send(self) -> None:
        """Sends what the window has room for; begins to draw the next frame if there is nothing else to send."""
        assert self._socket is not None
        if self._back is not None:
            return
        while self._flying < self._window and self._next < self._drawn:
            await self._socket.send(self._next.to_bytes(8) + self._kept[self._next])
            self._next += 1
            self._flying += 1
        if self._flying < self._window and self._drawing is None and not self._all_drawn:
            # in a thread: a camera takes its time, and answers come in meanwhile
            self._drawing = asyncio.ensure_future(asyncio.to_thread(next, self._frames, None))

    async def _wait(self) -> list[Message]:
        """Waits until a frame is drawn or something is heard; returns the messages for the caller."""
        assert self._socket is not None
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._socket.recv())
        waiting = [task for task in (self._drawing, self._receiving) if task is not None]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._drawing is not None and self._drawing.done():
            frame, self._drawing = self._drawing.result(), None
            if frame is None:
                self._all_drawn = True
            else:
                self._kept[self._drawn] = frame
                self._drawn += 1
        if not self._receiving.done():
            return []
        received, self._receiving = self._receiving, None
        return await self._heard(json.loads(received.result()))

    async def _heard(self, message: Message) -> list[Message]:
        if message["type"] == "dropped":
            raise _Lost("idle")
        self._flying -= 1
        messages = []
        if message["type"] == "answer":
            self._epoch = message["epoch"]
            if message["frame"] == self._due:
                self._due += 1
                messages.append(message)
            self._forget(-1 if message["saved"] is None else message["saved"])
        else:
            await self._refused(message)
        if self._back is not None and self._flying <= 0:
            messages += self._go_back(self._due if self._back < 0 else self._back)
        return messages

    async def _refused(self, message: Message) -> None:
        status = message["status"]
        if status in (404, 410):
            raise _Lost(str(message.get("reason") or message["code"]))
        if message["code"] == "epoch":
            raise _Lost("restarted")
        if status in (429, 503):
            await asyncio.sleep(message.get("retry_after", 1.0))
        elif status != 409 and status != 500:
            raise UsageError(f"The server refuses frame {message.get('frame')}: {message['message']}")
        if self._back is None or self._back < 0:
            self._back = message.get("expected", -1)

    def _go_back(self, expected: int) -> list[Message]:
        """Sends from this frame on. Answers to frames before it that have not come will not come."""
        self._back = None
        if expected not in self._kept and expected != self._drawn:
            raise _Lost("the server is further back than what is kept")
        self._next = expected
        missing = [{"type": "missing", "frame": number} for number in range(self._due, expected)]
        self._due = max(self._due, expected)
        return missing

    def _forget(self, saved: int) -> None:
        """Forgets answered frames that a snapshot covers, and those that are more than is to be kept."""
        while self._kept and (number := next(iter(self._kept))) < self._due:
            if number > saved and len(self._kept) <= self._size:
                break
            del self._kept[number]

    def _afresh(self, why: str) -> Message:
        """Begins again with the first frame that has no answer."""
        self._epoch, self._next = None, self._due
        return {"type": "restarted", "frame": self._due, "reason": why}

    async def _end(self) -> Message:
        assert self._socket is not None
        await self._socket.send('{"type": "end"}')
        receiving, self._receiving = self._receiving or self._socket.recv(), None
        message: Message = json.loads(await receiving)
        return message
