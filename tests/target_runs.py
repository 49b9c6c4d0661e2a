"""Each target as a function: from a compiled model and the inputs of each step to the results of each step."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from sequence_batcher import Request, Server
from target_job import (
    Job,
    Results,
    aot_inductor,
    eager,
    exported,
    half_states,
    in_a_session,
    in_this_machines_layout,
    int8,
    native,
    positional,
    renamed,
    twice,
)
from target_readers import EXAMPLES, Missing, Refusal, cpp, node, run, wasm, web_packages

from co3d_compile.targets import litert
from co3d_compile.targets.triton_repository import write_repository

FULL = 1e-4  # standard deviations of the results
PROVIDER = "OpenVINOExecutionProvider"


def executorch(job: Job) -> Results:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = job.model.to_exported_program(batch=job.batch, executorch=True)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (job.folder / "step.pte").write_bytes(edge.to_executorch().buffer)
    loaded = Runtime.get().load_program(job.folder / "step.pte")  # a method does not keep its program alive
    method = loaded.load_method("forward")
    return positional(job, lambda *args: method.execute(args))


# --- other runtimes -------------------------------------------------------------------------------------------------


def litert_file(job: Job) -> Results:
    options = litert.Options(batch=job.batch, tensors="channels-last")
    path = litert.write_tflite(job.file(), job.info, job.folder / "model.tflite", options=options)
    sys.path.insert(0, str(EXAMPLES / "litert"))
    from stream import Stream

    try:
        stream = Stream(str(path))
    except ValueError as error:
        raise Refusal(str(error)) from error
    last = stream.info["channels_last"]

    def run() -> Results:
        stream.reset()
        results = []
        for step in job.steps:
            frames = [np.moveaxis(x, 1, -1) if last and x.ndim == 4 else x for x in job.frames(step)]
            flags = job.flags(step)
            values = stream.step(*frames, valid=True if flags is None else flags)
            results.append(tuple(np.moveaxis(x, -1, 1) if last and x.ndim == 4 else x for x in values))
        return results

    return twice(run)


def openvino_provider(job: Job) -> Results:
    options = {"device_type": "CPU", "precision": "FP32"}
    return in_a_session(job, providers=[(PROVIDER, options)], layout="auto")


def openvino(job: Job, **options: Any) -> Results:
    sys.path.insert(0, str(EXAMPLES))
    from openvino_stateful import OpenVINOStream

    try:
        stream = OpenVINOStream(job.file(), job.batch, threads=1, **options)
    except ValueError as error:
        raise Refusal(str(error)) from error

    def run() -> Results:
        stream.reset()
        return [stream.step(*job.frames(step), valid=job.flags(step)) for step in job.steps]

    return twice(run)


def openvino_states_outside(job: Job) -> Results:
    return openvino(job, stateful=False)


def openvino_bfloat16(job: Job) -> Results:
    return openvino(job, stateful=False, precision="bf16")


def reader(command: Callable[[], list[str]]) -> Callable[[Job], Results]:
    """A reader in another language: frames of all steps in a file, results in another."""

    def call(job: Job) -> Results:
        source, target = job.folder / "frames.bin", job.folder / "results.bin"
        source.write_bytes(b"".join(x.tobytes() for step in job.steps for x in job.frames(step)))
        done = run(command(), job.file(), source, target, job.batch)
        if done.returncode:
            raise Refusal(done.stderr)
        return _split(job, target.read_bytes())

    return call


def _split(job: Job, content: bytes) -> Results:
    results, at = [], 0
    for _ in job.steps:
        row = []
        for spec in job.info.outputs:
            shape = [job.batch if size == "N" else int(size) for size in spec.shape]
            values = np.frombuffer(content, spec.dtype, int(np.prod(shape)), at)
            at += values.nbytes
            row.append(values.reshape(shape))
        results.append(tuple(row))
    assert at == len(content)
    return results


# --- servers --------------------------------------------------------------------------------------------------------


def triton(job: Job) -> Results:
    """Each stream of the batch is a sequence; their requests wait together."""
    server = Server(write_repository(job.file(), job.info, job.folder / "repository"))
    results = []
    for number, step in enumerate(job.steps):
        first, last = number == 0, number == len(job.steps) - 1
        for k in range(job.batch):
            server.send(Request(100 + k, first, last, {name: x[k : k + 1] for name, x in step.items()}))
        answers = [dict(values) for _, values in server.work()]
        assert len(answers) == job.batch
        results.append(tuple(np.concatenate([a[o.name] for a in answers]) for o in job.info.outputs))
    return results


def served(job: Job) -> Results:
    """A shard of ``co3d serve``: the frames of each stream of the batch, and their ends."""
    from co3d_compile.serve.engine import Engine
    from co3d_compile.serve.options import ServeOptions
    from co3d_compile.serve.shard import Shard

    options = ServeOptions(max_streams=job.batch, layout="plain")
    engine = Engine(job.model, options)

    async def work() -> list[Results]:
        shard = Shard(engine, options)
        shard.start()
        try:
            return list(
                await asyncio.gather(*(_one_stream(job, shard, engine.pulse.frames, k) for k in range(job.batch)))
            )
        finally:
            await shard.close()

    streams = asyncio.run(work())
    dims = [list(spec.shape).index("N") for spec in job.info.outputs]
    return [
        tuple(np.concatenate(parts, dim) for parts, dim in zip(zip(*rows, strict=True), dims, strict=True))
        for rows in zip(*streams, strict=True)
    ]


async def _one_stream(job: Job, shard: Any, frames: int, k: int) -> Results:
    """The results of one stream: its frames one by one, each input's at its rate."""
    from co3d_compile.serve.engine import TENSOR
    from co3d_compile.serve.stream import Frame

    replies, number = [], 0
    for step in job.steps:
        flags = job.flags(step)
        for i in range(frames):
            payload = b""
            for spec, x in zip(job.info.inputs, job.frames(step), strict=True):
                own = x[k : k + 1]
                pulse = spec.frames_per_step or 1
                payload += (own if pulse == 1 else own.take(i * pulse // frames, spec.time_dim)).tobytes()
            if flags is not None and not flags[k, i * flags.shape[1] // frames]:
                continue
            reply = await shard.frame(Frame(stream=f"s{k}", number=number, kind=TENSOR, payload=payload))
            number += 1
            replies += [reply] if reply["status"] == 200 else []
            assert reply["status"] in (200, 202), reply
    replies += (await shard.end(f"s{k}"))["flushed"]
    pairs = [list(zip(reply["outputs"].values(), job.info.outputs, strict=True)) for reply in replies]
    return [tuple(np.asarray(values, spec.dtype) for values, spec in row) for row in pairs]


# --- the table ------------------------------------------------------------------------------------------------------


def _package(*names: str) -> Callable[[], str]:
    return lambda: ", ".join(f"{name} {version(name)}" for name in names)


def _npm(package: Callable[[], Path]) -> Callable[[], str]:
    def found() -> str:
        file = package() / "package.json"
        if not file.exists():
            raise Missing(f"{package().name} is not installed")
        data = json.loads(file.read_text())
        return f"{data['name']} {data['version']}, Node.js {run(['node', '--version']).stdout.strip().lstrip('v')}"

    return found


def _cpp() -> str:
    cpp()
    return f"onnxruntime {ort.__version__}, {run(['g++', '--version']).stdout.splitlines()[0]}"


def _ours() -> str:
    return f"onnxruntime {ort.__version__}"


@dataclass(frozen=True)
class Target:
    """A way to run a compiled model.

    Attributes:
        word: By which its errors call it.
        call: Runs one.
        version: Of what runs it.
        needs: Import names of packages that it needs.
        limit: How far its results may be off, in standard deviations of the plain file's.
        ends: Whether it can say which frames are there, with exact ends.
        long: Whether each model takes it many seconds.
    """

    word: str
    call: Callable[[Job], Results]
    version: Callable[[], str] = _ours
    needs: Sequence[str] = ()
    limit: float = FULL
    ends: bool = True
    long: bool = False

    def check(self) -> None:
        """Raises Missing where something is not installed."""
        for name in self.needs:
            if importlib.util.find_spec(name) is None:
                raise Missing(f"{name} is not installed")
        if self.call is aot_inductor and shutil.which("g++") is None:
            raise Missing("AOTInductor needs a C++ compiler: g++ is not there")
        if self.call is openvino_provider and PROVIDER not in ort.get_available_providers():
            raise Missing("needs onnxruntime-openvino")
        try:
            self.version()
        except PackageNotFoundError as error:
            raise Missing(str(error)) from error


TARGETS: dict[str, Target] = {
    "StreamSession": Target("session", in_a_session),
    "StreamSession, this machine's layout": Target("session", in_this_machines_layout),
    "`--native`": Target("native", native),
    "`--state-io renamed`": Target("renamed", renamed),
    "float16 states": Target("half-states", half_states, limit=2e-2),
    "8 bits": Target("int8", int8, limit=0.5),
    "PyTorch, eager": Target("to_module", eager, _package("torch")),
    "`torch.export` archive": Target("to_exported_program", exported, _package("torch")),
    "AOTInductor": Target("to_exported_program", aot_inductor, _package("torch"), long=True),
    "ExecuTorch, XNNPACK": Target("to_exported_program", executorch, _package("executorch"), ("executorch",)),
    "LiteRT, XNNPACK": Target(
        "LiteRT", litert_file, _package("litert-torch", "ai-edge-litert"), ("litert_torch", "ai_edge_litert")
    ),
    "ONNX Runtime with OpenVINO": Target(
        "OpenVINO", openvino_provider, lambda: f"onnxruntime-openvino {ort.__version__}"
    ),
    "OpenVINO, its own states": Target("OpenVINO", openvino, _package("openvino"), ("openvino",)),
    "OpenVINO, states outside": Target("OpenVINO", openvino_states_outside, _package("openvino"), ("openvino",)),
    "OpenVINO, bfloat16": Target("OpenVINO", openvino_bfloat16, _package("openvino"), ("openvino",), limit=0.1),
    "Node.js": Target(
        "reader", reader(node), _npm(lambda: EXAMPLES / "node/node_modules/onnxruntime-node"), ends=False
    ),
    "Browser's WebAssembly": Target(
        "reader", reader(wasm), _npm(lambda: web_packages() / "onnxruntime-web"), ends=False
    ),
    "C++": Target("reader", reader(cpp), _cpp, ends=False),
    "Triton's batcher": Target("Triton", triton),
    "`co3d serve`": Target("co3d serve", served, _package("ray"), ("ray",)),
}
