"""``co3d serve MODEL.onnx``: many streams over HTTP and WebSocket, on Ray Serve."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from co3d_compile.cli.common import (
    COUNT,
    FILE,
    FOLDER,
    LIMITS,
    PLACE,
    Command,
    Options,
    Stopped,
    json_option,
    option,
    plain_option,
    print_json,
    stderr,
    stdout,
    stoppable,
    verbose_option,
)
from co3d_compile.cli.picture_options import NOT_SAID
from co3d_compile.cli.progress import Progress
from co3d_compile.contract.model_contract import Contract
from co3d_compile.errors import LoadError, UnsupportedError, UsageError
from co3d_compile.media.video_steps import Pictures
from co3d_compile.runtime.stored_metadata import read_contract
from co3d_compile.serve.options import ServeOptions
from co3d_compile.support.readable_numbers import plural

EPILOG = """\b
Examples:
    co3d serve model.onnx --replicas 2
    co3d serve model.onnx --replicas 8 --address auto \\
        --state-dir /mnt/shared/states --token-file token.txt
    curl -H 'Content-Type: image/jpeg' --data-binary @frame.jpg \\
        localhost:8000/v1/streams/door/frames/0?top=3

\b
Exit codes:
  1    a package is missing, or a bug; Ray does not start, or was killed
  2    wrong use of the command; the port is taken; there is no such cluster
  4    the model cannot be read
  5    the model's streams cannot share a run
  6    snapshots cannot be written
  130  stopped with Ctrl-C, the streams are saved (143: with SIGTERM)"""

DEFAULTS = ServeOptions()


def limit(name: str, kind: click.ParamType[Any], help: str, group: str = LIMITS, **more: Any) -> Any:
    """Makes an option whose default is that of ``ServeOptions``."""
    field = name.removeprefix("--").replace("-", "_")
    default = getattr(DEFAULTS, field)
    shown = default is not None
    return option(name, field, type=kind, default=default, show_default=shown, group=group, help=help, **more)


@click.command(cls=Command, name="serve", epilog=EPILOG)
@click.argument("model", type=FILE)
@option("--replicas", type=click.IntRange(1, 1000), default=1, show_default=True, group=PLACE, metavar="N",
        help="Processes that hold streams and run the model.")  # fmt: skip
@option("--gateways", type=click.IntRange(1, 100), default=1, show_default=True, group=PLACE, metavar="N",
        help="Processes that speak HTTP and WebSocket.")  # fmt: skip
@option("--host", default="127.0.0.1", show_default=True, group=PLACE, metavar="ADDRESS", help="Address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, group=PLACE,
        help="Port to listen on; 0: any that is free.")  # fmt: skip
@option("--address", metavar="HOST:PORT|auto", group=PLACE,
        help="A Ray cluster that runs. [default: one is started on this machine]")  # fmt: skip
@option("--state-dir", type=FOLDER, metavar="DIR", group=PLACE,
        help="Folder for snapshots, the same for all machines. [default: a temporary one; none on a cluster]",
)  # fmt: skip
@limit("--snapshot-every", COUNT, "Steps between two snapshots of a stream.", PLACE, metavar="STEPS")
@limit("--threads", COUNT, "CPU threads of one run.", PLACE)
@option("--provider", "providers", multiple=True, group=PLACE, metavar="NAME",
        help="ONNX Runtime execution provider, by falling priority. [default: CPUExecutionProvider]")  # fmt: skip
@limit("--max-batch", COUNT, "Streams that advance in one run of the model.", PLACE)
@limit("--wait-ms", click.FloatRange(min=0), "How long a frame waits for those of other streams.", PLACE)
@limit("--max-streams", COUNT, "Streams of one replica.")
@limit("--queue", COUNT, "Frames of one stream that wait.")
@limit("--max-fps", click.FloatRange(min=0, min_open=True), "Frames per second of one stream. [default: no limit]")
@limit("--max-bytes", COUNT, "Bytes of one frame.")
@limit("--max-pixels", COUNT, "Pixels of one picture.")
@limit("--idle", click.FloatRange(min=0, min_open=True), "Seconds after which a silent stream is dropped.")
@limit("--timeout", click.FloatRange(min=0, min_open=True), "Seconds within which a frame is answered or refused.")
@option("--token-file", type=FILE, group=LIMITS, metavar="FILE",
        help="A file with the token that every request must carry. [default: the variable CO3D_TOKEN, or none]",
)  # fmt: skip
@option("--open-metrics", is_flag=True, group=LIMITS, help="/metrics, for Prometheus, needs no token.")
@plain_option
@json_option
@verbose_option
def command(model: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Serve a compiled model to many streams.

    Frames go in over HTTP or WebSocket, as JPEG, PNG or raw, and answers come out. The replica that a stream belongs to
    holds its state, and runs the frames of its streams together. Serves until it is stopped.
    """
    path = model.resolve()
    if not path.is_file():
        raise LoadError(f"There is no file {model}.")
    with contextlib.ExitStack() as stack:
        more = {"token": _token(options), "layout": options["model_layout"], "state_dir": _state_dir(options, stack)}
        settings = ServeOptions.of({**options, "providers": tuple(options["providers"]), **more})
        port = _port(options["host"], options["port"])
        from co3d_compile.serve import cluster

        try:
            with Progress(verbose) as progress:
                progress("start")
                prometheus = cluster.start(
                    str(path), options["replicas"], settings, host=options["host"], port=port,
                    gateways=options["gateways"], address=options["address"],
                )  # fmt: skip
            if note := about_pictures(read_contract(path)):
                click.echo(note, file=stderr())
            _say(as_json, f"http://{options['host']}:{port}", prometheus, options["replicas"], settings)
            with _watching(options["replicas"]), stoppable():  # Ray has set signal handlers of its own
                while True:
                    time.sleep(1)  # not signal.pause: it would miss a signal that comes right before it
        except (Stopped, SystemExit) as stopped:  # Ray's own handler of SIGTERM leaves by SystemExit
            click.echo("finishing …", file=stderr())
            number = stopped.number if isinstance(stopped, Stopped) else signal.SIGTERM
            raise Stopped(number, "the streams are saved" if options["state_dir"] else "it has ended") from None
        finally:
            cluster.stop()


