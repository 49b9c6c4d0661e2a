"""Shards and gateway as Ray Serve deployments.

Every shard is a deployment of its own, of one replica, with a name that never changes, and a stream belongs to the
shard that its name hashes to. Several replicas of one deployment would not do: Ray's routers choose among those that
run at the moment. The default one goes by load, multiplexing falls back to any replica, and the consistent-hash router
builds its ring of replica ids, so that a replica that dies and comes back under a new id moves streams of the others
too, at a moment that differs from router to router. Here a stream waits until its own shard is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from co3d_compile.errors import Co3dError, LoadError, UsageError
from co3d_compile.serve.engine import Engine
from co3d_compile.serve.options import ServeOptions
from co3d_compile.serve.shard import Shard
from co3d_compile.serve.stats import Stats
from co3d_compile.serve.store import SnapshotStore
from co3d_compile.serve.stream import Frame, Refused, Reply, shard_of
from co3d_compile.support.install_hint import install_command
from co3d_compile.support.plain_types import JsonObject

try:
    import psutil
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, RayServeException
    from ray.serve.handle import DeploymentHandle
    from ray.util import metrics
except ImportError as error:
    raise Co3dError("Serving needs Ray Serve.", hint=install_command("co3d-compile[serve]")) from error

APP = "co3d"
CALLS = 2  # to one shard at a time: one is worked on, one is on its way
MOST = 64  # frames in one call
LOOK = 3.0  # seconds that a shard has to say that it is there
RETRY = 1.0  # seconds that a client shall wait while a shard starts again
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report to its makers
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a small machine starts slowly: the default gives up after 5
}
STOPPED = 75.0  # seconds; the limits that Ray does have, one after another, are about 50
OBJECT_STORE = 100_000_000  # bytes; frames and answers mostly go past it
STREAMS: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]
MILLISECONDS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000]
# Names, what they count, and the tag beside the shard, or the boundaries.
COUNTERS = (
    ("events", "Frames, restarts, snapshots and the like.", "what"),
    ("refused", "Frames that were not taken.", "code"),
)
HISTOGRAMS = (
    ("latency_ms", "From arrival to answer.", MILLISECONDS),
    ("run_ms", "One run of the model.", MILLISECONDS),
    ("batch", "Streams in one run.", STREAMS),
)


class ShardReplica:
    """The process of one shard."""

    async def __init__(  # type: ignore[misc]  # in the event loop: Ray waits for it
        self, model: str, digest: str, name: str, options: JsonObject
    ) -> None:
        settings = ServeOptions(**options)
        if digest_of(model) != digest:
            raise LoadError(f"{model} is not the same file on all machines.")
        store = SnapshotStore(Path(settings.state_dir, digest[:16])) if settings.state_dir is not None else None
        self._engine = Engine(model, settings)
        self._shard = Shard(self._engine, settings, name, store, ExportedStats(name))
        self._shard.start()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the shard, or says of ``model`` what a client needs to know of the file."""
        if method == "model":
            info = self._engine.info
            preprocess = None if self._engine.why_no_pictures else info.preprocess or {}
            return {
                "status": 200,
                "frames_per_step": self._engine.pulse.frames,
                "inputs": [
                    {"name": spec.name, "frame_shape": list(shape), "dtype": spec.dtype}
                    for spec, shape in zip(info.inputs, self._engine.pulse.shapes, strict=True)
                ],
                "outputs": [spec.name for spec in info.outputs],
                "delays": info.delays,
                "warmup_steps": info.warmup_steps,
                "pictures": preprocess is not None,
                "fps": (preprocess or {}).get("fps"),
                "labels": list(info.labels or ()),
            }
        if method == "metrics":
            return {**self._shard.metrics(), "pid": os.getpid()}
        if method == "streams":
            return {"shard": self._shard.name, "pid": os.getpid(), "streams": self._shard.names()}
        return await getattr(self._shard, method)(*arguments)

    def check_health(self) -> None:
        """Raises where the replica must be replaced: Ray Serve does that."""
        if not self._shard.healthy():
            raise RuntimeError("the model does not run any more")

    async def __del__(self) -> None:
        """Saves what there is when a replica is stopped on purpose: its streams go on elsewhere, or later."""
        await self._shard.close()


