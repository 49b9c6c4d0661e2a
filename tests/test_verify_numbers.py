"""Verification of networks that take no numbers below zero: logarithms and roots of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import slow
from torch import Tensor, nn

import co3d_compile as co3d

CLIP = torch.rand(1, 4, 12) + 0.1


class Net(nn.Module):
    """A convolution behind a function of the input."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.conv = first, nn.Conv1d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns one answer per frame."""
        return self.conv(self.first(x))


@pytest.mark.parametrize("first", [torch.log, slow(torch.sqrt), slow(lambda x: x**0.3)], ids=["log", "sqrt", "power"])
def test_what_takes_no_numbers_below_zero_is_verified_on_others(first: Callable[[Tensor], Tensor]) -> None:
    net = Net(first).eval()
    result = co3d.verify(co3d.compile(net, CLIP), net, CLIP)
    assert result.passed and any("numbers from 0 to 1" in note for note in result.notes)


def test_numbers_of_the_example_are_the_last_resort() -> None:
    net, clip = Net(lambda x: torch.log(x - 5)).eval(), CLIP + 6
    result = co3d.verify(co3d.compile(net, clip), net, clip)
    assert result.passed and any("numbers of the example clip" in note for note in result.notes)


def test_normal_numbers_need_no_note() -> None:
    net = Net(torch.tanh).eval()
    assert not co3d.verify(co3d.compile(net, CLIP), net, CLIP).notes


def test_no_finite_number_at_all_is_no_agreement() -> None:
    net = Net(lambda x: x / 0).eval()
    assert not co3d.verify(co3d.compile(net, CLIP), net, CLIP).passed


def test_a_logarithm_in_an_onnx_file_is_read_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "clip.onnx"
    torch.onnx.export(Net(torch.log).eval(), (CLIP,), path, dynamo=False)
    assert co3d.verify(co3d.compile(path), path, None).passed
