"""Answers per second of ``co3d serve`` beside one process per stream, and the CPU time and memory that each takes.

The sides take turns on the same streams of JPEG pictures:

- processes: one per stream, each decodes its own pictures and steps its own session as fast as it can; nothing goes
  over a network, so this is the best that it could be;
- reachable: one process per stream, each with a shard of one stream behind the gateway's WebSocket, without Ray;
- served: ``co3d serve``.

One client process sends all streams over WebSockets on loopback. It runs on the same cores.

    python benchmarks/bench_serve.py MODEL.onnx --streams 16 --replicas 2

CPU time of the client is not counted on the side of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvicorn
from PIL import Image

import co3d_compile as co3d
from co3d_compile.serve import client
from co3d_compile.serve.engine import Engine
from co3d_compile.serve.gateway import Gateway
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.shard import Shard

PICTURES = 16  # different ones, sent over and over


def pictures(height: int, width: int) -> list[bytes]:
    """JPEGs of smooth noise, at the size of the model's input: scaling is no part of this."""
    generator, made = np.random.default_rng(0), []
    for _ in range(PICTURES):
        small = Image.fromarray(generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
        out = io.BytesIO()
        small.resize((width, height)).save(out, "JPEG", quality=85)
        made.append(out.getvalue())
    return made


# --- one process per stream -------------------------------------------------------------------------------------------


def worker(pipe: Connection, model: str, frames: list[bytes]) -> None:
    """Told for how many seconds, counts its frames."""
    engine = Engine(model, ServeOptions(max_streams=1))
    pipe.send("ready")
    while True:
        seconds = pipe.recv()
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            engine.session.step(*engine.pulse.step([engine.prepare("image/jpeg", frames[count % PICTURES])])[0])
            count += 1
        pipe.send(count)


@contextmanager
def processes(work: Any, model: str, streams: int, frames: list[bytes]) -> Iterator[list[tuple[Any, Connection, Any]]]:
    """A process per stream, each with the model loaded; with its end of a pipe and what it has said first."""
    context, begun = multiprocessing.get_context("fork"), []
    for _ in range(streams):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, model, frames), daemon=True)
        process.start()
        begun.append((process, here))
    try:
        yield [(process, pipe, pipe.recv()) for process, pipe in begun]
    finally:
        for process, _ in begun:
            process.terminate()
            process.join()


class Local:
    """A shard in this process, as a gateway wants it."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    async def call(self, stream: str, method: str, *arguments: Any) -> Any:
        return await getattr(self._shard, method)(*arguments)

    async def all(self, method: str) -> list[Any]:
        return [await self.call("", method)]


def reachable_worker(pipe: Connection, model: str, frames: list[bytes]) -> None:
    """Serves one stream until it is terminated."""

    async def main() -> None:
        options = ServeOptions(max_streams=1, wait_ms=0, idle=600)
        shard = Shard(Engine(model, options), options)
        shard.start()
        listener = socket.create_server(("127.0.0.1", 0))
        pipe.send(f"ws://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(Gateway(Local(shard), options).app(), log_level="error")
        await uvicorn.Server(config).serve(sockets=[listener])

    asyncio.run(main())


# --- served -----------------------------------------------------------------------------------------------------------


@contextmanager
def server(model: str, streams: int, replicas: int) -> Iterator[tuple[int, str]]:
    """``co3d serve``: its process and its URL."""
    options = ["--replicas", replicas, "--max-streams", streams, "--port", 0, "--json", "--idle", 600]
    command = [sys.executable, "-m", "co3d_compile.cli.main", "serve", model, *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        text += process.stdout.readline()
    try:
        yield process.pid, json.loads(text)["url"].replace("http", "ws")
    finally:
        process.terminate()
        process.wait()


async def served(urls: list[str], frames: list[bytes], seconds: float) -> int:
    """A stream to each of the URLs for some seconds; the answers in all."""
    end = time.monotonic() + seconds

    def source() -> Iterator[bytes]:
        count = 0
        while time.monotonic() < end:
            yield frames[count % PICTURES]
            count += 1

    async def one(number: int) -> int:
        count = 0
        async for message in client.stream(urls[number], f"{number}", source(), format="jpeg", top=3, values=0):
            count += message["type"] == "answer"
        return count

    return sum(await asyncio.gather(*map(one, range(len(urls)))))


# --- what they take ---------------------------------------------------------------------------------------------------


def family(root: int) -> list[int]:
    """The processes from this one down."""
    return [root, *(process.pid for process in psutil.Process(root).children(recursive=True))]


def cpu_seconds(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def memory(pids: list[int]) -> float:
    """Megabytes that are theirs, shared pages divided among those who share them."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with co3d.StreamSession(args.model, threads=1) as session:
        assert session.info.frames_per_step == {session.info.inputs[0].name: 1}, "one input, one frame per step"
        shape = session.info.inputs[0].shape
    frames = pictures(int(shape[-2]), int(shape[-1]))
    rows: dict[str, list[tuple[float, float]]] = {"processes": [], "reachable": [], "served": []}
    with (
        processes(worker, args.model, args.streams, frames) as apart,
        processes(reachable_worker, args.model, args.streams, frames) as behind,
        server(args.model, args.streams, args.replicas) as (pid, url),
    ):
        pids = {
            "processes": [p.pid for p, *_ in apart],
            "reachable": [p.pid for p, *_ in behind],
            "served": family(pid),
        }
        urls = {"reachable": [said for *_, said in behind], "served": [url] * args.streams}
        asyncio.run(served(urls["served"], frames, 1.0))  # starts what starts late
        for _ in range(args.rounds):
            for side in rows:
                before, start = cpu_seconds(pids[side]), time.monotonic()
                if side in urls:
                    count = asyncio.run(served(urls[side], frames, args.seconds))
                else:
                    for _, pipe, _ in apart:
                        pipe.send(args.seconds)
                    count = sum(pipe.recv() for _, pipe, _ in apart)
                elapsed, spent = time.monotonic() - start, cpu_seconds(pids[side]) - before
                rows[side].append((count / elapsed, spent / max(count, 1) * 1e3))
        held = {side: memory(each) for side, each in pids.items()}
    report(args, rows, held)


def report(args: argparse.Namespace, rows: dict[str, list[tuple[float, float]]], held: dict[str, float]) -> None:
    result: dict[str, dict[str, Any]] = {
        side: {"per_second": [r[0] for r in turns], "cpu_ms": [r[1] for r in turns], "megabytes": held[side]}
        for side, turns in rows.items()
    }
    for side, each in result.items():
        turns = ", ".join(f"{value:.0f}" for value in each["per_second"])
        rate, spent = np.median(each["per_second"]), np.median(each["cpu_ms"])
        print(f"{side:10} {rate:8.0f} answers/s {spent:7.2f} CPU ms each {held[side]:8.0f} MB   turns: {turns}")
    for other in ("processes", "reachable"):
        ratios = [f"{s[0] / p[0]:.2f}" for s, p in zip(rows["served"], rows[other], strict=True)]
        print(f"served by {other}, turn by turn: {', '.join(ratios)}; {args.streams} streams")
    if args.json:
        args.json.write_text(
            json.dumps({"streams": args.streams, "replicas": args.replicas, **result}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