@contextlib.contextmanager
def _watching(replicas: int) -> Iterator[None]:
    """Says on stderr what becomes of the shards, from a thread: the main one hears signals."""
    from co3d_compile.serve import cluster
    from co3d_compile.serve.watch import Watch

    end, file = threading.Event(), stderr()

    def say(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            click.echo(f"{time.strftime('%H:%M:%S')}  {line}", file=file)

    work = partial(Watch().work, lambda: cluster.watched(replicas), say, end)
    thread = threading.Thread(target=work, name="watches the shards", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(cluster.LOOK)


def about_pictures(info: Contract) -> str | None:
    """What to say of a model that takes pictures, and whose file does not say how they are prepared."""
    if info.preprocess is not None:
        return None
    try:
        Pictures(info)
    except UnsupportedError:
        return None
    return f"{NOT_SAID}."


def _say(as_json: bool, url: str, prometheus: str, replicas: int, settings: ServeOptions) -> None:
    if as_json:
        facts = {"url": url, "prometheus": prometheus, "replicas": replicas, "pid": os.getpid()}
        print_json({**facts, "state_dir": settings.state_dir})
    else:
        room = f"{plural(replicas, 'replica')} for {plural(replicas * settings.max_streams, 'stream')}"
        where = f"snapshots in {settings.state_dir}" if settings.state_dir else "no snapshots"
        click.echo(f"Serving at {url}: {room}, {where}.", file=stdout())
        click.echo(f"Prometheus metrics at {url}/metrics, and of Ray itself at {prometheus}.", file=stdout())
        click.echo("Stop with Ctrl-C.", file=stdout())
    stdout().flush()


def _token(options: Options) -> str | None:
    """Computes the digest of the token: the token itself goes no further than this process."""
    token = os.environ.get("CO3D_TOKEN", "")
    if options["token_file"] is not None:
        try:
            token = options["token_file"].read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"The token cannot be read: {error}.") from error
        if not token:
            raise UsageError(f"{options['token_file']} holds no token.")
    return hashlib.sha256(token.encode()).hexdigest() if token else None


def _state_dir(options: Options, stack: contextlib.ExitStack) -> str | None:
    if options["state_dir"] is not None:
        return str(options["state_dir"].resolve())
    if options["address"] is not None:
        return None  # a folder of this machine is of no use to the others
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="co3d-serve-"))


def _port(host: str, port: int) -> int:
    """Gives the port, if it is free, or one that is."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"Cannot listen on {host}:{port}: {error.strerror}.", hint="Give another --port or --host."
            ) from error
        return int(probe.getsockname()[1])
