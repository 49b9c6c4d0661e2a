"""A Triton model repository: Triton's own protobuf reads it, and its sequence batcher gives each stream its numbers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from sequence_batcher import Request, Server, parse
from target_kinds import compiled_kind

import co3d_compile as co3d
from co3d_compile.cli.main import main as group
from co3d_compile.contract.model_contract import Contract, InputSpec, OutputSpec, StateSpec
from co3d_compile.targets.triton_repository import Options, config

pytestmark = pytest.mark.slow

ROWS = (
    "past entries",
    "exact ends",
    "exact ends of pools",
    "recurrent",
    "several rates",
    "several outputs",
    "loop with a first turn",
    "region with a period",
    "start of its own",
)


def export(*arguments: object) -> Any:
    return CliRunner().invoke(group, ["export", *map(str, arguments)])


def repository(tmp_path: Path, row: str, *arguments: object) -> Path:
    compiled_kind(row).save(tmp_path / "model.onnx")
    result = export(tmp_path / "model.onnx", "--triton", tmp_path / "repository", *arguments)
    assert result.exit_code == 0, result.stderr
    return tmp_path / "repository" / "model"


def sequence(info: Contract, steps: int, seed: int) -> list[dict[str, Any]]:
    """The inputs of one stream; with flags, the last steps are beyond its end."""
    generator = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        values = {i.name: generator.standard_normal((1, *i.shape[1:])).astype(i.dtype) for i in info.inputs}
        if info.valid is not None:
            values[info.valid] = np.full((1, info.inputs[0].frames_per_step or 1), step < steps - info.flush_steps)
        rows.append(values)
    return rows


def alone(compiled: Any, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What a session of its own gives for a stream."""
    session = co3d.StreamSession(compiled, threads=1)
    results = []
    for row in rows:
        valid = row.get(session.info.valid) if session.info.valid else None
        result = session.step([row[i.name] for i in session.info.inputs], valid=valid)
        results.append(result if isinstance(result, tuple) else (result,))
    return results


@pytest.mark.parametrize("strategy", ["oldest", "direct"])
@pytest.mark.parametrize("network", ROWS)
def test_interleaved_sequences(network: str, strategy: str, tmp_path: Path) -> None:
    """Seven streams on three slots, at random, one id used twice: each gives what it gives alone."""
    compiled = compiled_kind(network)
    server = Server(repository(tmp_path, network, "--strategy", strategy, "--max-batch", 3))
    chance = random.Random(0)
    least = compiled.info.flush_steps + 2
    streams = {k: sequence(compiled.info, least + chance.randrange(6), k) for k in range(7)}
    ids = {k: 100 + k % 6 for k in streams}
    sent = dict.fromkeys(streams, 0)
    owner: dict[int, int] = {}
    got: dict[int, list[tuple[Any, ...]]] = {k: [] for k in streams}
    while any(len(got[k]) < len(streams[k]) for k in streams):
        for k, rows in streams.items():
            free = owner.get(ids[k], k) == k
            if free and sent[k] < len(rows) and sent[k] - len(got[k]) < 2 and chance.random() < 0.6:
                owner[ids[k]] = k
                server.send(Request(ids[k], sent[k] == 0, sent[k] == len(rows) - 1, rows[sent[k]]))
                sent[k] += 1
        for request, results in server.work():
            k = owner[request.sequence]
            got[k].append(tuple(results[o.name] for o in compiled.info.outputs))
            if request.end:
                del owner[request.sequence]
    assert max(server.sizes) == 3 and not server.states
    for k, rows in streams.items():
        for actual, expected in zip(got[k], alone(compiled, rows), strict=True):
            for one, other in zip(actual, expected, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4 * (float(np.std(other)) or 1.0))


def as_message(text: str) -> Any:
    protobuf = pytest.importorskip("google.protobuf.text_format")
    module = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    return protobuf.Parse(text, module.ModelConfig())


