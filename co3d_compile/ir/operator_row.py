"""One operator as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

from co3d_compile.support.plain_types import JsonObject


@dataclass(frozen=True)
class Operator:
    """One operator over a stream, or over a window of one.

    Attributes:
        name: Of the node in the graph.
        operator, module_path: What it is and where it comes from.
        kind: "input", "stream", "window" (computed afresh from the newest entries).
        done: What the passes made of it: "continual", "gate over one frame", …; empty: it was left as it was.
        inputs: Indices of the operators that it reads.
        held: Of each input, by how many entries it is delayed; None where it is not over time.
        shape: Of its result in the clip.
        taps: Entries that it reads along time, from the first to the last.
        padding: Zeros that it had in front, on the time axis.
        rate: Frames of the first input from one entry to the next.
        delay: Frames by which its newest entry lags behind the newest frame.
        first, last: Frames that an entry at frame 0 reads, relative to it, at most; None: without bound.
        macs_clip, macs_step: Multiply-adds for a clip, and for a step.
        state_bytes: Of one stream.
        origin: Name of the node in the captured graph that has this result; empty: none has.
        entries: New ones at every step.
        late: Its own entries by which the newest one lags behind, as for an output of the model.
        values: The ONNX values that hold its new entries, oldest first; empty where there are none.
    """

    name: str
    operator: str
    module_path: str
    kind: str
    done: str
    inputs: tuple[int, ...]
    held: tuple[int | None, ...]
    shape: tuple[int, ...]
    taps: int
    padding: int
    rate: float
    delay: float
    first: float | None
    last: float | None
    macs_clip: int = 0
    macs_step: int = 0
    state_bytes: int = 0
    origin: str = ""
    entries: int = 1
    late: int = 0
    values: tuple[str, ...] = ()

    @property
    def field(self) -> int | None:
        """Frames that one entry depends on."""
        if self.first is None or self.last is None:
            return None
        return int(self.last - self.first) + 1


def as_rows(rows: list[Operator]) -> list[JsonObject]:
    """Writes the rows as plain JSON data."""
    return [{**vars(row), "field": row.field} for row in rows]
