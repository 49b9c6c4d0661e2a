"""What runs in place of a compiled file: converted once, kept, and with the states of the file that was given."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hand_made import FIR, fir, frames, run
from torch import nn

import co3d_compile as co3d
from co3d_compile.native import conversion, form_cache, running_form
from co3d_compile.runtime import running_model
from co3d_compile.support.machine import block_channels

OLD = Path(__file__).parent / "data" / "first_release"
CLIP = torch.zeros(1, 3, 8, 8, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone; files of any size are converted."""
    monkeypatch.setenv(form_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(running_form, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "forms"


def network() -> nn.Module:
    """Eighteen channels fill no block, and twelve do so with another count; the mean keeps eight entries."""
    torch.manual_seed(0)
    body = [nn.Conv3d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv3d(12, 18, 3, padding=1), nn.ReLU()]
    tail = [nn.Conv3d(18, 16, (5, 1, 1), padding=(2, 0, 0)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*body, *tail).eval()


FORMS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "renamed": {"state_io": "renamed"},
    "two frames a step": {"frames_per_step": 2},
    "exact ends": {"boundary": "exact"},
    "half states": {"form": "half"},
    "8 bits": {"form": "int8"},
}


@cache
def model(name: str = "as it is") -> bytes:
    options = dict(FORMS[name])
    form = options.pop("form", None)
    compiled = co3d.compile(network(), (CLIP,), **options)
    if form == "half":
        compiled = compiled.with_half_states()
    if form == "int8":
        compiled = compiled.to_int8(list(frames(30, 1, 3, 8, 8)))
    return compiled.to_bytes()


def steps_of(session: co3d.StreamSession, count: int, seed: int = 0) -> list[Any]:
    spec = session.info.inputs[0]
    shape = [session.batch if size == "N" else int(size) for size in spec.shape]
    return list(frames(count, *shape, seed=seed))


@pytest.mark.parametrize("form", FORMS)
def test_a_snapshot_goes_from_one_layout_to_the_other(form: str) -> None:
    """With the same states under the same names on both sides, of some streams and of all."""
    content, tolerance = model(form), {"8 bits": 0.05, "half states": 1e-2}.get(form, 1e-4)
    native, plain = co3d.StreamSession(content, batch=3), co3d.StreamSession(content, batch=3, layout="plain")
    assert (native.layout, plain.layout) == ("native", "plain")
    assert native.info == plain.info
    steps = steps_of(native, 24)
    for there, back in ((native, plain), (plain, native)):
        for frame in steps[:9]:
            there.step(frame)
        there.step(steps[9][[2, 0]], streams=[2, 0])
        states = there.get_state()
        back.restore(there.snapshot())
        assert back.snapshot() == there.snapshot()
        for name, value in back.get_state().items():
            np.testing.assert_array_equal(value, states[name])
        back.set_state(states)
        assert back.snapshot() == there.snapshot()
        back.restore(there.snapshot(stream=1), stream=0)
        there.restore(there.snapshot(stream=1), stream=0)
        for frame in steps[10:]:
            a, b = there.step_one(frame), back.step_one(frame)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(a).max())


@pytest.mark.skipif(block_channels() == 1, reason="ONNX Runtime has no blocked layout on this machine")
def test_states_are_in_blocks_inside_and_plain_outside() -> None:
    session = co3d.StreamSession(model())
    form = session._states._form
    assert form.blocked and form.contract.native == block_channels()
    assert {s.input: s.shape for s in form.contract.states} != {s.input: s.shape for s in session.info.states}
    for spec in session.info.states:
        assert session.get_state()[spec.input].shape == (1, *spec.shape[1:])


def test_states_that_move_are_renamed() -> None:
    """Of a paired file; where several take the same value or move in a ring, the contract still holds."""
    session = co3d.StreamSession(fir(((1.0,) * 4,)))
    assert session.layout == "native"
    assert len(session._states.outputs()) == 1 < len(session.info.states)


# --- earlier files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paired", "renamed", "native8"])
@pytest.mark.parametrize("layout", ["auto", "plain"])
def test_files_and_snapshots_of_the_first_release_open(name: str, layout: Any) -> None:
    if name == "native8" and block_channels() != 8:
        pytest.skip("the file is for blocks of 8 channels")
    x = np.random.default_rng(0).random((6, 2, 3, 4, 4), np.float32)
    with co3d.StreamSession(OLD / f"{name}.onnx", batch=2, layout=layout) as session:
        assert session.layout == ("native" if layout == "auto" and name != "native8" else "plain")
        session.restore((OLD / f"{name}.snapshot").read_bytes())
        assert session.snapshot() == (OLD / f"{name}.snapshot").read_bytes()
        np.testing.assert_allclose(run(session, x[3:]), np.load(OLD / "y.npy"), rtol=1e-4, atol=1e-5)


# --- what decides -----------------------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one line of log that says which form runs."""
    (line,) = (r.getMessage() for r in caplog.records if " runs " in r.getMessage() and r.levelno == logging.INFO)
    caplog.clear()
    return line


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    with caplog.at_level(logging.INFO, logger="co3d_compile"):
        yield lambda: said(caplog)


def test_the_log_says_which_form_runs_and_why(log: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert co3d.StreamSession(model()).layout == "native"
    assert "converted in" in log()
    assert co3d.StreamSession(model()).layout == "native"
    assert "kept in" in log()
    reasons: dict[str, Callable[[], co3d.StreamSession]] = {
        "layout is 'plain'": lambda: co3d.StreamSession(model(), layout="plain"),
        "no state": lambda: co3d.StreamSession(fir(((1.0,),))),
        "--native": lambda: co3d.StreamSession(co3d.compile(network(), (CLIP,)).to_native()),
    }
    for reason, opened in reasons.items():
        if reason != "--native" or block_channels() > 1:
            assert opened().layout == "plain" and reason in log()
    monkeypatch.setattr(running_form, "LEAST_BYTES", 1 << 18)
    assert co3d.StreamSession(fir(FIR)).layout == "plain" and "small" in log()
    wrong: Any = "fast"
    with pytest.raises(co3d.UsageError, match="layout is 'fast', not one of auto, plain"):
        co3d.StreamSession(model(), layout=wrong)


def test_another_provider_gets_the_file_as_it_is(log: Callable[[], str]) -> None:
    session = co3d.StreamSession(model(), providers=[("CPUExecutionProvider", {})])
    assert session.layout == "plain" and "CPU alone" in log()


def test_weights_in_a_file_of_their_own(tmp_path: Path, log: Callable[[], str]) -> None:
    file = tmp_path / "m.onnx"
    onnx.save(onnx.load_from_string(model()), file, save_as_external_data=True, size_threshold=512)
    assert co3d.StreamSession(file).layout == "plain" and "file of their own" in log()


def test_without_the_converter(log: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "co3d_compile.native.conversion")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert co3d.StreamSession(model()).layout == "plain"
    assert "onnx_ir is not installed" in log()


def test_results_that_would_differ(
    log: Callable[[], str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets them: the file itself runs, and the next time nothing is tried."""
    doubled = conversion.convert

    def wrong(content: bytes, contract: co3d.Contract) -> bytes:
        changed = onnx.load_from_string(doubled(content, contract))
        for tensor in changed.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))
        return changed.SerializeToString()

    monkeypatch.setattr(conversion, "convert", wrong)
    assert co3d.StreamSession(model()).layout == "plain"
    assert any("would differ at" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "conversion failed" in log()
    monkeypatch.setattr(conversion, "convert", lambda *_: 1 / 0)
    assert co3d.StreamSession(model()).layout == "plain"
    assert "failed before" in log()


def test_a_profile_holds_the_users_steps_alone(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with co3d.StreamSession(model(), profile=file) as session:
        for frame in steps_of(session, 2):
            session.step(frame)
    assert session.layout == "native"
    assert file.read_text().count('"model_run"') == 2


# --- the cache --------------------------------------------------------------------------------------------------


def works(expected: str = "native") -> None:
    """A session opens in this layout, and its numbers are right."""
    with co3d.StreamSession(model()) as session, co3d.StreamSession(model(), layout="plain") as plain:
        assert session.layout == expected
        x = steps_of(session, 12)
        np.testing.assert_allclose(run(session, np.stack(x)), run(plain, np.stack(x)), rtol=1e-4, atol=1e-5)


def entry(folder: Path) -> Path:
    (path,) = folder.glob("*.form")
    return path


def test_what_is_kept_is_not_made_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works()
    assert own_cache.stat().st_mode & 0o777 == 0o700
    assert entry(own_cache).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(conversion, "convert", lambda *_: 1 / 0)
    works()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-100],
    "a bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "something else": lambda data: b"#!/bin/sh\n",
    "of another model": lambda data: form_cache._MAGIC + bytes(32) + data[44:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(damage: str, own_cache: Path) -> None:
    works()
    path = entry(own_cache)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    works()
    assert form_cache.FormCache(own_cache).load(entry(own_cache).stem)


def test_a_whole_entry_that_is_no_converted_file(own_cache: Path) -> None:
    """Of a converter that wrote something else: the digest is right, and the content is not."""
    for content in (b"no model", fir()):
        works()
        form_cache.FormCache(own_cache).store(entry(own_cache).stem, content)
        works()


def test_an_entry_of_another_version_is_not_used(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works()
    monkeypatch.setattr(running_model, "CONVERTER", 0)
    works()
    monkeypatch.setattr(running_model, "kernels", lambda: "another processor")
    works()
    assert len(list(own_cache.glob("*.form"))) == 3


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, log: Callable[[], str]) -> None:
    monkeypatch.setenv(form_cache.VARIABLE, "/dev/null/there")
    assert co3d.StreamSession(model()).layout == "native"
    assert "not kept" in log()
    monkeypatch.setenv(form_cache.VARIABLE, "off")
    assert co3d.StreamSession(model()).layout == "native"
    assert "not kept: nothing is kept" in log()


def test_a_full_disk(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert co3d.StreamSession(model()).layout == "native"
    assert [path.suffix for path in own_cache.iterdir()] == [".lock"]


def test_a_folder_that_is_not_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link leads anywhere: nothing is read, written or removed there."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("kept")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "forms").symlink_to(elsewhere)
    works()
    assert [path.name for path in elsewhere.iterdir() if path.suffix != ".lock"] == ["mine.txt"]
    own = tmp_path / "other" / "forms"
    own.mkdir(parents=True, mode=0o777)
    own.chmod(0o777)
    monkeypatch.setenv(form_cache.VARIABLE, str(own.parent))
    works()
    assert own.stat().st_mode & 0o777 == 0o700


def test_an_entry_that_another_process_makes(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second waits a little, then makes one for itself and keeps nothing."""
    works()
    path = entry(own_cache)
    path.unlink()
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(form_cache, "PATIENCE", 0.1)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        works()
        assert not list(own_cache.glob("*.form"))
    works()
    assert entry(own_cache) == path


def test_the_cache_is_bounded(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used longest ago goes first, and what dead processes left."""
    cache = form_cache.FormCache(own_cache)
    monkeypatch.setattr(form_cache, "MAX_BYTES", 3500)
    for place, key in enumerate("abc"):
        assert not cache.store(key, bytes(1000))
        os.utime(own_cache / f"{key}.form", (place, place))
    assert cache.load("a") == bytes(1000)  # used just now
    left = own_cache / ".x.form.dead"
    left.mkdir()
    (left / "x.form").write_bytes(b"half")
    (own_cache / "notes.txt").write_text("not ours")
    for path in (left, own_cache / "notes.txt"):
        os.utime(path, (0, 0))
    assert not cache.store("d", bytes(1000))
    assert {path.name for path in own_cache.iterdir()} == {"a.form", "c.form", "d.form", "notes.txt"}
    assert not cache.store("e", bytes(4000))
    assert cache.load("e") is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(form_cache.VARIABLE, "/somewhere")
    assert form_cache.cache_folder() == Path("/somewhere/forms")
    monkeypatch.delenv(form_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/kept")
    monkeypatch.setattr(sys, "platform", "linux")
    assert form_cache.cache_folder() == Path("/kept/co3d-compile/forms")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert form_cache.cache_folder() == Path("/home/someone/.cache/co3d-compile/forms")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert form_cache.cache_folder() == Path("/home/someone/Library/Caches/co3d-compile/forms")
    for word in ("off", "0", " NO "):
        monkeypatch.setenv(form_cache.VARIABLE, word)
        assert form_cache.cache_folder() is None
