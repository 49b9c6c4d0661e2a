"""Shards without Ray for tests: models of several kinds, frames of streams, and what a plain session gives for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.serve.engine import TENSOR, Engine
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.shard import Shard
from co3d_compile.serve.store import SnapshotStore
from co3d_compile.serve.stream import Frame

Reply = dict[str, Any]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "one frame per step": ("p3d", {}),
    "several frames per step": ("c3d", {}),
    "exact ends": ("p3d", {"boundary": "exact"}),
    "several outputs": ("two_heads", {}),
    "recurrent, renamed": ("cnn_lstm", {"state_io": "renamed"}),
}


@cache
def compiled_row(row: str) -> Any:
    name, options = ROWS[row]
    entry = SMALL[name]
    return co3d.compile(entry.build(), entry.examples(), time_dim=entry.time_dim, **{**entry.options, **options})


def payloads(engine: Engine, count: int, seed: int) -> list[bytes]:
    """Random frames of a stream, as tensors."""
    generator = np.random.default_rng(seed)
    shapes = [(shape, spec.dtype) for shape, spec in zip(engine.pulse.shapes, engine.info.inputs, strict=True)]
    return [
        b"".join(generator.standard_normal(shape).astype(dtype).tobytes() for shape, dtype in shapes)
        for _ in range(count)
    ]


def alone(row: str, engine: Engine, frames: list[bytes]) -> list[list[Any]]:
    """What a plain session gives for the same frames: the outputs of each step."""
    session = co3d.StreamSession(compiled_row(row), threads=1)
    results, arrays = [], [engine.prepare(TENSOR, frame) for frame in frames]
    for start in range(0, len(arrays) - engine.pulse.frames + 1, engine.pulse.frames):
        inputs, valid = engine.pulse.step(arrays[start : start + engine.pulse.frames])
        result = session.step(inputs, valid=valid)
        results.append([r.tolist() for r in (result if isinstance(result, tuple) else (result,))])
    if session.info.boundary == "exact":
        results += [[np.asarray(result).tolist()] for result in session.flush()]
    return results


def same(replies: list[Reply], expected: list[list[Any]]) -> None:
    for reply, outputs in zip(replies, expected, strict=True):
        for one, other in zip(reply["outputs"].values(), outputs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def frame(name: str, number: int, payload: bytes, **more: Any) -> Frame:
    return Frame(stream=name, number=number, **{"kind": TENSOR, "payload": payload, **more})


def with_shard(
    row: str, work: Callable[[Shard, Engine], Awaitable[None]], store: Path | None = None, **options: Any
) -> None:
    """Runs ``work`` with a shard that is closed afterwards."""

    async def main() -> None:
        settings = ServeOptions(**{"max_streams": 8, **options})
        engine = Engine(compiled_row(row), settings)
        shard = Shard(engine, settings, "shard-0", SnapshotStore(store) if store else None)
        shard.start()
        try:
            await asyncio.wait_for(work(shard, engine), 120)  # a guard, no limit
        finally:
            await shard.close()

    asyncio.run(main())