@pytest.mark.parametrize("arguments", [[], ["--strategy", "direct", "--device", "gpu", "--instances", 2]])
@pytest.mark.parametrize("network", ROWS)
def test_tritons_own_protobuf_reads_it(network: str, arguments: list[object], tmp_path: Path) -> None:
    folder, info = repository(tmp_path, network, *arguments), compiled_kind(network).info
    message = as_message((folder / "config.pbtxt").read_text())
    ours = parse((folder / "config.pbtxt").read_text())
    assert (message.name, message.platform, message.max_batch_size) == ("model", "onnxruntime_onnx", 8)
    batching = message.sequence_batching
    assert batching.WhichOneof("strategy_choice") == ("direct" if arguments else "oldest")
    assert [(s.input_name, s.output_name, list(s.dims)) for s in batching.state] == [
        (s.input, s.output, list(s.shape[1:])) for s in info.states
    ]
    assert [len(s.initial_state) for s in batching.state] == [1] * len(info.states)
    assert [list(i.dims) for i in message.input] == [i["dims"] for i in ours["input"]]
    assert [list(o.dims) for o in message.output] == [o["dims"] for o in ours["output"]]
    assert message.parameters["co3d.warmup_steps"].string_value == str(info.warmup_steps)
    kinds = {message.instance_group[0].KIND_CPU: "cpu", message.instance_group[0].KIND_GPU: "gpu"}
    assert kinds[message.instance_group[0].kind] == ("gpu" if arguments else "cpu")


# --- contracts that no network of the zoo has -------------------------------------------------------------------------


def contract(**changes: Any) -> Contract:
    parts: dict[str, Any] = {
        "compiler_version": "1",
        "inputs": (InputSpec("x", ("N", 3, 8), "float32", 1, 2), InputSpec("gain", ("N",), "float64", None, None)),
        "outputs": (OutputSpec("y", ("N", 4), "float16", 1, False, None, 1),),
        "states": (StateSpec('state."a".0', "next.a", ("N", 2), "int64", 0.0, 0),),
        "frames_per_step": {"x": 1},
        "receptive_field": None,
        "warmup_steps": 2,
    }
    return Contract(**{**parts, **changes})


def test_numbers_without_dims_and_odd_names() -> None:
    text = config(contract(), "m", Options())
    gain = parse(text)["input"][1]
    assert (gain["dims"], gain["reshape"], gain["data_type"]) == ([1], {}, "TYPE_FP64")
    message = as_message(text)
    assert message.sequence_batching.state[0].input_name == 'state."a".0'


def test_a_model_without_state_needs_no_sequences() -> None:
    text = config(contract(states=()), "m", Options())
    assert "sequence_batching" not in text and "dynamic_batching" in parse(text)
    as_message(text)


def test_a_batch_of_one() -> None:
    fixed = {
        "inputs": (InputSpec("x", (1, 3, 8), "float32", 1, 2),),  # type: ignore[dict-item]
        "outputs": (OutputSpec("y", (1, 4), "float32", 1, False, None, 1),),
        "states": (StateSpec("state", "next", (1, 2), "float32", 0, 0),),
    }
    parsed = parse(config(contract(**fixed), "m", Options()))
    assert (parsed["max_batch_size"], parsed["input"][0]["dims"]) == (0, [1, 3, 8])
    assert parsed["sequence_batching"]["state"][0]["dims"] == [1, 2]


RENAMED = (StateSpec("s0", "next", ("N", 2), "float32", 0, 0), StateSpec("s1", "s0", ("N", 2), "float32", 0, 0))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "renamed": ({"states": RENAMED}, "--state-io paired"),
    "batch elsewhere": ({"outputs": (OutputSpec("y", (4, "N"), "float32", 1, False, None, 1),)}, "dim 0"),
    "fixed batch": (
        {
            "inputs": (InputSpec("x", (2, 3, 8), "float32", 1, 2),),
            "outputs": (OutputSpec("y", (2, 4), "float32", 1, False, None, 1),),
            "states": (StateSpec("state", "next", (2, 2), "float32", 0, 0),),
        },
        "a batch of one",
    ),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_triton_cannot_hold(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(co3d.UnsupportedError, match=says):
        config(contract(**changes), "m", Options())


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Options)])
def test_bad_options(name: str) -> None:
    with pytest.raises(co3d.UsageError, match=name):
        Options(**{name: -1})