class ExportedStats(Stats):
    """Counts that Ray's own exporter gives to Prometheus, too. ``shard`` is a tag of each."""

    def __init__(self, shard: str) -> None:
        super().__init__()
        self._metrics: dict[str, metrics.Counter | metrics.Histogram] = {
            name: metrics.Counter(f"co3d_{name}", text, tag_keys=("shard", tag)) for name, text, tag in COUNTERS
        }
        for name, text, boundaries in HISTOGRAMS:
            self._metrics[name] = metrics.Histogram(f"co3d_{name}", text, boundaries=boundaries, tag_keys=("shard",))
        for metric in self._metrics.values():
            metric.set_default_tags({"shard": shard})

    def export(self, name: str, value: float, **tags: str) -> None:
        metric = self._metrics[name]
        if isinstance(metric, metrics.Counter):
            metric.inc(value, tags)
        else:
            metric.observe(value, tags)


class GatewayReplica:
    """One process that speaks HTTP and WebSocket."""

    def __init__(self, options: JsonObject, *shards: DeploymentHandle) -> None:
        self._options = ServeOptions(**options)
        self._shards = shards

    def __serve_build_asgi_app__(self) -> Any:
        from co3d_compile.serve.gateway import Gateway

        return Gateway(Handles(self._shards, self._options.timeout), self._options).app()


class Handles:
    """The shards behind their handles; what Ray raises becomes a refusal that says when to come again."""

    def __init__(self, handles: Sequence[DeploymentHandle], timeout: float) -> None:
        self._lanes = [_Lane(handle, shard_name(index), timeout) for index, handle in enumerate(handles)]

    async def call(self, stream: str, method: str, *arguments: Any) -> Reply:
        lane = self._lanes[shard_of(stream, len(self._lanes))]
        if method == "frame":
            return await lane.frame(*arguments)
        return await lane.call(method, *arguments)

    async def all(self, method: str) -> list[Reply]:
        async def one(lane: _Lane) -> Reply:
            try:
                return await asyncio.wait_for(lane.call(method), 2.0)
            except (Refused, TimeoutError):
                return {"shard": lane.name, "healthy": False}

        return list(await asyncio.gather(*map(one, self._lanes)))


class _Lane:
    """The way to one shard. A call costs about as much as a small model's step, so frames that wait go together.

    A call carries at most one frame of a stream, and so is about one run of the model: no frame waits for more than
    that. While calls are on their way the next one fills up.
    """

    def __init__(self, handle: DeploymentHandle, name: str, timeout: float) -> None:
        self.name, self._handle, self._timeout = name, handle, timeout
        self._waiting: deque[tuple[Frame, asyncio.Future[Reply]]] = deque()
        self._flying: set[asyncio.Task[None]] = set()

    async def frame(self, frame: Frame) -> Reply:
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((frame, answer))
        self._launch()
        return await answer

    def _launch(self) -> None:
        while self._waiting and len(self._flying) < CALLS:
            chosen: dict[str, tuple[Frame, asyncio.Future[Reply]]] = {}
            rest: deque[tuple[Frame, asyncio.Future[Reply]]] = deque()
            for frame, answer in self._waiting:
                room = len(chosen) < MOST and frame.stream not in chosen
                if room:
                    chosen[frame.stream] = frame, answer
                else:
                    rest.append((frame, answer))
            self._waiting = rest
            task = asyncio.ensure_future(self._fly(list(chosen.values())))
            self._flying.add(task)
            task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._flying.discard(task)
        self._launch()

    async def _fly(self, frames: Sequence[tuple[Frame, asyncio.Future[Reply]]]) -> None:
        try:
            replies = await self.call("frames", [frame for frame, _ in frames])
        except Exception as error:
            for _, answer in frames:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), reply in zip(frames, replies, strict=True):
            if not answer.done():
                answer.set_result(reply)

    async def call(self, method: str, *arguments: object) -> Any:
        name = self.name
        try:
            return await asyncio.wait_for(self._handle.call.remote(method, *arguments), self._timeout)
        except BackPressureError as error:
            raise Refused(503, "busy", f"Too much waits for {name}.", retry_after=RETRY) from error
        except TimeoutError as error:
            raise Refused(503, "timeout", f"{name} did not answer in time.", retry_after=RETRY) from error
        except (RayError, RayServeException) as error:
            message = f"{name} was lost on the way: it starts again, and then says which frame it wants."
            raise Refused(503, "lost", message, retry_after=RETRY) from error


