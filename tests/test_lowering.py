"""Every form of a continual convolution, forced one at a time: through ONNX Runtime, against the untouched network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import long
from torch import nn

import co3d_compile as co3d
from co3d_compile.step_graph.convolution_forms import FORMS, forced
from co3d_compile.verification.verify_model import verify

pytestmark = pytest.mark.slow

CLIP, SIZE, LONG = 16, 9, 30

KINDS: dict[str, nn.Module] = {
    "dense": nn.Conv3d(4, 6, 3, padding=1),
    "dense over time alone": nn.Conv3d(8, 4, (3, 1, 1), bias=False),
    "depthwise": nn.Conv3d(4, 4, 3, padding=1, groups=4),
    "depthwise, spatial stride": nn.Conv3d(4, 4, 3, stride=(1, 2, 2), padding=1, groups=4),
    "grouped": nn.Conv3d(4, 8, (5, 3, 3), padding=(2, 0, 1), groups=2),
    "dilated": nn.Conv3d(4, 4, (3, 1, 3), dilation=(3, 1, 2), padding=(3, 0, 0)),
    "temporal stride": nn.Conv3d(4, 4, 3, stride=(2, 1, 1), padding=1),
    "temporal stride, one tap": nn.Conv3d(4, 4, 1, stride=(2, 2, 2)),
    "temporal stride, dilated": nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1), dilation=(2, 1, 1), padding=(1, 0, 0)),
    "two taps": nn.Conv3d(4, 4, (2, 1, 1)),
    "seven taps": nn.Conv3d(20, 20, (7, 3, 3), padding=(3, 1, 1), stride=(1, 2, 2)),
    "reader of a reader": nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, stride=2)),
}


class Gate(nn.Module):
    """Squeeze-and-excitation over space."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv3d(features, 8, 1), nn.Conv3d(8, features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((3, 4), keepdim=True)))))
        return x * gate * torch.sigmoid(x * gate)


KINDS["18 channels inside, as X3D's 54"] = nn.Sequential(
    nn.Conv3d(4, 18, 1, bias=False),
    nn.ReLU(),
    nn.Conv3d(18, 18, 3, padding=1, groups=18),
    Gate(18),
    nn.Conv3d(18, 4, 1),
)
KINDS["18 channels inside and out"] = nn.Sequential(nn.Conv3d(4, 18, 3), nn.ReLU(), nn.Conv3d(18, 18, (3, 1, 1)))


