"""Verification takes the graph that the compiler has captured, where it is still the graph of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from verified_networks import build

import co3d_compile as co3d
from co3d_compile.verification import captured_model


class Net(nn.Module):
    """A convolution over time and what stands behind it."""

    def __init__(self, behind: Callable[[Tensor], Tensor], clips: int = 1) -> None:
        super().__init__()
        self.conv, self.behind = nn.Conv3d(3, 4, (3, 1, 1)), behind
        self.token = nn.Parameter(torch.randn(1, 4, 1, 1, 1))
        self.clip = torch.randn(clips, 3, 8, 4, 6)
        self.sign = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.conv(x) + self.token.expand(len(x), -1, -1, -1, -1)) * self.sign


FITS: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": torch.relu,
    "mean": lambda x: x.mean([3, 4]),
    "attention over rows": lambda x: torch.softmax(
        (y := x.permute(0, 2, 3, 1, 4).reshape(-1, 4, 4, 6)) @ y.mT, -1
    ).reshape(len(x), -1, 4, 4, 4),
    "frames before clips": lambda x: (
        x.mean([3, 4]).permute(2, 0, 1).reshape(-1, 4).tanh().reshape(-1, len(x), 4).permute(1, 2, 0)
    ),
    "several results in front": lambda x: torch.stack([x.relu(), x.tanh()]),
    "zeros for each clip": lambda x: torch.cat([x, x.new_zeros(len(x), 4, x.shape[2], 4, 6)], 1),
}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What verification captures by itself."""
    seen: list[str] = []
    own = captured_model.capture

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(model).__name__)
        return own(model, *args, **kwargs)

    monkeypatch.setattr(captured_model, "capture", counted)
    return seen


@pytest.mark.parametrize("clips", [1, 2, 3])
@pytest.mark.parametrize("name", FITS)
def test_it_is_not_captured_again(name: str, clips: int, captures: list[str]) -> None:
    network = Net(FITS[name], clips).eval()
    compiled = co3d.compile(network, network.clip)
    assert co3d.verify(compiled, network, network.clip).passed
    assert not captures


def _other_sign(network: Net) -> None:
    network.sign = -1.0


def _other_weights(network: Net) -> None:
    network.conv = nn.Conv3d(3, 4, (3, 1, 1))


def _weights_in_place(network: Net) -> None:
    with torch.no_grad():
        network.conv.weight.mul_(2)


@pytest.mark.parametrize("change", [_other_sign, _other_weights, _weights_in_place])
def test_another_network_is_not_taken_for_it(change: Callable[[Net], None], captures: list[str]) -> None:
    network = Net(torch.relu).eval()
    compiled = co3d.compile(network, network.clip)
    change(network)
    assert not co3d.verify(compiled, network, network.clip).passed


def test_another_example_is_captured(captures: list[str]) -> None:
    network = Net(torch.relu).eval()
    compiled = co3d.compile(network, network.clip)
    assert co3d.verify(compiled, network, torch.randn(1, 3, 12, 4, 6)).passed
    assert captures == ["Net"]


def test_the_longer_clip_is_captured_as_the_short_one_was() -> None:
    """Rows of a single clip are another graph: what was captured for two clips did not go with it."""
    module, example, options = build("divided by the sum of its windows")
    compiled = co3d.compile(module, example, **options)
    assert compiled.info.regions
    result = co3d.verify(compiled, module, example)
    assert result.passed, result.reason
