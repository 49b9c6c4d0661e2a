"""Runs the model on whatever streams have a step ready, together; one run after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

from co3d_compile.serve.engine import Engine, Work
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.stats import Stats
from co3d_compile.serve.stream import Refused, Reply, Stream, Ticket
from co3d_compile.support.plain_types import Array

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
MAX_FAILURES = 3  # runs in a row that fail before a new process is wanted
Save = Callable[[Stream, Reply, bytes], Awaitable[None]]


class Runner:
    """The one that touches the engine's states, in a thread of its own.

    Args:
        streams: Those of the shard, by name; looked at before every run.
        save: Called with a stream, what its snapshot is of, and the snapshot, when one is due; None: no snapshots.
    """

    def __init__(
        self,
        engine: Engine,
        options: ServeOptions,
        shard: str,
        streams: Mapping[str, Stream],
        stats: Stats,
        save: Save | None,
    ) -> None:
        self._engine, self._options, self._shard = engine, options, shard
        self._streams, self._stats, self._save = streams, stats, save
        self._thread = ThreadPoolExecutor(1, "run")
        self._wake = asyncio.Event()
        self._failures = 0
        self._saves: set[asyncio.Future[None]] = set()

    @property
    def healthy(self) -> bool:
        return self._failures < MAX_FAILURES

    def wake(self) -> None:
        """Hears that some frame is decoded."""
        self._wake.set()

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def reset(self, slot: int) -> None:
        """Puts the state of a slot back to its start."""
        await in_thread(self._thread, self._engine.session.reset, slot)

    async def restore(self, slot: int, blob: bytes) -> None:
        """Puts a snapshot into a slot. Raises SessionError if it does not fit the model."""
        await in_thread(self._thread, self._engine.session.restore, blob, slot)

    async def snapshot(self, stream: Stream) -> bytes:
        return await in_thread(self._thread, self._engine.session.snapshot, stream.slot)

    async def work(self) -> None:
        """Runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := await self._batch():
                await self._advance(batch)

    async def flush(self, stream: Stream) -> list[Reply]:
        """Computes what is still due at the end of a stream, of a model with exact ends.

        Frames that are not there follow.
        """
        info = self._engine.info
        if info.boundary != "exact" or not (stream.steps or stream.pending):
            return []
        replies = []
        for _ in range(info.flush_steps + bool(stream.pending)):
            work = Work(stream.slot, *self._engine.pulse.step(stream.pending))
            (outputs,) = await in_thread(self._thread, self._engine.advance, [work])
            stream.pending = []
            replies.append(self._reply(stream, stream.next - 1, outputs, top=0, values=True))
            stream.steps += 1
        return replies

    async def _batch(self) -> list[Stream]:
        """Lists the streams with a step ready, those first that wait longest.

        Gives others a little time to join them.
        """
        ready = self._ready()
        if not ready:
            return []
        if len(ready) < min(self._options.max_batch, len(self._streams)):
            oldest = min(due.arrival for _, due in ready)
            left = oldest + self._options.wait_ms / 1e3 - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
                ready = self._ready()
        ready.sort(key=lambda pair: pair[1].arrival)
        return [stream for stream, _ in ready[: self._options.max_batch]]

    def _ready(self) -> list[tuple[Stream, Ticket]]:
        """Moves decoded frames from the queues into steps."""
        ready = []
        for stream in self._streams.values():
            while stream.due is None and stream.queue and stream.queue[0].arrays is not None:
                ticket = stream.queue.popleft()
                assert ticket.arrays is not None
                stream.pending.append(ticket.arrays)
                if len(stream.pending) == self._engine.pulse.frames:
                    stream.due = ticket
                else:  # part of a step: it has no answer of its own
                    stream.repeat = self._label(stream, ticket.frame.number) | {"status": 202}
                    _give(ticket, stream.repeat)
            if stream.due is not None:
                ready.append((stream, stream.due))
        return ready

    async def _advance(self, batch: Sequence[Stream]) -> None:
        every = self._options.snapshot_every
        saves = [s for s in batch if self._save and (s.steps + 1 + s.slot) % every == 0 and not s.saving]
        slots = [stream.slot for stream in saves]
        try:
            outputs, spoilt, blobs, milliseconds = await in_thread(self._thread, self._run, batch, slots)
        except Exception as error:
            self._failures += 1
            for stream in batch:
                self._failed(stream, error)
            return
        self._failures = 0
        self._stats.batch(len(batch), milliseconds)
        for stream, values in zip(batch, outputs, strict=True):
            self._answer(stream, values, spoilt.get(stream.slot))
        for stream, blob in zip(saves, blobs, strict=True):
            assert self._save is not None
            task = asyncio.ensure_future(self._save(stream, stream.label(), blob))
            self._saves.add(task)
            task.add_done_callback(self._saves.discard)

    def _run(
        self, batch: Sequence[Stream], slots: Sequence[int]
    ) -> tuple[list[list[Array]], dict[int, str], list[bytes], float]:
        """Runs the step, in the thread: its results, which slots it has spoilt, and snapshots of some behind it."""
        start = time.perf_counter()
        work = [Work(stream.slot, *self._engine.pulse.step(stream.pending)) for stream in batch]
        outputs = self._engine.advance(work)
        milliseconds = (time.perf_counter() - start) * 1e3
        session = self._engine.session
        return outputs, session.spoilt, [session.snapshot(slot) for slot in slots], milliseconds

    def _answer(self, stream: Stream, outputs: list[Array], spoilt: str | None) -> None:
        ticket = stream.due
        assert ticket is not None
        frame = ticket.frame
        reply = self._reply(stream, frame.number, outputs, frame.top, frame.values)
        stream.due, stream.pending, stream.repeat, stream.done = None, [], reply, frame.number
        stream.steps += 1
        if spoilt is not None:
            reply |= {"warm": False, "not_finite": spoilt}
            stream.begin_again("not_finite")
            self._stats.count("not_finite")
            log.warning("stream %s: %s behind frame %d; it starts anew", stream.name, spoilt, frame.number)
        stream.last_heard = max(stream.last_heard, time.monotonic())
        self._stats.answer((time.monotonic() - ticket.arrival) * 1e3)
        _give(ticket, reply)

    def _failed(self, stream: Stream, error: Exception) -> None:
        """Goes back to before the step: ONNX Runtime failed and left the states as they were."""
        ticket = stream.due
        assert ticket is not None
        first = ticket.frame.number - len(stream.pending) + 1
        stream.due, stream.pending = None, []
        stream.queue.appendleft(ticket)
        stream.rewind(ticket, first, Refused(500, "run", str(error)[:300], expected=first))

    def _label(self, stream: Stream, number: int) -> Reply:
        about = stream.about() | {"saved": stream.saved, "shard": self._shard}
        return {"stream": stream.name, "frame": number, **about, "step": None, "warm": False, "about": None}

    def _reply(self, stream: Stream, number: int, outputs: list[Array], top: int, values: bool) -> Reply:
        """Writes what a client gets of a step: its label, the outputs, the best classes."""
        reply = self._label(stream, number) | {"status": 200, "step": stream.steps}
        reply["warm"] = self._engine.warm(stream.steps)
        about = self._engine.about(stream.steps + 1)
        reply["about"] = stream.started + about if 0 <= about <= number - stream.started else None
        if values:
            pairs = zip(self._engine.info.outputs, outputs, strict=True)
            reply["outputs"] = {spec.name: _plain(value) for spec, value in pairs}
        if top:
            reply["top"] = self._engine.top(outputs, top)
        return reply


async def in_thread(pool: ThreadPoolExecutor, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Runs a call in a thread of the pool, and waits for its result."""
    return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *arguments, **named))


def _give(ticket: Ticket, reply: Reply) -> None:
    if not ticket.answer.done():
        ticket.answer.set_result(reply)


def _plain(values: Array) -> object:
    """Makes nested lists of numbers. JSON has no infinite ones and no NaN, so these become null."""
    finite = np.isfinite(values)
    if finite.all():
        return values.tolist()
    plain = values.astype(object)
    plain[~finite] = None
    return plain.tolist()