class Residual(nn.Module):
    """A convolution beside its own delayed input: the past of one tensor has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv(x))


KINDS["residual"] = Residual()


def channels(module: nn.Module) -> int:
    return next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv3d))


def stream(module: nn.Module, x: torch.Tensor, **options: Any) -> tuple[list[np.ndarray], co3d.StreamSession]:
    """All entries of the only output, and the session."""
    compiled = co3d.compile(module, (x[:, :, :CLIP],), **options)
    session = co3d.StreamSession(compiled, batch=x.shape[0], threads=1)
    states = session.get_state()
    session.set_state({name: np.full_like(value, np.nan) for name, value in states.items()})
    (pulse,) = session.info.frames_per_step.values()
    time = session.info.outputs[0].time_dim
    steps: list[np.ndarray] = []
    for j in range(x.shape[2] // pulse):
        part = x[:, :, j * pulse : (j + 1) * pulse].numpy()
        result = session.step(np.ascontiguousarray(part[:, :, 0] if pulse == 1 else part))
        entries = session.info.outputs[0].entries_per_step
        steps.append(np.expand_dims(result, 2) if entries == 1 and result.ndim == 4 else np.asarray(result))
    assert time is not None
    return steps, session


WAYS = [(None, "renamed"), (6, "paired")]
# Every second pair of kind and form at one frame a step, the others at six; the other way round in make test-long.
CASES = [
    (kind, form, *way) if (i + j + k) % 2 == 0 else long(kind, form, *way)
    for i, kind in enumerate(KINDS)
    for j, form in enumerate([*FORMS, "pair"])
    for k, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("kind", "form", "pulse", "state_io"), CASES)
def test_form_is_exact(kind: str, form: str, pulse: int | None, state_io: str) -> None:
    torch.manual_seed(0)
    module = KINDS[kind].eval()
    x = torch.randn(2, channels(module), LONG, SIZE, SIZE)
    with torch.no_grad():
        expected = module(x).numpy()
    with forced(form):
        steps, session = stream(module, x, frames_per_step=pulse, state_io=state_io)
    (delay,) = session.info.delays.values()
    warmup = session.info.warmup_steps
    finite = [bool(np.isfinite(s).all()) for s in steps]
    assert finite == [j >= warmup for j in range(len(steps))], "the warm-up is tight"
    got = np.concatenate(steps, 2)
    rate = steps[0].shape[2]
    compared = 0
    for at in range(warmup * rate, got.shape[2]):
        index = at - delay
        if 0 <= index < expected.shape[2]:
            np.testing.assert_allclose(got[:, :, at], expected[:, :, index], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared > 4


def test_tuned_is_exact_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once for each shape; what is kept decides the next time, and a damaged file decides nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)))
    clip = torch.zeros(1, 4, CLIP, SIZE, SIZE)
    stages: list[str] = []

    def compiled() -> co3d.CompiledModel:
        stages.clear()
        return co3d.compile(module.eval(), (clip,), tune=True, progress=lambda stage, *_: stages.append(stage))

    assert verify(compiled(), module, (clip,)).passed
    assert stages.count("tune") == 2
    kept = tmp_path / "co3d-compile" / "tune.json"
    fast = json.loads(kept.read_text())
    assert len(fast) == 2 and set(fast.values()) <= set(FORMS)
    operators = {}
    for form in ("concat", "sum"):
        kept.write_text(json.dumps(dict.fromkeys(fast, form)))
        result = compiled()
        assert "tune" not in stages and verify(result, module, (clip,)).passed
        operators[form] = [node.op_type for node in result.model.graph]
    assert operators["concat"] != operators["sum"]
    kept.write_text("{")
    assert verify(compiled(), module, (clip,)).passed


class Vocoder(nn.Module):
    """A causal encoder and a decoder of sound, 8 samples a code, with residual blocks at the rate of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv1d(1, 4, 7), nn.Conv1d(4, 4, 3, dilation=3)
        self.down, self.up = nn.Conv1d(4, 8, 16, 8), nn.ConvTranspose1d(8, 4, 16, 8)
        self.last = nn.Conv1d(4, 1, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.pad(x, (6, 0)))
        y = y + self.inner(F.pad(F.elu(y), (6, 0)))
        y = self.up(F.elu(self.down(F.pad(y, (8, 0)))))
        return torch.tanh(self.last(F.pad(F.elu(y), (6, 0))))


SAMPLES: dict[str, tuple[nn.Module, int, int]] = {
    "a kernel of 400 samples that moves on by 160": (nn.Conv1d(1, 4, 400, 160), 7, 400),
    "a mean of 160 samples": (nn.AvgPool1d(160), 3, 160),
    "pools of samples": (nn.Sequential(nn.MaxPool1d(4, 2), nn.AvgPool1d(4, 2), nn.Conv1d(1, 2, 5, 32)), 18, 26),
    "samples in a view": (
        nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 2, 5, 4), nn.MaxPool1d(9, 8)),
        18,
        37,
    ),
    "residual blocks and a decoder": (Vocoder(), 40, 44),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_a_step_are_computed_together(name: str) -> None:
    """What many samples of a step go through is as many operators as for one sample."""
    network, few, field = SAMPLES[name]
    compiled = co3d.compile(network.eval(), (torch.zeros(1, 1, 800),))
    assert compiled.info.receptive_field == field
    assert len(list(compiled.model.graph)) <= few


def test_channels_in_fours() -> None:
    """Channels between convolutions are in fours, the last ones zeros."""
    for kind in ("18 channels inside, as X3D's 54", "18 channels inside and out"):
        module = KINDS[kind].eval()
        compiled = co3d.compile(module, (torch.zeros(1, channels(module), CLIP, SIZE, SIZE),))
        assert {s.shape[1] for s in compiled.info.states if s.shape[1] != 4} == {20}