def watched(replicas: int) -> list[Reply]:
    """Lists process and streams of each shard, for ``Watch``; of one that does not answer, its name."""

    def one(name: str) -> Reply:
        try:
            reply: Reply = serve.get_deployment_handle(name, APP).call.remote("streams").result(timeout_s=LOOK)
            return reply
        except (RayError, RayServeException, TimeoutError, RuntimeError):  # RuntimeError: Ray is on its way down
            return {"shard": name}

    return [one(shard_name(index)) for index in range(replicas)]


def shard_name(index: int) -> str:
    return f"shard-{index}"


def digest_of(model: str) -> str:
    """Computes the SHA-256 of a file, in hexadecimal. Raises LoadError."""
    try:
        with open(model, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"Cannot read the model: {error}.", hint="Give an ONNX file.") from error


def application(model: str, replicas: int, options: ServeOptions, gateways: int = 1) -> Any:
    """Builds the Ray Serve application: for ``serve.run``, or to be deployed by Ray's own means.

    Args:
        model: An ONNX file that lies at this path on every machine.
        replicas: Shards.
        gateways: Processes that speak HTTP.
    """
    settings, digest = asdict(options), digest_of(model)
    waiting = options.max_streams * (options.queue + 1) + 64
    # The handle's own type is no use here: every call of a bound deployment makes one.
    deployment = serve.deployment(
        max_ongoing_requests=waiting,
        max_queued_requests=waiting,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=20.0,
        ray_actor_options={"num_cpus": options.threads},
    )(ShardReplica)
    shards = [
        deployment.options(name=shard_name(index)).bind(model, digest, shard_name(index), settings)
        for index in range(replicas)
    ]
    gateway = serve.deployment(
        name="gateway",
        num_replicas=gateways,
        max_ongoing_requests=waiting * replicas,
        max_queued_requests=64,
        ray_actor_options={"num_cpus": 0.5},
    )(serve.ingress()(GatewayReplica))
    return gateway.bind(settings, *shards)


def start(
    model: str,
    replicas: int,
    options: ServeOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    gateways: int = 1,
    address: str | None = None,
) -> str:
    """Serves until ``stop``. Returns when requests are answered, with the URL of the metrics for Prometheus.

    Args:
        address: Of a Ray cluster that runs; None: one is started on this machine, and ends with ``stop``.

    Raises:
        UsageError, LoadError: As for ``Engine``, before anything is started; a cluster that is not there.
        Co3dError: Ray did not start.
    """
    if replicas < 1 or gateways < 1:
        raise UsageError("There must be at least one replica and one gateway.")
    if address is not None:
        _knock(address)
    Engine(model, options).session.close()  # what is wrong with the model is said here, not in a log
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _start_ray(address, replicas * options.threads + gateways + 1)
        where = "HeadOnly" if address is None else "EveryNode"
        serve.start(http_options={"host": host, "port": port, "location": where})
        logs = {"log_level": "WARNING", "enable_access_log": False}
        serve.run(application(model, replicas, options, gateways), name=APP, route_prefix="/", logging_config=logs)
        node = ray.nodes()[0]
    except (RayError, RayServeException, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0][:300]
        hint = "Its logs are in /tmp/ray/session_latest/logs; a machine that is too busy is a common cause."
        raise Co3dError(f"Ray Serve did not start: {first}.", hint=hint) from error
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _start_ray(address: str | None, cores: int) -> None:
    """Connects to a cluster, or starts one on this machine with at least so many cores to give away."""
    quiet: JsonObject = {"log_to_driver": False, "configure_logging": False, "namespace": APP}
    if address is None:
        cores = max(os.cpu_count() or 1, cores)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
    else:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise _no_cluster(address) from error


def _knock(address: str) -> None:
    """Raises UsageError if nobody listens there: Ray would try again for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> UsageError:
    return UsageError(f"There is no Ray cluster at {address}.", hint="Start it with 'ray start'.")


def stop() -> None:
    """Stops serving; streams are saved first. A cluster that ``start`` began ends too.

    Ray waits without end for a process of its own that does not answer. After ``STOPPED`` seconds all its processes
    that come from this one are killed, and this one ends with exit code 1.
    """
    if not ray.is_initialized():
        return
    limit = threading.Timer(STOPPED, _kill)  # not cancelled: Ray also waits when the interpreter ends
    limit.daemon = True
    limit.start()
    try:
        serve.shutdown()
    finally:
        ray.shutdown()


def _kill() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    lost = "Streams that were not saved go on from their last snapshot."
    os.write(2, f"error: Ray did not stop within {STOPPED:.0f} seconds and was killed. {lost}\n".encode())
    os._exit(1)
