"""States as float16: half the bytes, near the untouched network, and a file like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracle import check
from torch import nn
from zoo.real import REAL
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow

REAL_ONES = ("x3d_s",)
SMALL_ONES = ("p3d", "unet_transpose", "cnn_lstm", "movinet-frame")


@pytest.mark.parametrize("network", [*(f"{name}-small" for name in REAL_ONES), *SMALL_ONES])
def test_near_the_untouched_network(network: str) -> None:
    """Through the oracle, states at NaN; and the difference is seen, so it is float16 that was run."""
    entry = SMALL[network] if network in SMALL else REAL[network.removesuffix("-small")].entry(small=True)
    options = {"state_io": "renamed"}
    facts = check(replace(entry, tight=False), options=options, tol=1e-2, batch=2, form="with_half_states")
    assert facts.error > 1e-6


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv3d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 6, 3, padding=1), nn.AdaptiveAvgPool3d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 5)).eval()


CLIP = torch.zeros(1, 3, 8, 16, 16)


@pytest.mark.parametrize("state_io", ["renamed", "paired"])
def test_half_the_bytes(state_io: str) -> None:
    exact = co3d.compile(network(), (CLIP,), state_io=state_io)
    half = exact.with_half_states()
    assert "float16" in half.report().warnings[-1]
    assert half.report().state_bytes * 2 == exact.report().state_bytes
    assert {s.dtype for s in half.info.states} == {"float16"}
    session = co3d.StreamSession(half)
    session.step(np.ones((1, 3, 16, 16), np.float32))
    states = session.get_state()
    assert {value.dtype for value in states.values()} == {np.dtype("float16")}
    session.set_state(states)
    session.restore(session.snapshot())


def test_a_state_that_moves_is_not_cast() -> None:
    half = co3d.compile(network(), (CLIP,)).with_half_states()
    moved = [n for n in half.model.graph if n.op_type == "Identity" and n.outputs[0].is_graph_output()]
    assert moved and all(str(n.inputs[0].dtype) == "FLOAT16" for n in moved)


def test_verification_states_its_tolerance() -> None:
    half = co3d.compile(network(), (CLIP,)).with_half_states()
    result = verify(half, network(), (CLIP,))
    assert result.passed and result.tolerance == 1e-1 and result.relative_error > 1e-6
    assert any("float16" in note for note in result.notes)
    assert not verify(half, network(), (CLIP,), tolerance=1e-6, bisect=False).passed


@pytest.mark.parametrize("what", ["to_native", "to_module", "to_exported_program"])
def test_what_needs_float32(what: str) -> None:
    half = co3d.compile(network(), (CLIP,)).with_half_states()
    with pytest.raises(co3d.UsageError, match="needs a model in full precision"):
        getattr(half, what)()


def test_on_the_command_line(tmp_path: Path) -> None:
    source, output = tmp_path / "model.pt2", tmp_path / "model.onnx"
    torch.export.save(torch.export.export(network(), (CLIP,)), source)
    words = [str(source), "-o", str(output), "--state-dtype", "float16"]
    done = CliRunner().invoke(compile_command, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verification"]["tolerance"] == 1e-1
    assert {s.dtype for s in co3d.StreamSession(output).info.states} == {"float16"}
    done = CliRunner().invoke(compile_command, [*words, "--native"])
    assert done.exit_code == 2 and "neither --native" in done.output
