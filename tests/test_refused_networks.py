"""Networks that are refused when they are captured: each message says what cannot be captured, and what to write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from zoo import Graph

import co3d_compile as co3d
from co3d_compile.errors import CaptureError, UnsupportedError


def in_half(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.conv3d(x, torch.ones(4, 3, 3, 3, 3)).float()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (in_half, r"computes in torch\.bfloat16 here\. .*autocast\('cpu', enabled=False\)"),
        (lambda x: torch.fft.rfft2(x).tan().abs(), r"no form in real ones here\. \[aten\.tan\] Use Fourier transforms"),
        (lambda x: torch.fft.rfft2(x), r"The output of the model is complex.* torch\.view_as_real"),
        (lambda x: (None, 3), r"^Graph returns no tensor for such a clip\. .*wrap it in one"),
        (lambda x: x * x.mean().item(), r"takes a number that is read from a tensor\. \[aten\.mul\] Keep it a tensor"),
        (lambda x: x[:, :0], r"returns a tensor without any number in it, of the shape \(2, 0, 4, 8, 8\)\. \[aten"),
    ],
    ids=["bfloat16", "complex operator", "complex output", "nothing", "a number", "empty"],
)
def test_results_that_no_file_can_hold_are_refused(function: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(CaptureError, match=said):
        co3d.compile(Graph(lambda _, x: function(x)), (torch.zeros(1, 3, 4, 8, 8),))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.repeat_interleave(x, torch.full((4,), 2), dim=2), "repeat_interleave"),
        (lambda x: x[x > 0], "index"),
    ],
    ids=["repeat_interleave", "mask"],
)
def test_sizes_that_values_decide_are_refused(function: Callable[[Tensor], Tensor], operator: str) -> None:
    with pytest.raises(CaptureError, match=rf"depends on the values that it is given\. \[aten\.{operator}\]"):
        co3d.compile(Graph(lambda _, x: function(x)), (torch.zeros(1, 3, 4, 8, 8),))


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (lambda x: (x.abs().sum(2) > 0).sum(1), r"by lengths that depend on an input"),
        (lambda x: torch.full((len(x),), 3), r"by lengths that are not that of the clip"),
    ],
    ids=["computed", "shorter"],
)
def test_sequences_packed_by_other_lengths_are_refused(lengths: Callable[[Tensor], Tensor], said: str) -> None:
    model = Graph(lambda m, x: m.rnn(pack_padded_sequence(x, lengths(x), batch_first=True))[1], rnn=nn.GRU(3, 2))
    with pytest.raises(CaptureError, match=rf"{said} \(pack_padded_sequence\)\. A stream has no lengths"):
        co3d.compile(model, (torch.ones(1, 4, 3),), time_dim=1)


def test_strides_from_one_dim_into_another_are_refused() -> None:
    model = Graph(lambda _, x: x.as_strided((x.shape[0], 7, 8, 8), (768, 100, 8, 1)))
    with pytest.raises(UnsupportedError, match=r"from one dim into another\. \[aten\.as_strided\] .*unfold"):
        co3d.compile(model, (torch.zeros(1, 3, 4, 8, 8),))


def test_a_part_that_is_torchscript_is_named() -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()))
    with pytest.raises(CaptureError, match=r"part 1 is TorchScript: build it without torch\.jit\.script"):
        co3d.compile(nn.Sequential(nn.Conv3d(3, 3, 1), part), (torch.zeros(1, 3, 4, 8, 8),))


def test_a_function_of_each_row_is_named_with_its_line() -> None:
    """PyTorch's tracer loses what is in it, and asks for an issue."""
    part = Graph(lambda m, x: torch.vmap(m.conv, in_dims=2, out_dims=2)(x), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(
        CaptureError, match=r"^torch\.vmap .* \(test_refused.*: .*torch\.vmap\(m\.conv.*\[1\] Write it for"
    ):
        co3d.compile(nn.Sequential(nn.Conv3d(3, 3, 1), part), (torch.zeros(1, 3, 4, 8, 8),))
