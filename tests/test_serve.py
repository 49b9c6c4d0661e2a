"""``co3d serve`` on Ray Serve: two replicas, 64 streams, one replica killed; limits; stop and start again.

Every stream is compared with a plain session that is fed the same frames.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.cli.main import main as group
from co3d_compile.media import write_video

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("websockets", reason="websockets is not installed")
from serving import BEARER, PATIENCE, TOKEN, Reply, Server, alive, family

from co3d_compile.serve.store import SnapshotStore
from co3d_compile.serve.stream import shard_of

ROOT = Path(__file__).parents[1]


@cache
def compiled() -> Any:
    entry = SMALL["p3d"]
    return co3d.compile(entry.build(), entry.examples(), preprocess={"mean": 0.4, "std": 0.2})


def film(seed: int, count: int) -> list[np.ndarray]:
    info = compiled().info
    shape = [1 if dim == "N" else int(dim) for dim in info.inputs[0].shape]
    return list(np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32))


def check(answers: list[Reply], frames: list[np.ndarray], session: co3d.StreamSession) -> None:
    """Every answer against a session that is fed the frames since the stream began, or began afresh."""
    expected: dict[tuple[int, int], Any] = {}
    for started in {answer["started"] for answer in answers}:
        session.reset()
        for number, frame in enumerate(frames[started:], started):
            expected[started, number] = session.step(frame)
    for answer in answers:
        (values,) = answer["outputs"].values()
        np.testing.assert_allclose(values, expected[answer["started"], answer["frame"]], rtol=1e-4, atol=1e-4)
        assert answer["step"] == answer["frame"] - answer["started"]
        assert answer["warm"] == (answer["step"] >= session.info.warmup_steps)


def a_replica_that_is_killed(server: Server) -> None:
    """All go on exactly, but for those whose snapshot is lost or whose client has kept too little: these are told."""
    count, length, killed_at = 64, 24, 12
    films = {f"camera-{n}": film(n, length) for n in range(count)}
    on_shard = {name: shard_of(name, 2) for name in films}
    without = [name for n, name in enumerate(films) if n % 8 == 0 and on_shard[name] == 0]  # their snapshots go too
    heard: dict[str, list[Reply]] = {name: [] for name in films}
    _, before = server.metrics()
    killed = asyncio.Event()

    async def one(number: int, name: str) -> None:
        frames = (frame.tobytes() for frame in films[name])
        keep = 1 if number % 4 == 0 else 256
        async for message in server.stream(name, frames, keep=keep, format="tensor", patience=PATIENCE):
            heard[name].append(message)
            if message.get("frame") == killed_at:
                await killed.wait()  # all are in the middle when it happens

    async def kill() -> None:
        while min(len(messages) for messages in heard.values()) <= killed_at:
            await asyncio.sleep(0.05)
        for name in films:  # snapshots are written in the background
            while (await asyncio.to_thread(server.ask, f"/v1/streams/{name}"))[1]["saved"] is None:
                await asyncio.sleep(0.05)
        os.kill(before["shard-0"]["pid"], signal.SIGKILL)
        while alive(before["shard-0"]["pid"]):
            await asyncio.sleep(0.01)
        for name in without:  # nobody asks for them before the event
            for path in Path(server.facts["state_dir"]).glob("*"):
                SnapshotStore(path).remove(name)
        killed.set()

    async def main() -> None:
        await asyncio.gather(kill(), *(one(number, name) for number, name in enumerate(films)))

    asyncio.run(asyncio.wait_for(main(), 3 * PATIENCE))
    session = co3d.StreamSession(compiled(), threads=1)
    told = []
    for number, (name, messages) in enumerate(heard.items()):
        assert messages[-1]["type"] == "ended" and messages[-1]["last"] == length - 1
        answers = [message for message in messages if message["type"] == "answer"]
        assert {answer["shard"] for answer in answers} == {f"shard-{on_shard[name]}"}
        restarts = [message for message in messages if message["type"] == "restarted"]
        given = [answer["frame"] for answer in answers] + [m["frame"] for m in messages if m["type"] == "missing"]
        assert sorted(given) == list(range(length)), "each frame has its answer, or is said to have none"
        check(answers, films[name], session)
        if on_shard[name] == 1 or number % 4:
            assert not restarts
        assert len({answer["epoch"] for answer in answers}) == 1 + len(restarts)
        told += [name] * len(restarts)
    assert without and set(without) <= set(told) and len(set(told)) == len(told)
    read, after = server.metrics()
    assert after["shard-0"]["pid"] != before["shard-0"]["pid"] and after["shard-1"]["pid"] == before["shard-1"]["pid"]
    assert after["shard-0"]["counts"]["restored"] >= list(on_shard.values()).count(0) - len(told) > 0
    assert read["streams"] == read["waiting"] == 0


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def pictures_over_http(server: Server) -> None:
    pictures = [jpeg(n) for n in range(4)]
    predictor = co3d.Predictor(compiled(), threads=1, activation="none")
    for number, picture in enumerate(pictures):
        path = f"/v1/streams/a%20door/frames/{number}?top=2"
        status, reply = server.ask(path, picture, **{"Content-Type": "image/jpeg"})
        assert (status, reply["stream"], reply["frame"], len(reply["top"])) == (200, "a door", number, 2)
        image = np.asarray(Image.open(io.BytesIO(picture)))
        expected = predictor.session.step(predictor.preprocess[0](image))
        (values,) = reply["outputs"].values()
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    assert server.ask("/v1/streams/a%20door")[1]["expected"] == 4
    assert server.ask("/v1/streams/a%20door", method="DELETE")[1]["last"] == 3
    assert server.ask("/v1/streams/a%20door")[0] == 404


def what_http_refuses(server: Server) -> None:
    post = {"Content-Type": "application/octet-stream"}
    frame = film(0, 1)[0].tobytes()
    assert server.ask("/v1/model", Authorization="Bearer another")[0] == 401
    assert server.ask("/v1/health", Authorization="")[0] == 200
    assert server.ask("/v1/streams/x/frames/0", b"0" * 50_001, **post)[0] == 413
    assert server.ask("/v1/streams/x/frames/0", b"0", **post)[0] == 400
    assert server.ask("/v1/streams/x/frames/0", frame, **{"Content-Type": "text/plain"})[0] == 415
    assert server.ask("/v1/streams/x/frames/0?top=many", frame, **post)[0] == 400
    assert server.ask("/v1/streams/x/frames/0?color=red", frame, **post)[0] == 400
    assert server.ask("/v1/streams/y/frames/7", frame, **post)[1]["code"] == "unknown"
    assert server.ask("/v1/streams/x/frames/0", frame, **post)[0] == 200
    status, reply = server.ask("/v1/streams/x/frames/5", frame, **post)
    assert (status, reply["code"], reply["expected"]) == (409, "gap", 1)
    status, reply = server.ask("/v1/streams/x/frames/5?on_gap=restart", frame, **post)
    assert (status, reply["restart"], reply["started"], reply["warm"]) == (200, "gap", 5, False)


def a_stream_that_falls_silent(server: Server) -> None:
    """On a server that lets streams idle for a few seconds only."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed, InvalidStatus

    url = server.url.replace("http", "ws") + "/v1/streams/socket?format=tensor"
    frame = film(0, 1)[0].tobytes()

    async def main() -> None:
        with pytest.raises(InvalidStatus):
            await connect(url)
        async with connect(url, subprotocols=["co3d", f"token.{TOKEN}"]) as socket:  # type: ignore[list-item]
            hello = json.loads(await socket.recv())
            assert (hello["type"], hello["window"], hello["code"]) == ("hello", 4, "unknown")
        async with connect(url + "&start=1", additional_headers=BEARER) as socket:
            await socket.recv()
            await socket.send((0).to_bytes(8) + frame)
            assert json.loads(await socket.recv())["frame"] == 0
            dropped = json.loads(await socket.recv())
            assert (dropped["type"], dropped["code"]) == ("dropped", "idle")
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd.code == 4408

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    status, reply = server.ask("/v1/streams/socket")
    assert (status, reply["reason"]) == (410, "idle")


