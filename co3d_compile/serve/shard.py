"""Holds the states of its streams: takes frames in order, runs those of different streams together, keeps snapshots.

One event loop; the model runs in a thread of its own, pictures are decoded in others, files written in a fourth. A
stream is never silently wrong: what is in its slot is labelled with epoch and frame (``Stream``), a frame is taken only
if it is the one that follows, and whatever breaks the order is refused with the number that is ``expected`` next.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from co3d_compile.errors import OutputError, SessionError
from co3d_compile.serve.engine import BadFrame, Engine
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.runner import Runner, in_thread
from co3d_compile.serve.stats import Stats
from co3d_compile.serve.store import SnapshotStore
from co3d_compile.serve.stream import Frame, Refused, Reply, Stream, Ticket

T = TypeVar("T")
MAX_GONE = 10_000  # dropped streams that are remembered, to say why they are not there
DECODERS = 2
EARLY = 0.25  # seconds that a frame waits for one before it, which it overtook on the way


class Shard:
    """The streams of one replica. Make it and call everything within one event loop; ``start`` first.

    Args:
        name: What answers say that they come from.
        store: Where snapshots go; None: nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServeOptions,
        name: str = "shard",
        store: SnapshotStore | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.name, self.stats = name, stats or Stats()
        self._engine, self._options, self._store = engine, options, store
        self._streams: dict[str, Stream] = {}
        self._gone: OrderedDict[str, Reply] = OrderedDict()
        self._early: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._free = list(range(options.max_streams))
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._files = ThreadPoolExecutor(1, "files")  # one thread: a snapshot is removed after it was written
        self._runner = Runner(engine, options, self.name, self._streams, self.stats, self._save if store else None)
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Begins to work, in the running event loop."""
        self._spawn(self._runner.work())
        self._spawn(self._drop_idle())

    def healthy(self) -> bool:
        """Says whether the model runs. False: a new process is needed."""
        return self._runner.healthy

    async def frame(self, frame: Frame) -> Reply:
        """Takes one frame. Returns the answer, or why there is none, as JSON data with a ``status`` as in HTTP.

        A caller that goes away leaves a whole frame behind: what was taken is worked on and answered to nobody.
        """
        return await asyncio.shield(self._spawn(self._frame(frame)))

    async def frames(self, frames: Sequence[Frame]) -> list[Reply]:
        """Answers several at once, when the last one is done."""
        return list(await asyncio.gather(*map(self.frame, frames)))

    async def status(self, name: str) -> Reply:
        """Says where a stream stands: its epoch, the number expected next, what a snapshot covers."""
        try:
            async with self._lock(name):
                stream = await self._known(name)
                warm = self._engine.warm(stream.steps)
                more = {"expected": stream.next, "steps": stream.steps, "warm": warm, "saved": stream.saved}
                return {"status": 200, "stream": name, "shard": self.name, **stream.about(), **more}
        except Refused as refused:
            return refused.reply

    async def end(self, name: str, why: str = "ended") -> Reply:
        """Forgets a stream once what was taken is answered. ``flushed``: what a model with exact ends still gives."""
        try:
            async with self._lock(name):
                stream = await self._known(name)
                await _drained(stream)
                try:
                    flushed = await self._runner.flush(stream) if why == "ended" else []
                except SessionError as error:  # too short a stream for exact ends
                    raise Refused(422, "no_end", str(error), last=stream.next - 1) from error
                finally:
                    await self._drop(stream, why)
        except Refused as refused:
            return refused.reply
        return {"status": 200, "stream": name, "code": why, "last": stream.next - 1, "flushed": flushed}

    def names(self) -> list[str]:
        """Lists the streams that are there."""
        return list(self._streams)

    def metrics(self) -> Reply:
        """Reads the counts, percentiles and what is there now."""
        waiting = sum(len(stream.busy) for stream in self._streams.values())
        now = {"streams": len(self._streams), "max_streams": self._options.max_streams, "waiting": waiting}
        return {"shard": self.name, "healthy": self.healthy(), **now, **self.stats.read()}

    async def close(self) -> None:
        """Saves all streams and stops."""
        for stream in list(self._streams.values()):
            async with self._lock(stream.name):
                await _drained(stream)
                if self._store is not None and not stream.pending and stream.steps:
                    await self._save(stream, stream.label(), await self._runner.snapshot(stream))
        for task in list(self._tasks):
            task.cancel()
        for pool in (self._decoders, self._files):
            pool.shutdown(wait=False)
        self._runner.close()

    # --- frames -------------------------------------------------------------------------------------------------------

    async def _frame(self, frame: Frame) -> Reply:
        arrival = time.monotonic()
        try:
            if len(frame.payload) > self._options.max_bytes:
                raise Refused(413, "size", f"A frame has at most {self._options.max_bytes} bytes.")
            await self._turn(frame)
            async with self._lock(frame.stream):
                stream = await self._stream_for(frame)
                if frame.number < stream.next:
                    return _again(stream, frame)
                ticket = self._take(stream, frame, arrival)
            self._spawn(self._decode(stream, ticket))
            return await ticket.answer
        except Refused as refused:
            self.stats.refuse(refused.reply["code"])
            return {"stream": frame.stream, "frame": frame.number, "shard": self.name, **refused.reply}

    async def _turn(self, frame: Frame) -> None:
        """Lets the frames come that were sent right before this one: they may arrive in another order."""
        stream, key = self._streams.get(frame.stream), (frame.stream, frame.number)
        first = stream.next if stream else 0
        if frame.start or not first < frame.number <= first + self._options.queue:
            return
        turn = self._early.setdefault(key, asyncio.get_running_loop().create_future())
        await asyncio.wait([turn], timeout=EARLY)
        self._early.pop(key, None)

    def _take(self, stream: Stream, frame: Frame, arrival: float) -> Ticket:
        """Puts the frame into the stream's queue, if the limits allow it."""
        options = self._options
        if len(stream.busy) >= options.queue:
            raise Refused(429, "queue", f"{options.queue} frames of this stream wait.",
                          expected=stream.next, retry_after=options.wait_ms / 1e3 + 0.05)  # fmt: skip
        if options.max_fps is not None:
            since = (arrival - stream.counted) * options.max_fps
            stream.allowance = min(float(options.queue), stream.allowance + since)
            stream.counted = arrival
            if stream.allowance < 1:
                wait = (1 - stream.allowance) / options.max_fps
                raise Refused(429, "rate", f"A stream has at most {options.max_fps:g} frames per second.",
                              expected=stream.next, retry_after=wait)  # fmt: skip
            stream.allowance -= 1
        stream.last_heard = arrival
        ticket = Ticket(frame, arrival, asyncio.get_running_loop().create_future())
        stream.queue.append(ticket)
        stream.next = frame.number + 1
        self.stats.count("frames")
        turn = self._early.pop((stream.name, stream.next), None)
        if turn is not None and not turn.done():
            turn.set_result(None)
        return ticket

    async def _decode(self, stream: Stream, ticket: Ticket) -> None:
        frame = ticket.frame
        try:
            arguments = frame.kind, frame.payload, frame.size
            ticket.arrays = await in_thread(self._decoders, self._engine.prepare, *arguments)
        except BadFrame as error:
            refused = Refused(error.status, "frame", str(error), expected=frame.number)
            stream.rewind(ticket, frame.number, refused)
        except Exception as error:
            refused = Refused(500, "internal", f"{type(error).__name__}: {error}", expected=frame.number)
            stream.rewind(ticket, frame.number, refused)
        self._runner.wake()

    # --- streams ------------------------------------------------------------------------------------------------------

    async def _stream_for(self, frame: Frame) -> Stream:
        """Finds the stream in a state that this frame may follow, or begins one with it. Raises Refused."""
        if frame.start:
            return await self._begin(frame, "asked")
        stream = self._streams.get(frame.stream) or await self._restored(frame.stream)
        restart = frame.on_gap == "restart"
        if stream is None:
            missing = self._missing(frame.stream)
            why = str(missing.reply["code"])
            if frame.number == 0 and frame.epoch is None:
                return await self._begin(frame, None if why == "unknown" else why)
            if restart:
                return await self._begin(frame, why)
            raise missing
        expected = {"expected": stream.next, "epoch": stream.epoch}
        if frame.epoch not in (None, stream.epoch) and not restart:
            raise Refused(409, "epoch", f"The stream is in epoch {stream.epoch}: it restarted.", **expected)
        if frame.number > stream.next:
            if restart:
                return await self._begin(frame, "gap")
            message = f"Frame {stream.next} is missing: send it, or begin afresh with start."
            raise Refused(409, "gap", message, **expected)
        return stream

    async def _begin(self, frame: Frame, why: str | None) -> Stream:
        """Opens a stream whose first frame this is. One of that name that is there is answered first."""
        old = self._streams.get(frame.stream)
        if old is not None:
            await _drained(old)
            await self._drop(old, "restarted")
        slot = self._slot()
        try:
            await self._runner.reset(slot)
            if self._store is not None and old is None:
                await in_thread(self._files, self._store.remove, frame.stream)
        except BaseException:
            heapq.heappush(self._free, slot)
            raise
        self._gone.pop(frame.stream, None)
        stream = Stream(frame.stream, slot, frame.number, why, next=frame.number, allowance=self._options.queue)
        again = old is not None or why not in (None, "asked")  # a client may ask at its first frame: nothing was there
        self.stats.count("restarts" if again else "starts")
        self._streams[stream.name] = stream
        return stream

    async def _known(self, name: str) -> Stream:
        """Finds the stream, as it is here or in a snapshot. Raises Refused."""
        stream = self._streams.get(name) or await self._restored(name)
        if stream is None:
            raise self._missing(name)
        return stream

    async def _restored(self, name: str) -> Stream | None:
        """Restores the stream as a snapshot left it, if there is one.

        Of a replica that died, or of a server before this one.
        """
        if self._store is None or name in self._gone:
            return None
        found = await in_thread(self._files, self._store.load, name)
        if found is None:
            return None
        about, blob = found
        slot = self._slot()
        try:
            await self._runner.restore(slot, blob)
        except SessionError:  # of another model
            heapq.heappush(self._free, slot)
            return None
        stream = Stream(name, slot, about["started"], about["restart"], about["epoch"], about["frame"] + 1)
        stream.steps, stream.done, stream.repeat = about["steps"], about["frame"], about["answer"]
        stream.saved = stream.done
        stream.last_heard, stream.allowance = time.monotonic(), self._options.queue
        self.stats.count("restored")
        self._streams[name] = stream
        return stream

    def _slot(self) -> int:
        if not self._free:
            message = f"This shard holds {self._options.max_streams} streams and no more."
            raise Refused(503, "full", message, retry_after=self._options.idle)
        return heapq.heappop(self._free)

    def _missing(self, name: str) -> Refused:
        """Says why a stream is not there."""
        gone = self._gone.get(name)
        if gone is None:
            message = "This stream is not known: begin it with frame 0, or with start."
            return Refused(404, "unknown", message, stream=name)
        return Refused(410, "dropped", f"The stream was dropped ({gone['reason']}): begin it afresh.", **gone)

    async def _drop(self, stream: Stream, why: str) -> None:
        """Gives the slot back. No frame of the stream waits, and the caller has its lock."""
        del self._streams[stream.name]
        heapq.heappush(self._free, stream.slot)
        if why == "idle":
            self._gone[stream.name] = {"reason": why, "last": stream.next - 1, "epoch": stream.epoch}
            while len(self._gone) > MAX_GONE:
                self._gone.popitem(last=False)
            self.stats.count("dropped")
        if self._store is not None:
            await in_thread(self._files, self._store.remove, stream.name)

    async def _drop_idle(self) -> None:
        """Drops streams that are silent too long, and snapshots that nobody came for."""
        idle, swept = self._options.idle, time.monotonic()
        while True:
            await asyncio.sleep(min(idle / 4, 5.0))
            now = time.monotonic()
            for stream in [s for s in self._streams.values() if now - s.last_heard > idle]:
                async with self._lock(stream.name):
                    if self._streams.get(stream.name) is stream and not stream.busy and now - stream.last_heard > idle:
                        await self._drop(stream, "idle")
            if self._store is not None and now - swept > self._options.keep / 4:
                swept = now
                await in_thread(self._files, self._store.sweep, self._options.keep)

    async def _save(self, stream: Stream, about: Reply, blob: bytes) -> None:
        """Writes a snapshot, unless the stream has ended since; the answers that follow say so."""
        if self._store is None or self._streams.get(stream.name) is not stream:
            return
        stream.saving = True
        try:
            await in_thread(self._files, self._store.save, stream.name, about, blob)
            stream.saved = about["frame"]
            self.stats.count("snapshots")
        except OutputError:
            self.stats.count("snapshot_errors")
        finally:
            stream.saving = False

    # --- the event loop -----------------------------------------------------------------------------------------------

    def _lock(self, name: str) -> asyncio.Lock:
        """Lets one call at a time decide what becomes of a stream, in the order in which they came."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _drained(stream: Stream) -> None:
    """Waits until all that was taken is answered."""
    while busy := stream.busy:
        await asyncio.wait([ticket.answer for ticket in busy])


def _again(stream: Stream, frame: Frame) -> Reply:
    """Answers a frame that was taken before: with the same once more if it is the newest. Raises Refused."""
    if stream.repeat is not None and stream.repeat["frame"] == frame.number:
        return {**stream.repeat, "repeated": True}
    message = f"Frame {frame.number} was taken before; {stream.next} is next."
    raise Refused(409, "duplicate", message, expected=stream.next, epoch=stream.epoch)
