"""Weights for a factory: where they are found in a checkpoint, which of several are taken, and what is said of that."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import FACTORY, SHAPE, tiny, use_folder
from safetensors.torch import save_file
from torch import Tensor

from co3d_compile.capture.load_model import load
from co3d_compile.errors import LoadError, UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state": state},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {f"net.0._orig_mod.{name}": value for name, value in state.items()}, "epoch": 1},
        lambda state: {"ema_model": {"n_averaged": torch.tensor(3), **{f"module.{n}": v for n, v in state.items()}}},
        lambda state: {"optimizer": {"state": {0: {"exp_avg": state["0.weight"]}}}, "net_params": state},
    ],
)
def test_weights(wrap: Callable[[dict[str, Tensor]], object]) -> None:
    torch.save(wrap(tiny().state_dict()), "w.bin")
    loaded = load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"))
    assert torch.equal(loaded.program.state_dict()["0.weight"], tiny().state_dict()["0.weight"])  # type: ignore


def averaged() -> dict[str, Any]:
    """A checkpoint with an average of the weights beside them."""
    mean = {name: 0.5 * value for name, value in tiny().state_dict().items()}
    return {"model": tiny().state_dict(), "ema": {"module": mean, "decay": 0.99}}


@pytest.mark.parametrize(("key", "share"), [(None, 1.0), ("model", 1.0), ("ema.module", 0.5)])
def test_which_of_several_weights_is_said(key: str | None, share: float) -> None:
    torch.save(averaged(), "w.bin")
    loaded = load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"), weights_key=key)
    got = loaded.program.state_dict()["0.weight"]  # type: ignore[union-attr, operator]
    assert torch.equal(got, share * tiny().state_dict()["0.weight"])
    assert any("those under ema.module fit too; --weights-key" in note for note in loaded.notes) == (key is None)


@pytest.mark.parametrize(
    ("content", "key", "says"),
    [
        (averaged(), "ema", "has no weights under 'ema'. It has some under model, ema.module"),
        ({"a": tiny().state_dict(), "b": tiny().state_dict()}, None, "Several weights of w.bin fit: a, b"),
    ],
)
def test_weights_that_are_not_known(content: object, key: str | None, says: str) -> None:
    torch.save(content, "w.bin")
    with pytest.raises(UsageError, match=re.escape(says)):
        load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"), weights_key=key)


def lightning(**more: Any) -> dict[str, Any]:
    """A checkpoint as Lightning writes it: the network beside what only training needs."""
    state = {f"model.{name}": value for name, value in tiny().state_dict().items()}
    return {"state_dict": {**state, "loss.weight": torch.ones(4)}, "pytorch-lightning_version": "2.5", **more}


def test_a_prefix_of_all_names_is_taken_off_and_named() -> None:
    torch.save(lightning(), "w.bin")
    loaded = load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"))
    assert torch.equal(loaded.program.state_dict()["0.weight"], tiny().state_dict()["0.weight"])  # type: ignore
    assert "named model.…" in loaded.notes[0] and loaded.notes[1] == "1 other tensors were left out: loss.weight"


def test_a_checkpoint_with_objects_is_read_if_it_is_trusted() -> None:
    torch.save(lightning(hyper_parameters=argparse.Namespace(rate=1e-3)), "w.bin")
    with pytest.raises(LoadError, match="If you trust where it comes from, give --trust-pickle"):
        load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"))
    loaded = load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"), trust_pickle=True)
    assert torch.equal(loaded.program.state_dict()["0.weight"], tiny().state_dict()["0.weight"])  # type: ignore


def test_weights_from_safetensors_in_half_precision() -> None:
    save_file({name: value.half() for name, value in tiny().state_dict().items()}, "w.bin")
    loaded = load(f"{FACTORY}:tiny", shapes=[SHAPE], weights=Path("w.bin"))
    assert loaded.program.state_dict()["0.weight"].dtype == torch.float32  # type: ignore[operator, union-attr]
    assert any("float16" in note for note in loaded.notes)
