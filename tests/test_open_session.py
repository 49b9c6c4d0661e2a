"""What opens as a session and what does not, and sessions that are closed or in use."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hand_made import (
    GOOD,
    ROOT,
    build,
    exact,
    fir,
    fir_oracle,
    fir_parts,
    frames,
    pair,
    run,
)
from layouts import session_layout  # noqa: F401  all tests here run in both

from co3d_compile.errors import Co3dError, ContractError, LoadError, SessionError, UsageError
from co3d_compile.runtime.session import StreamSession


class Compiled:
    def to_bytes(self) -> bytes:
        return fir()


def test_models_that_open(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside.onnx", tmp_path / "outside.onnx"
    inside.write_bytes(fir())
    onnx.save(
        onnx.load_from_string(fir()), outside, save_as_external_data=True, size_threshold=0, convert_attribute=True
    )
    assert len(list(tmp_path.iterdir())) == 3
    x = frames(4, 1, 2, 3)
    models: tuple[Any, ...] = (inside, str(inside), outside, fir(), bytearray(fir()), Compiled())
    for model in models:
        np.testing.assert_allclose(run(StreamSession(model, threads=1), x), fir_oracle(x), rtol=1e-5)


def test_info() -> None:
    info = StreamSession(pair()).info
    assert info.frames_per_step == {"fast": 4, "slow": 1}
    assert info.delays == {"a": -1, "b": 2}
    assert (info.receptive_field, info.warmup_steps, info.window, info.recomputed) == (None, 0, None, ())
    assert [state.input for state in info.states] == ["state.before", "state.count"]
    assert [item.name for item in info.inputs] == ["fast", "slow", "gain"]
    assert StreamSession(fir()).info.recomputed[0].operator == "aten.flip"


def plain() -> bytes:
    model = onnx.load_from_string(fir())
    del model.metadata_props[:]
    return model.SerializeToString()


def fixed() -> bytes:
    nodes, contract = fir_parts()
    fixed_states = tuple(dataclasses.replace(state, shape=(1, 2, 3)) for state in contract.states)
    return build(nodes, dataclasses.replace(contract, states=fixed_states))


BAD_MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Co3dError], str]] = {
    "no file": (lambda: "nowhere.onnx", {}, LoadError, r"nowhere\.onnx"),
    "a folder": (lambda: ROOT, {}, LoadError, "Cannot read"),
    "a null byte": (lambda: "\0", {}, LoadError, "Cannot read"),
    "not onnx": (lambda: b"not onnx", {}, LoadError, "cannot open"),
    "half a file": (lambda: fir()[:-50], {}, Co3dError, "open|metadata"),
    "a number": (lambda: 3, {}, UsageError, "A int is no model"),
    "not compiled": (plain, {}, ContractError, "no co3d metadata.*co3d-compile"),
    "no streams": (fir, {"batch": 0}, UsageError, "batch is 0.*from 1"),
    "half a stream": (fir, {"batch": 1.5}, UsageError, "batch is 1.5"),
    "more streams than memory": (fir, {"batch": 10**18}, SessionError, "no memory.*smaller batch"),
    "fixed batch": (fixed, {"batch": 2}, UsageError, "batch of 1, not 2"),
    "no threads": (fir, {"threads": 0}, UsageError, "threads is 0"),
    "no provider": (fir, {"providers": []}, UsageError, "no provider.*CPUExecutionProvider"),
    "unknown provider": (fir, {"providers": ["Abacus"]}, UsageError, "no provider Abacus.*CPUExecutionProvider"),
    "unknown with options": (fir, {"providers": [("Abacus", {})]}, UsageError, "no provider Abacus"),
}


@pytest.mark.parametrize("model, options, error, message", BAD_MODELS.values(), ids=BAD_MODELS)
def test_models_that_do_not_open(
    model: Callable[[], Any], options: dict[str, Any], error: type[Co3dError], message: str
) -> None:
    with pytest.raises(error, match=message):
        StreamSession(model(), **options)


def test_shapes_that_the_machine_has_no_room_for() -> None:
    """A few bytes of file may ask for any amount; Linux grants it, and ends the process that uses it."""
    with pytest.raises(SessionError, match=r"no memory for the states: \d.* GB for 10000000000 streams, and .* left"):
        StreamSession(fir(), batch=10**10)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin"])
def test_weights_outside_of_the_model_s_folder_are_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(4))
    model = onnx.load_from_string(fir())
    tensor = model.graph.initializer.add(name="far", dims=[1], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="4")
    model.graph.node.append(onnx.helper.make_node("Identity", ["far"], ["unused"]))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LoadError, match="cannot open"):
        StreamSession(folder / "m.onnx")


def test_a_provider_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider"])
    with pytest.raises(UsageError, match="could not start CPU"):
        StreamSession(fir())


def test_a_closed_session_says_so() -> None:
    with StreamSession(exact()) as session:
        session.step(np.zeros((1, 2, 3), np.float32))
    calls = (
        lambda: session.step(GOOD),
        session.flush,
        session.reset,
        session.get_state,
        session.snapshot,
        session.close,
    )
    for call in calls:
        with pytest.raises(SessionError, match="closed"):
            call()
    with StreamSession(fir()) as session:
        session.close()


def test_a_second_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session = StreamSession(exact())
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(20)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", wait)
    frame = np.zeros((1, 2, 3), np.float32)
    thread = threading.Thread(target=session.step, args=(frame,))
    thread.start()
    try:
        assert inside.wait(20)
        calls = (lambda: session.step(frame), session.flush, session.reset, session.get_state, session.snapshot)
        for call in calls:
            with pytest.raises(SessionError, match=r"another thread.*of its own"):
                call()
    finally:
        go_on.set()
        thread.join()
    session.step(frame)
