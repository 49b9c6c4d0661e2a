"""Blocks of time: views that split time into blocks, put blocks together again, or move channels into time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check
from small_graphs import conv, fn, row
from torch import Tensor, nn
from unlike_streams import streams
from zoo import Entry

import co3d_compile as co3d

pytestmark = pytest.mark.slow

CLIP = 12


def attended(x: Tensor, k: int) -> Tensor:
    """Attention of the k entries of each block to each other."""
    n, c, t = x.shape
    rows = x.transpose(1, 2).reshape(n * (t // k), k, c)
    return F.scaled_dot_product_attention(rows, rows, rows).reshape(n, t, c).transpose(1, 2)


def to_channels(x: Tensor, k: int) -> Tensor:
    n, c, t = x.shape
    return x.view(n, c, t // k, k).permute(0, 1, 3, 2).reshape(n, c * k, t // k)


def to_time(x: Tensor, k: int) -> Tensor:
    n, c, t = x.shape
    return x.view(n, c // k, k, t).permute(0, 1, 3, 2).reshape(n, c // k, t * k)


def between(join: Callable[[Any, Tensor], Tensor], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Convolutions before and behind."""
    return fn(
        lambda m, x: m.z(F.relu(join(m, F.relu(m.a(x))))), a=lambda: conv(3, padding=1), z=lambda: conv(3), **layers
    )


def case(name: str, factory: Callable[[], nn.Module], frames: int, entries: int, delay: int) -> Any:
    """A network, its frames and entries per step, and its delay."""
    param = row(name, factory, delay, (1, 4, CLIP))
    return pytest.param(param.values[0], frames, entries, delay, id=param.id)


BLOCKS = [
    case("blocks", fn(lambda m, x: m.a(x).unflatten(2, (-1, 4)).softmax(-1).flatten(2), a=lambda: conv(padding=1)),
         4, 4, 4),
    case("mean of each block", between(lambda m, x: x.unflatten(2, (-1, 3)).mean(-1)), 3, 1, 3),
    case("less the mean of its block", between(lambda m, x: x - x.unflatten(2, (-1, 3)).mean(-1, True).expand(
         -1, -1, -1, 3).flatten(2)), 3, 3, 5),
    case("attention in blocks", between(lambda m, x: attended(x, 4)), 4, 4, 6),
    case("attention beside the way past it", between(lambda m, x: x + attended(x, 2)), 2, 2, 4),
    case("blocks in the batch", between(lambda m, x: m.b(x.unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1))
         .unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(2), b=lambda: conv(3, padding=1)), 4, 4, 6),
    case("norm of each block", between(lambda m, x: F.layer_norm(x.view(x.shape[0], 4, -1, 2), (2,)).view(x.shape)),
         2, 2, 4),
    case("time to channels", between(lambda m, x: m.b(to_channels(x, 2)), b=lambda: conv(3, c=8, padding=1)), 2, 1, 4),
    case("channels to time", between(lambda m, x: to_time(m.b(x), 2), b=lambda: conv(1, out=8)), 1, 2, 4),
    case("channels to time, the first left out", between(lambda m, x: to_time(m.b(x), 2)[:, :, 1:],
         b=lambda: conv(1, out=8)), 1, 2, 5),
    case("there and back", between(lambda m, x: x * to_time(m.b(to_channels(x, 3)), 3),
         b=lambda: conv(3, c=12, out=12, padding=1)), 3, 3, 8),
    case("blocks of blocks", between(lambda m, x: x.unflatten(2, (-1, 3, 2)).cumsum(-1).amax(-2).flatten(2)), 6, 2, 4),
    case("blocks of 4, then of 2", between(lambda m, x: attended(attended(x, 4) * 2, 2)), 4, 4, 6),
    case("channels to time, and their stride", between(lambda m, x: to_time(m.b(x), 2)[:, :, ::2],
         b=lambda: conv(1, out=8)), 1, 1, 3),
    case("the result in blocks", fn(lambda m, x: to_channels(m.a(x), 2), a=lambda: conv(padding=1)), 2, 1, 1),
    case("the result in time", fn(lambda m, x: to_time(m.a(x), 2), a=lambda: conv(padding=1)), 1, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "frames", "entries", "delay"), BLOCKS)
def test_a_step_takes_and_gives_whole_blocks(entry: Entry, frames: int, entries: int, delay: int) -> None:
    facts = check(replace(entry, tight=False))
    compiled = co3d.compile(entry.build(), entry.examples())
    assert (facts.frames_per_step, facts.delays) == ((frames,), (delay,))
    assert not facts.recomputed and not compiled.info.regions
    (output,) = compiled.info.outputs
    assert output.entries_per_step == entries


