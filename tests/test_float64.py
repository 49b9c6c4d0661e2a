"""Networks in float64: what ONNX Runtime computes in float64 stays so, and casts stand around the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d

pytestmark = pytest.mark.slow
SAID = "in float32 alone"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "a recurrent layer": (
        lambda: Graph(lambda m, x: m.g(torch.tanh(m.f(x)).transpose(1, 2).cumsum(1))[0],
                      f=nn.BatchNorm1d(3), g=nn.GRU(3, 4, batch_first=True)), (1, 3, 8), 1e-12),
    "both directions over places": (
        lambda: Graph(lambda m, x: m.g(x.permute(0, 2, 3, 1).flatten(0, 1))[0].unflatten(0, (-1, x.shape[2])),
                      g=nn.LSTM(3, 4, batch_first=True, bidirectional=True)), (1, 3, 8, 4), 1e-12),
    "convolutions and a head": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)),
                              nn.GELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)),
        (1, 3, 8, 5, 5), 1e-5),
    "activations and up-sampling": (
        lambda: Graph(lambda m, x: m.n(F.elu(m.t(F.interpolate(F.softplus(x), scale_factor=2))).transpose(1, 2)),
                      t=nn.ConvTranspose1d(3, 4, 4, 2, 1), n=nn.LayerNorm(4)), (1, 3, 8), 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_goes_in_and_comes_out(name: str) -> None:
    make, shape, tolerance = NETWORKS[name]
    torch.manual_seed(0)
    model, clip = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    compiled = co3d.compile(model, (clip,))
    assert {s.dtype for s in (*compiled.info.inputs, *compiled.info.outputs)} == {"float64"}
    assert any(SAID in warning for warning in compiled.report().warnings) == (tolerance > 1e-9)
    assert co3d.verify(compiled, model, (clip,), tolerance=tolerance).passed


def test_a_part_in_float64() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.conv3d(x.double(), torch.ones(4, 3, 3, 3, 3, dtype=torch.float64)).float()

    clip = (torch.randn(1, 3, 4, 8, 8),)
    compiled = co3d.compile(Graph(forward), clip)
    assert {s.dtype for s in (*compiled.info.inputs, *compiled.info.outputs)} == {"float32"}
    assert co3d.verify(compiled, Graph(forward), clip).passed


class ByKeyword(nn.Module):
    """Takes its clip by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, *, series: Tensor) -> Tensor:
        return self.conv(series)


def test_a_network_with_keywords_is_verified() -> None:
    torch.manual_seed(0)
    model, keywords = ByKeyword().eval(), {"series": torch.randn(1, 3, 8)}
    compiled = co3d.compile(model, (), example_kwargs=keywords)
    assert co3d.verify(compiled, model, (), example_kwargs=keywords).passed
    with pytest.raises(co3d.UsageError, match="example_inputs"):
        co3d.verify(compiled, model)


def test_what_was_taken_for_time_is_said() -> None:
    model = nn.Conv1d(3, 4, 3).eval()
    facts = co3d.compile(model, (torch.randn(1, 3, 8),)).report().facts()
    assert facts[0] == ("time", "dim 2 of input_1, 8 frames in a clip (no dim was given)")
    assert co3d.compile(model, (torch.randn(1, 3, 8),), time_dim=2).report().taken_for_time == ""
