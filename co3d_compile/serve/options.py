"""What a server may be told, and the limits that it holds its clients to."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from co3d_compile.errors import UsageError
from co3d_compile.runtime.running_model import Layout
from co3d_compile.support.plain_types import JsonObject

MAX_NAME = 200  # characters of a stream's name


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Settings of every shard and gateway. All limits are per stream or per shard, as said.

    Attributes:
        max_streams: Streams that one shard holds; more are refused (503).
        max_batch: Streams that advance in one run of the model.
        wait_ms: How long a frame may wait for those of other streams, in milliseconds.
        queue: Frames of one stream that wait; more are refused (429).
        max_fps: Frames per second of one stream, with bursts of ``queue`` more; None: as fast as they are answered.
        max_bytes: Of one frame as it is sent; more is refused (413).
        max_pixels: Of one picture, before it is decoded (413).
        idle: Seconds after which a silent stream is dropped.
        snapshot_every: Steps between two snapshots of a stream.
        state_dir: Folder for snapshots, the same for all machines; None: no snapshots.
        keep: Seconds that the snapshot of a stream which nobody holds is kept.
        timeout: Seconds that a gateway waits for an answer (503).
        threads: CPU threads of one run.
        providers: ONNX Runtime execution providers by falling priority; empty: the CPU.
        layout: As for ``StreamSession``.
        token: SHA-256, in hexadecimal, of the token that every request must carry; None: no token.
        open_metrics: Whether ``/metrics`` needs no token.

    Raises:
        UsageError: A value that makes no sense.
    """

    max_streams: int = 64
    max_batch: int = 16
    wait_ms: float = 2.0
    queue: int = 8
    max_fps: float | None = None
    max_bytes: int = 8_000_000
    max_pixels: int = 16_000_000
    idle: float = 60.0
    snapshot_every: int = 32
    state_dir: str | None = None
    keep: float = 3600.0
    timeout: float = 30.0
    threads: int = 1
    providers: tuple[str, ...] = ()
    layout: Layout = "auto"
    token: str | None = None
    open_metrics: bool = False

    def __post_init__(self) -> None:
        whole = ("max_streams", "max_batch", "queue", "max_bytes", "max_pixels", "snapshot_every", "threads")
        for name in whole:
            _check(name, getattr(self, name), 1, int)
        for name in ("wait_ms", "idle", "keep", "timeout", "max_fps"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, 0, (int, float), open_end=name != "wait_ms")

    @classmethod
    def of(cls, values: JsonObject) -> ServeOptions:
        """Reads them from a dict that may hold more."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def _check(
    name: str, value: float, least: float, kind: type[int] | tuple[type[int], type[float]], open_end: bool = False
) -> None:
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least or (open_end and value == least):
        raise UsageError(f"{name} is {value!r}.", hint=f"It must be {'above' if open_end else 'at least'} {least}.")
