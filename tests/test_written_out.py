"""Operators that are written out in smaller ones: found again by their arithmetic, and compiled as what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from marks import few
from torch import Tensor, nn

import co3d_compile as co3d

CLIP = (1, 3, 9, 4, 4)
CHANNELS = torch.arange(1.0, 5.0)


class Written(nn.Module):
    """A convolution over time, and what is written behind it."""

    def __init__(self, written: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 4, (3, 1, 1))
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self.conv(x))


def layer_norm(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 4, 1)
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * CHANNELS + 0.5


def scaled_norm(x: Tensor) -> Tensor:
    """As speech separation writes it: a scale and a shift belong to what is found first."""
    x = x.permute(0, 2, 3, 4, 1)
    centred = x - x.mean(-1, keepdim=True)
    return CHANNELS * centred / ((centred**2).mean(-1, keepdim=True) + 1e-8) ** 0.5 + 0.5


def folded_norm(x: Tensor) -> Tensor:
    """As Keras writes it: scale and shift are taken into the mean and the deviation."""
    mean = x.mean((1, 2, 3, 4), True)
    inverse = torch.rsqrt((x * x).mean((1, 2, 3, 4), True) - mean * mean + 1e-3) * 2
    return x * inverse + (1 - mean * inverse)


def group_norm(x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0], 2, -1)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return y.reshape(x.shape) * CHANNELS.view(1, 4, 1, 1, 1) + torch.ones(4).view(1, 4, 1, 1, 1)


def group_norm_by_instances(x: Tensor) -> Tensor:
    y = F.instance_norm(x.reshape(x.shape[0], 2, -1), weight=torch.tensor([1.0, 2.0]), bias=torch.zeros(2))
    return y.reshape(x.shape)


def tokens(x: Tensor) -> Tensor:
    return x.mean((3, 4)).transpose(1, 2)


def standardised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dims, True)) * torch.rsqrt(x.var(dims, unbiased=False, keepdim=True) + 1e-3)


def attention(x: Tensor) -> Tensor:
    y = tokens(x)
    return torch.softmax(y @ y.transpose(1, 2) * 4**-0.5, -1) @ y


def banded_attention(x: Tensor) -> Tensor:
    y = tokens(x)
    distance = torch.arange(y.shape[1])[:, None] - torch.arange(y.shape[1])[None]
    scores = (y * 0.7) @ (y * 0.7).transpose(1, 2)
    return torch.softmax(scores.masked_fill((distance < 0) | (distance > 2), -math.inf), -1) @ y


NOT_FOUND: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "aten.silu": lambda x: x * torch.sigmoid(x + 0.01),
    "aten.instance_norm": lambda x: (x - x.mean((2, 3, 4), True)) * torch.rsqrt(x.var((2, 3, 4), keepdim=True) + 1e-3),
    "aten.layer_norm": lambda x: x * torch.rsqrt((x * x).mean(-1, True) + 1e-5),
    "aten.scaled_dot_product_attention": lambda x: torch.softmax(tokens(x) @ tokens(x).mT, 1) @ tokens(x),
}
"""What is near to an operator and is another one."""

FOUND: dict[str, tuple[str, Callable[[Tensor], Tensor], int]] = {
    "gelu": ("aten.gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), 3),
    "gelu by tanh": (
        "aten.gelu", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), 3),
    "silu": ("aten.silu", lambda x: x * (1 / (1 + torch.exp(-x))), 3),
    "hardswish": ("aten.hardswish", lambda x: x * torch.clamp(x + 3, 0, 6) / 6, 3),
    "mish": ("aten.mish", lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), 3),
    "layer norm": ("aten.layer_norm", layer_norm, 3),
    "layer norm scaled inside, and what follows": ("aten.layer_norm", lambda x: scaled_norm(x).relu() + 1, 3),
    "layer norm over the clip": ("aten.layer_norm", folded_norm, 9),
    "instance norm": (
        "aten.instance_norm",
        lambda x: (x - x.mean((2, 3, 4), True)) * torch.rsqrt(x.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-3),
        3),
    "norm of each token": ("aten.instance_norm", lambda x: standardised(tokens(x), (-1,)), 3),
    "norm of each frame": ("aten.instance_norm", lambda x: standardised(x.transpose(1, 2), (2, 3, 4)), 3),
    "group norm": ("aten.group_norm", group_norm, 3),
    "group norm by instances": ("aten.group_norm", group_norm_by_instances, 3),
    "attention": ("aten.scaled_dot_product_attention", attention, 9),
    "banded attention": ("aten.scaled_dot_product_attention", banded_attention, 5),
}  # fmt: skip
"""The operator that is written out, how, and the receptive field of the network."""


def operators(compiled: co3d.CompiledModel) -> set[str]:
    return {row.operator for row in compiled.program.notes.survey}


@pytest.mark.parametrize("name", few(FOUND, "banded attention", "group norm", "norm of each token", "silu"))
def test_what_is_written_out_is_one_operator(name: str) -> None:
    operator, written, field = FOUND[name]
    network, clip = Written(written).eval(), (torch.rand(CLIP),)
    compiled = co3d.compile(network, clip)
    assert compiled.info.receptive_field == field
    assert operator in operators(compiled)
    assert co3d.verify(compiled, network, clip).passed


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_near_to_an_operator_is_another_one(name: str) -> None:
    network, clip = Written(NOT_FOUND[name]).eval(), (torch.rand(CLIP),)
    compiled = co3d.compile(network, clip)
    assert name not in operators(compiled)
    assert co3d.verify(compiled, network, clip).passed


def test_a_written_norm_is_a_norm_over_the_newest_window() -> None:
    """Of mean and variance by themselves, the window's mean would be that of each entry's own window."""
    network, clip = Written(FOUND["instance norm"][1]).eval(), (torch.rand(CLIP),)
    compiled = co3d.compile(network, clip, pool_scope="window")
    with co3d.StreamSession(compiled) as session:
        for frame in clip[0].unbind(2):
            result = session.step(frame.numpy())
    with torch.no_grad():
        expected = network(clip[0])[:, :, -1]
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)


def test_a_norm_that_scales_each_frame_is_a_window() -> None:
    """Where frames stand for channels, there is one scale for each frame of the clip."""
    torch.manual_seed(0)
    network, clip = nn.Sequential(nn.InstanceNorm1d(8, affine=True), nn.Linear(6, 4)).eval(), (torch.rand(1, 8, 6),)
    nn.init.uniform_(network[0].weight)
    with pytest.warns(co3d.Co3dWarning, match="Nothing gained"):
        compiled = co3d.compile(network, clip, time_dim=1)
    assert compiled.info.recomputed and co3d.verify(compiled, network, clip).passed


class Heads(nn.Module):
    """Four heads of queries on two of keys and values, each of which stands for two."""

    def __init__(self, repeated: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(12, 24)
        self.repeated = repeated

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 3)).transpose(1, 2) for y in self.qkv(x).split([12, 6, 6], -1))
        if self.repeated is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v))


def kept(repeated: Callable[[Tensor], Tensor] | None) -> int:
    """Numbers in the states."""
    network, clip = Heads(repeated).eval(), (torch.rand(1, 8, 12),)
    compiled = co3d.compile(network, clip, time_dim=1)
    assert co3d.verify(compiled, network, clip).passed
    return sum(math.prod(size for size in state.shape if isinstance(size, int)) for state in compiled.info.states)


@pytest.mark.parametrize(
    "repeated",
    [
        lambda k: k.repeat_interleave(2, 1),
        lambda k: k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(k.shape[0], 4, *k.shape[2:]),
    ],
)
def test_heads_that_are_repeated_are_kept_once(repeated: Callable[[Tensor], Tensor]) -> None:
    assert kept(repeated) == kept(None)


def test_heads_in_another_order_are_kept_as_they_are() -> None:
    assert kept(lambda k: k.repeat(1, 2, 1, 1)) > kept(None)
