"""Files for one kind of machine: states in the blocked layout of its kernels, and the same numbers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from marks import long
from oracle import check
from torch import nn
from zoo.real import REAL
from zoo.small import SMALL

import co3d_compile as co3d
from co3d_compile.cli.compile import main as compile_command
from co3d_compile.support.machine import block_channels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(block_channels() == 1, reason="ONNX Runtime has no blocked layout on this machine"),
]

FILES = [
    ("x3d_s-small", "paired"),
    ("i3d_r50-small", "renamed"),
    ("two_heads", "paired"),
    ("p3d", "renamed"),
    ("p3d", "paired"),
    ("densenet3d", "paired"),
    ("unet_transpose", "renamed"),
    ("movinet-frame", "paired"),
    ("cnn_lstm", "renamed"),
    ("cnn_lstm", "paired"),
    ("se_mean-window", "paired"),
    ("stack_taps", "renamed"),
    long("x3d_s-small", "renamed"),
    long("x3d_s-window-small", "renamed"),
    long("slow_r50-small", "renamed"),
    long("i3d_r50-small", "paired"),
    long("csn_r101-small", "renamed"),
    long("slowfast_r50_8x8-small", "renamed"),
    long("slowfast_r50_8x8-small", "paired"),
]


@pytest.mark.parametrize(("network", "state_io"), FILES)
def test_same_numbers(network: str, state_io: str) -> None:
    """Through the oracle, states at NaN: what fills the last block must not reach a result either."""
    entry = SMALL[network] if network in SMALL else REAL[network.removesuffix("-small")].entry(small=True)
    check(replace(entry, tight=False), options={"state_io": state_io}, form="to_native", batch=2)


@pytest.mark.parametrize("network", ["inception3d", "folded_r2plus1d"])
def test_eight_frames_a_step(network: str) -> None:
    check(replace(SMALL[network], tight=False), options={"frames_per_step": 8}, form="to_native")


def network() -> nn.Module:
    """Eighteen channels: two more than fill a block, and no multiple of four."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 18, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(18, 24, 3, padding=1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).eval()


CLIP = torch.zeros(1, 3, 8, 16, 16)


def test_states_are_in_blocks() -> None:
    compiled = co3d.compile(network(), (CLIP,), state_io="renamed")
    native = compiled.to_native()
    block = block_channels()
    assert native.info.native == block and compiled.info.native is None
    before, after = (sum(node.op_type.startswith("Reorder") for node in optimised(c)) for c in (compiled, native))
    assert after < before
    widened = [(a.shape, b.shape) for a, b in zip(compiled.info.states, native.info.states, strict=True)]
    assert all(b[1] % block == 0 for a, b in widened if len(a) == 4 and a[1] > 4)


def optimised(compiled: co3d.CompiledModel) -> list[onnx.NodeProto]:
    """The operators that ONNX Runtime runs."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder, "seen.onnx"))
        ort.InferenceSession(compiled.to_bytes(), options, providers=["CPUExecutionProvider"])
        return list(onnx.load(options.optimized_model_filepath).graph.node)


def test_refused_on_another_machine(tmp_path: Path) -> None:
    """The file says for which blocks it is."""
    path = co3d.compile(network(), (CLIP,)).to_native().save(tmp_path / "native.onnx")
    model = onnx.load(path)
    (entry,) = [p for p in model.metadata_props if p.key == "co3d"]
    other = 8 if block_channels() == 16 else 16
    entry.value = json.dumps({**json.loads(entry.value), "native": other})
    onnx.save(model, path)
    with pytest.raises(co3d.UsageError, match=f"blocks of {other} channels"):
        co3d.StreamSession(path)


def test_command_line(tmp_path: Path) -> None:
    program = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(network(), (CLIP,)), program)
    file = tmp_path / "model.onnx"
    result = CliRunner().invoke(compile_command, [str(program), "-o", str(file), "--native", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verification"]["passed"]
    with co3d.StreamSession(file) as session:
        assert session.info.native == block_channels()
    refused = CliRunner().invoke(compile_command, [str(program), "-o", str(tmp_path / "step.pt2"), "--native"])
    assert refused.exit_code == 2 and "--native" in refused.stderr