def health_and_metrics(server: Server) -> None:
    read, shards = server.metrics()
    assert set(shards) == {"shard-0", "shard-1"} and read["max_streams"] == 128
    assert all(shard["latency_ms"]["p99"] >= shard["latency_ms"]["p50"] > 0 for shard in shards.values())
    deadline = time.monotonic() + PATIENCE
    while (status := server.ask("/v1/health"))[0] != 200:  # a shard that takes seconds to answer counts as ill
        assert time.monotonic() < deadline, status
    assert status[1]["shards"] == {"shard-0": True, "shard-1": True}
    _, model = server.ask("/v1/model")
    assert model["warmup_steps"] == compiled().info.warmup_steps and model["pictures"]
    wanted = {"co3d_events", "co3d_refused", "co3d_latency_ms_bucket", "co3d_run_ms_bucket", "co3d_batch_bucket"}
    while wanted:  # each process reports on its own, once a second
        with urllib.request.urlopen(server.facts["prometheus"], timeout=PATIENCE) as response:
            lines = [line for line in response.read().decode().splitlines() if 'shard="shard-' in line]
        wanted = {name for name in wanted if not any(name in line for line in lines)}
        assert time.monotonic() < deadline, wanted
        time.sleep(0.5)


def the_commands_on_the_page(server: Server) -> None:
    """What docs/serve.md shows, as it stands there but for the port."""
    page = (ROOT / "docs" / "serve.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(("curl", "python"))]
    assert len(lines) == 3
    folder = Path(server.facts["state_dir"]).parent / "page"
    folder.mkdir()
    (folder / "frame.jpg").write_bytes(jpeg(0))
    (folder / "examples").symlink_to(ROOT / "examples")
    pictures = [np.full((32, 48, 3), 20 * n, np.uint8) for n in range(9)]
    write_video(folder / "video.mp4", pictures, fps=10)
    environment = {**os.environ, "CO3D_TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = []
    for line in lines:
        command = line.replace("localhost:8000", server.url.removeprefix("http://"))
        command = command.replace("python", sys.executable)
        if "examples" in command:
            command += f" --url {server.url.replace('http', 'ws')}"
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert json.loads(outputs[0])["top"][0]["score"] > 0 and json.loads(outputs[1])["last"] == 0
    assert outputs[2].count("\n") == len(pictures) + 1 and "warming up" in outputs[2] and "ended" in outputs[2]


def a_stop_and_a_start(server: Server, limits: list[object]) -> None:
    """A stream goes on at the next server, which has the same folder; no process of the first one is left."""
    frames, post = film(7, 12), {"Content-Type": "application/octet-stream"}
    replies = [server.ask(f"/v1/streams/s/frames/{n}", frames[n].tobytes(), **post)[1] for n in range(5)]
    code, error = server.stop()
    lines = error.splitlines()
    assert code == 143 and "the streams are saved" in lines[-1] and "finishing …" in lines
    assert any("shard-0 died and is back as process" in line and "camera-" in line for line in lines[:-1]), error
    again = Server(server.model, Path(server.facts["state_dir"]), "--replicas", 1, *limits, patience=8)
    try:
        assert again.ask("/v1/streams/s")[1]["expected"] == 5
        replies += [again.ask(f"/v1/streams/s/frames/{n}", frames[n].tobytes(), **post)[1] for n in range(5, 12)]
        assert len({reply["epoch"] for reply in replies}) == 1
        check(replies, frames, co3d.StreamSession(compiled(), threads=1))
        a_stream_that_falls_silent(again)
        a_stop_that_ray_hangs_in(again)
    finally:
        again.stop()


def a_stop_that_ray_hangs_in(server: Server) -> None:
    """Where a process of Ray's does not answer, all of them are killed in the end."""
    (keeper,) = [pid for pid, line in family(server.process.pid).items() if "gcs_server" in line]
    os.kill(keeper, signal.SIGSTOP)
    code, error = server.stop()
    assert code == 1 and error.startswith("finishing …\nerror: Ray did not stop within 8 seconds")
    assert error.count("\n") == 2


@pytest.mark.slow
def test_co3d_serve(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """One server for all parts: it takes ten seconds to start."""
    compiled().save(tmp_path / "model.onnx")
    limits: list[object] = ["--max-bytes", 50_000, "--queue", 4, "--snapshot-every", 8]
    server = Server(tmp_path / "model.onnx", tmp_path / "states", "--replicas", 2, "--idle", 120, *limits)
    parts = (
        a_replica_that_is_killed,
        pictures_over_http,
        what_http_refuses,
        health_and_metrics,
        the_commands_on_the_page,
    )
    try:
        for part in parts:
            with subtests.test(part.__name__):
                part(server)
        with subtests.test("a_stop_and_a_start"):
            a_stop_and_a_start(server, [*limits, "--idle", 10])
    finally:
        server.stop()


BAD: dict[str, tuple[list[str], int, str]] = {
    "no model": (["nothing.onnx"], 4, "no file"),
    "no network": (["m.onnx", "--port", "0"], 4, "onnxruntime cannot open"),
    "no replicas": (["m.onnx", "--replicas", "0"], 2, "--replicas"),
    "no token": (["m.onnx", "--token-file", "token"], 4, "token"),
    "an empty token": (["m.onnx", "--token-file", "empty"], 2, "no token"),
    "no such cluster": (["m.onnx", "--address", "127.0.0.1:9"], 2, "no Ray cluster at 127.0.0.1:9"),
    "no such address": (["m.onnx", "--host", "192.0.2.77"], 2, "Cannot listen"),
    "endless idleness": (["m.onnx", "--idle", "inf"], 2, "idle"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), BAD.values(), ids=BAD)
def test_bad_calls(arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(b"no model")
    Path("empty").touch()
    result = CliRunner().invoke(group, ["serve", *arguments])
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and says in result.stderr
