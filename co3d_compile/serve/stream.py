"""A stream as a shard sees it: what came in, what waits, what was answered."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from co3d_compile.support.plain_types import Array, JsonObject

Reply: TypeAlias = JsonObject
"""What is said to a client, as JSON data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame as it was sent.

    Attributes:
        stream, number: Whose it is, and its number in the stream, from 0.
        kind, payload, size: As for ``Engine.prepare``.
        start: Begin the stream afresh with this frame.
        on_gap: What to do where frames are missing, or the server does not know the stream: refuse this one, or begin
            afresh with it.
        epoch: The epoch that the client believes the stream to be in; None: any.
        top: So many of the best classes are named in the answer.
        values: Whether the answer holds the outputs.
    """

    stream: str
    number: int
    kind: str
    payload: bytes = field(repr=False)
    size: tuple[int, int] | None = None
    start: bool = False
    on_gap: Literal["refuse", "restart"] = "refuse"
    epoch: str | None = None
    top: int = 0
    values: bool = True


class Refused(Exception):
    """A frame that was not taken, or a stream that is not there.

    Args:
        status: As in HTTP. code: One word for programs. more: What else a client needs (``expected``, ``retry_after``).
    """

    def __init__(self, status: int, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.reply = {"status": status, "code": code, "message": message, **more}


@dataclass(eq=False, slots=True)
class Ticket:
    """A frame that was taken and waits for its answer. ``arrays`` is None until it is decoded."""

    frame: Frame
    arrival: float
    answer: asyncio.Future[Reply]
    arrays: list[Array] | None = None


@dataclass(eq=False, slots=True)
class Stream:
    """A stream that has a slot.

    The state in the slot is a function of the epoch and of the frames from ``started`` to ``done``, less those in
    ``pending``. An epoch is a random name that is never used again, so the label (epoch, done) says what a state or
    an answer is of, whichever process made it.
    """

    name: str
    slot: int
    started: int
    restart: str | None = None
    epoch: str = field(default_factory=lambda: new_epoch())
    next: int = 0  # the number that is taken next
    steps: int = 0
    done: int = -1  # the newest frame of a whole step
    saved: int | None = None  # the newest frame that a snapshot covers
    saving: bool = False
    last_heard: float = 0.0
    counted: float = 0.0  # when the allowance was
    allowance: float = 0.0  # frames that the rate limit would let through then
    queue: deque[Ticket] = field(default_factory=deque)
    pending: list[list[Array]] = field(default_factory=list)
    due: Ticket | None = None  # the frame that completes the step now in work
    repeat: Reply | None = None  # the newest answer, for a client that did not get it

    @property
    def busy(self) -> list[Ticket]:
        """What waits for an answer."""
        return [*([self.due] if self.due else []), *self.queue]

    def about(self) -> Reply:
        """What labels every answer."""
        return {"epoch": self.epoch, "started": self.started, "restart": self.restart}

    def label(self) -> Reply:
        """What the state in the slot is of."""
        return self.about() | {"frame": self.done, "steps": self.steps, "answer": self.repeat}

    def begin_again(self, why: str) -> None:
        """Notes that its slot is back at the start: what follows is of another epoch, and warms up again."""
        self.epoch, self.started, self.restart, self.steps = new_epoch(), self.done + 1, why, 0

    def rewind(self, ticket: Ticket, number: int, refused: Refused) -> None:
        """Refuses a frame that was taken and all behind it: ``number`` is expected again."""
        if ticket not in self.queue:
            return
        place = self.queue.index(ticket)
        rest = list(self.queue)[place:]
        self.queue = deque(list(self.queue)[:place])
        self.next = number
        for other in rest:
            if not other.answer.done():
                message = f"A frame before this one was refused: {number} is expected."
                error = refused if other is ticket else Refused(409, "gap", message, expected=number)
                other.answer.set_exception(error)


def new_epoch() -> str:
    """Makes a name that was never used before."""
    return secrets.token_hex(8)


def shard_of(stream: str, count: int) -> int:
    """Chooses the shard of a stream. With another count of shards as few streams as can be have another one."""
    weights = [hashlib.blake2b(f"{index}/{stream}".encode(), digest_size=8).digest() for index in range(count)]
    return weights.index(max(weights))
