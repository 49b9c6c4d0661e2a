"""What becomes of the shards, in words for the log of ``co3d serve``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from co3d_compile.serve.stream import Reply

EVERY = 2.0  # seconds between two looks
MISSED = 2  # looks in a row without an answer until a shard is said to be silent
NAMES = 12  # streams that are named


class Watch:
    """A watch that compares what shards say of themselves with what they said before."""

    def __init__(self) -> None:
        self._known: dict[str, Reply] = {}
        self._missed: dict[str, int] = {}

    def look(self, shards: Sequence[Reply]) -> list[str]:
        """Writes a line for each shard that has fallen silent, or that has another process than before.

        Args:
            shards: ``shard`` and, of one that answers, ``pid`` and the names of its ``streams``.
        """
        lines = []
        for now in shards:
            name = now["shard"]
            before = self._known.get(name)
            if "pid" not in now:
                self._missed[name] = self._missed.get(name, 0) + 1
                if before and self._missed[name] == MISSED:
                    lines.append(f"{name} does not answer (process {before['pid']}); {_waiting(before['streams'])}")
                continue
            silent = self._missed.pop(name, 0) >= MISSED
            if before and before["pid"] != now["pid"]:
                again = f"what goes on from snapshots: {_named(before['streams'])}"
                lines.append(f"{name} died and is back as process {now['pid']}, before {before['pid']}; {again}")
            elif before and silent:
                lines.append(f"{name} answers again")
            self._known[name] = now
        return lines

    def work(self, ask: Callable[[], Sequence[Reply]], say: Callable[[str], None], end: threading.Event) -> None:
        """Looks until the end."""
        while not end.wait(EVERY):
            for line in self.look(ask()):
                say(line)


def _waiting(streams: Sequence[str]) -> str:
    return f"its streams wait: {_named(streams)}" if streams else "it had no streams"


def _named(streams: Sequence[str]) -> str:
    if not streams:
        return "no streams"
    more = f" and {len(streams) - NAMES} more" if len(streams) > NAMES else ""
    return f"{', '.join(sorted(streams)[:NAMES])}{more}"
