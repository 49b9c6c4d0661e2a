"""``co3d serve`` as a process of its own, for tests: how it is asked, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from co3d_compile.serve import client

Reply = dict[str, Any]
TOKEN = "a-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
IMPATIENT = """
from co3d_compile.cli.main import main
from co3d_compile.serve import cluster
cluster.STOPPED = {}
main()
"""
PATIENCE = 120  # seconds until something that must happen is taken for lost; no test is right or wrong by its speed


class Server:
    """``co3d serve`` as a process of its own."""

    def __init__(self, model: Path, states: Path, *more: object, patience: float | None = None) -> None:
        """``patience``: seconds that Ray may take to stop."""
        self.model = model
        (model.parent / "token.txt").write_text(f"{TOKEN}\n")
        arguments = [model, "--port", 0, "--json", "--state-dir", states, "--token-file", model.parent / "token.txt"]
        how = ["-m", "co3d_compile.cli.main"] if patience is None else ["-c", IMPATIENT.format(patience)]
        command = [sys.executable, *how, "serve", *arguments, *more]
        # niceness: other tests run beside this one, and Ray's workers would stand behind them
        more_of_ray = {"RAY_metrics_report_interval_ms": "1000", "RAY_worker_niceness": "0"}
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **more_of_ray},
        )  # fmt: skip
        assert self.process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(self.process.communicate()[1])
            text += line
        self.facts = json.loads(text)
        self.url = self.facts["url"]

    def ask(self, path: str, data: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, Reply]:
        """Status and JSON of a request, with the token."""
        request = urllib.request.Request(self.url + path, data, {**BEARER, **headers}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, {**json.load(error), "headers": dict(error.headers)}

    def metrics(self) -> tuple[Reply, dict[str, Reply]]:
        """All metrics, and those of each shard by its name, once all shards answer: a busy one may take too long."""
        deadline = time.monotonic() + PATIENCE
        while True:
            _, read = self.ask("/v1/metrics")
            if all("pid" in shard for shard in read["shards"]):
                return read, {shard["shard"]: shard for shard in read["shards"]}
            assert time.monotonic() < deadline, read
            time.sleep(0.2)

    def stream(self, name: str, frames: Any, **more: Any) -> Any:
        return client.stream(self.url.replace("http", "ws"), name, frames, token=TOKEN, **more)

    def stop(self) -> tuple[int, str]:
        """Exit code and what is on stderr, once no process of the server is left. Does nothing the second time."""
        if self.process.poll() is not None:
            return self.process.returncode, ""
        mine = family(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        _, error = self.process.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while (left := {pid: line for pid, line in mine.items() if alive(pid)}) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, left
        return self.process.returncode, error


def family(root: int) -> dict[int, str]:
    """The processes from this one down, with their command lines."""
    found = {}
    for process in [parent := psutil.Process(root), *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found[process.pid] = " ".join(process.cmdline())[:100]
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False