# --- the command ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], int, str]] = {
    "no model": (["nothing.onnx", "--triton", "r"], 4, "no file"),
    "no repository": (["m.onnx"], 2, "--triton"),
    "bad name": (["m.onnx", "--triton", "r", "--name", "a/b"], 2, "no name for a model"),
    "no batch": (["m.onnx", "--triton", "r", "--max-batch", "0"], 2, "--max-batch"),
    "a file in the way": (["m.onnx", "--triton", "m.onnx/r"], 6, "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), BAD.values(), ids=BAD)
def test_bad_calls(arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled_kind("past entries").save("m.onnx")
    result = export(*arguments)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and says in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_is_there_already_stays(tmp_path: Path) -> None:
    folder = repository(tmp_path, "past entries")
    before = (folder / "config.pbtxt").read_bytes()
    result = export(tmp_path / "model.onnx", "--triton", folder.parent, "--max-batch", 2)
    assert result.exit_code == 6 and "there already" in result.stderr
    assert (folder / "config.pbtxt").read_bytes() == before
    other = export(tmp_path / "model.onnx", "--triton", folder.parent, "--name", "other", "--json")
    assert json.loads(other.stdout)["folder"] == str(folder.parent / "other")
    assert {path.name for path in folder.parent.iterdir()} == {"model", "other"}


def test_weights_beside_the_file_go_along(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load_from_string(compiled_kind("past entries").to_bytes())
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=512)
    assert export(path, "--triton", tmp_path / "r").exit_code == 0
    assert (tmp_path / "r" / "model" / "1" / "model.onnx.data").exists()
    Server(tmp_path / "r" / "model")


# --- the client example -----------------------------------------------------------------------------------------------


def serve(folder: Path) -> tuple[Any, int]:
    """Triton's gRPC service on loopback, as far as the client needs it, with the sequence batcher behind it."""
    grpc = pytest.importorskip("grpc")
    service = pytest.importorskip("tritonclient.grpc.service_pb2_grpc", reason="tritonclient[grpc] is not installed")
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.utils import triton_to_np_dtype

    batcher = Server(folder)

    class Service(service.GRPCInferenceServiceServicer):  # type: ignore[misc, name-defined]
        def ModelConfig(self, request: Any, _: Any) -> Any:
            return messages.ModelConfigResponse(config=as_message((folder / "config.pbtxt").read_text()))

        def ModelInfer(self, request: Any, _: Any) -> Any:
            given = {
                item.name: np.frombuffer(raw, triton_to_np_dtype(item.datatype)).reshape(item.shape)
                for item, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            flags = request.parameters
            start, end = flags["sequence_start"].bool_param, flags["sequence_end"].bool_param
            batcher.send(Request(flags["sequence_id"].int64_param, start, end, given))
            ((_, results),) = batcher.work()
            response = messages.ModelInferResponse(model_name=request.model_name)
            for name, value in results.items():
                response.outputs.add(name=name, datatype="FP32", shape=value.shape)
                response.raw_output_contents.append(value.tobytes())
            return response

    server = grpc.server(futures.ThreadPoolExecutor(1))
    service.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def test_the_client_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, compiled = repository(tmp_path, "past entries"), compiled_kind("past entries")
    server, port = serve(folder)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import triton_client
    from tritonclient.grpc import InferenceServerClient

    rows = sequence(compiled.info, compiled.info.warmup_steps + 4, 0)
    expected = alone(compiled, rows)[compiled.info.warmup_steps :]
    (output,) = (o.name for o in compiled.info.outputs)
    make: Callable[[], Any] = lambda: (row[compiled.info.inputs[0].name][0] for row in rows)  # noqa: E731
    with InferenceServerClient(f"127.0.0.1:{port}") as client:
        for number in (1, 2):
            results = list(triton_client.stream(client, "model", make(), number))
            np.testing.assert_allclose([r[output] for r in results], [e[0][0] for e in expected], atol=1e-5)
    server.stop(None)