@pytest.mark.parametrize(("entry", "frames", "entries", "delay"), BLOCKS)
def test_with_ends(entry: Entry, frames: int, entries: int, delay: int) -> None:
    module = entry.build()
    streams(module, module, [12, 24], CLIP)


ONE_EACH = ["mean of each block", "time to channels", "the result in blocks", "the result in time"]
"""Without something behind whole blocks that takes their frames apart again."""


@pytest.mark.parametrize("entry", [pytest.param(p.values[0], id=p.id) for p in BLOCKS])
def test_dense_strides_have_no_blocks(entry: Entry) -> None:
    if entry.name in ONE_EACH:
        dense = co3d.compile(entry.build(), entry.examples(), stride_mode="dense")
        assert co3d.verify(dense, entry.build(), entry.examples()).passed and not dense.info.recomputed
        return
    with pytest.raises(co3d.UnsupportedError, match=r"has no meaning with stride_mode='dense'.*aten\."):
        co3d.compile(entry.build(), entry.examples(), stride_mode="dense")


@pytest.mark.parametrize("name", ["attention in blocks", "time to channels", "channels to time", "there and back"])
def test_what_is_said_is_verified(name: str) -> None:
    (entry,) = (p.values[0] for p in BLOCKS if p.values[0].name == name)
    compiled = co3d.compile(entry.build(), entry.examples())
    assert co3d.verify(compiled, entry.build(), entry.examples()).passed


class Parts(nn.Module):
    """Three parts of the clip, however long it is: the mean of each, and a softmax over the three."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(2, (3, -1)).mean(-1).softmax(2).amax(2)


def test_parts_that_grow_with_the_clip_are_no_blocks() -> None:
    module, clip = Parts().eval(), torch.randn(1, 4, CLIP)
    compiled = co3d.compile(module, (clip,))
    assert compiled.report().recomputed
    assert tuple(compiled.info.frames_per_step.values()) == (1,)
    assert co3d.verify(compiled, module, (clip,)).passed


def test_that_blocks_stay_as_long_is_assumed_of_an_exported_program() -> None:
    module, clip = (
        nn.Sequential(conv(padding=1), nn.Unflatten(2, (-1, 3)), nn.Softmax(-1)).eval(),
        torch.randn(1, 4, 12),
    )
    exported = torch.export.export(module, (clip,))
    with pytest.warns(co3d.Co3dWarning, match="splits time into blocks"):
        compiled = co3d.compile(exported)
    assert tuple(compiled.info.frames_per_step.values()) == (3,)
    assert co3d.verify(compiled, exported).passed


# Time in other orders than frame after frame: these are computed on the newest clip.
NO_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other frame beside its neighbour": lambda x: x.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2).cumsum(2),
    "halves": lambda x: x.view(*x.shape[:2], 2, -1).softmax(-1).flatten(2),
    "over blocks": lambda x: x.unflatten(2, (-1, 3)).softmax(2).flatten(2),
}


@pytest.mark.parametrize("name", NO_BLOCKS)
def test_what_has_no_blocks_is_a_window(name: str) -> None:
    module, clip = fn(lambda m, x: NO_BLOCKS[name](m.a(x)), a=lambda: conv(padding=1))().eval(), torch.randn(1, 4, CLIP)
    compiled = co3d.compile(module, (clip,))
    assert compiled.report().recomputed
    assert co3d.verify(compiled, module, (clip,)).passed


@pytest.mark.parametrize("masked", [False, True])
def test_a_last_block_that_is_padded_is_behind_the_stream(masked: bool) -> None:
    """Attention in blocks of four, of 10 frames: the last block is half empty."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, t = m.a(x), x.shape[2]
        missing = -t % 4
        rows = F.pad(y, (0, missing)).transpose(1, 2).unflatten(1, (-1, 4))
        scores = rows @ rows.mT
        if masked:
            mask = F.pad(torch.ones(x.shape[0], t), (0, missing)).view(x.shape[0], -1, 1, 4)
            scores = scores.masked_fill(mask == 0, -1e9)
        return (scores.softmax(-1) @ rows).flatten(1, 2)[:, :t]

    torch.manual_seed(0)
    net, x = fn(forward, a=lambda: conv(padding=1))().eval(), torch.randn(1, 4, 24)
    compiled = co3d.compile(net, torch.randn(1, 4, 10))
    assert not compiled.report().recomputed and co3d.verify(compiled, net, torch.randn(1, 4, 10)).passed
    session = co3d.StreamSession(compiled, threads=1)
    (delay,) = session.info.delays.values()
    got = torch.cat([torch.from_numpy(session.step(x[:, :, t : t + 4].numpy())) for t in range(0, 24, 4)], 1)
    assert torch.allclose(got[:, delay + 4 :], net(x)[:, 4 : 24 - delay], atol=1e-5)
