"""Forms that few networks have: one small network for each, streamed and compared as all others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check
from small_graphs import conv, fn, of, row
from torch import Tensor, nn
from unlike_streams import streams
from zoo import Entry, Graph

import co3d_compile as co3d

CLIP, PICTURES = (1, 4, 8), (1, 4, 8, 3, 3)


def _samples(m: Any, x: Tensor) -> Tensor:
    """Each frame as 32 samples of a series, which is filtered."""
    series = m.a(x).mT.flatten(1)[:, None]
    return m.b(series).squeeze(1).unflatten(1, (-1, 32)).mT


def _overlapping_places(m: Any, x: Tensor) -> Tensor:
    """Columns of overlapping frames and overlapping places."""
    columns = m.a(x).unflatten(1, (4, 4)).repeat_interleave(3, 3)
    return F.fold(columns.flatten(1, 2), (x.shape[2] + 1, 4), 2, padding=0).mean(3)


def _edge_repeated(m: Any, x: Tensor) -> Tensor:
    first = x[:, :, :1]
    return m.a(torch.cat([first.expand(-1, -1, 3), x], 2)) + m.a(torch.cat([first.repeat(1, 1, 3), x], 2))


def _band_backwards(m: Any, x: Tensor) -> Tensor:
    """A band of products whose columns are read from the last to the first one, as are the rows that they weigh."""
    n, y = x.shape[2], m.a(x)
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() < 2
    order = torch.arange(n - 1, -1, -1)
    return (((y.mT @ y) * near.float())[:, :, order] @ y[:, :, order].mT).mT


def _behind_nothing(m: Any, x: Tensor) -> Tensor:
    """Attention with a band; what it reads stands behind no frames at all."""
    n = x.shape[2]
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs() < 2
    y = torch.cat([x[:, :, :0], x], 2).mT
    return m.a(F.scaled_dot_product_attention(y, y, y, attn_mask=near).mT)


def _by_turns_but_the_last(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.clone()
    z[:, ::2], z[:, 1:-1:2] = 2 * y[:, 2:], 3 * y[:, :1]
    return z


def _rows_of_places(m: Any, x: Tensor) -> Tensor:
    """A kernel over time for each place, with the places in the batch."""
    rows = x.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)
    return m.a(rows).unflatten(0, (x.shape[0], -1)).permute(0, 2, 3, 1)


def _blocks(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).unflatten(2, (-1, 4)).softmax(-1).flatten(2))


RARE = [
    row("frames of 32 samples", fn(_samples, a=lambda: conv(padding=1, out=32),
        b=lambda: conv(c=1, out=1, padding=1)), None, CLIP, tight=False),
    row("places overlap, too", fn(_overlapping_places, a=lambda: conv(padding=1, out=16)), None, CLIP, tight=False),
    row("a maximum over every other sample", of(conv(), nn.MaxPool1d(3, 1, 1, 2)), 5, options={"frames_per_step": 16}),
    row("every other sample, by a maximum", of(conv(), nn.MaxPool1d(1, 2)), None, options={"frames_per_step": 32}),
    row("kernels shorter than a step", of(conv(1), nn.ReLU(), conv(2)), 1, options={"frames_per_step": 3}),
    row("the first frame expanded", fn(_edge_repeated, a=lambda: conv(4)), 0),
    row("places are up-sampled, not frames",
        of(nn.Conv3d(4, 4, 1), nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear")), 0, PICTURES),
    row("the largest place", of(nn.Conv3d(4, 4, (3, 1, 1)), nn.AdaptiveMaxPool3d((None, 1, 1))), 2, PICTURES),
    row("a band from the last column on", fn(_band_backwards, a=lambda: conv(1)), 1, CLIP, tight=False),
    row("nothing in front", fn(_behind_nothing, a=lambda: conv(1)), 1, CLIP, tight=False),
    row("channels by turns, but the last", fn(_by_turns_but_the_last, a=lambda: conv(padding=1)), 1, CLIP),
    row("rows of places", fn(_rows_of_places, a=lambda: conv(padding=1)), 1, (1, 4, 8, 3, 2)),
    row("blocks", fn(_blocks, a=lambda: conv(padding=1), b=lambda: conv()), 6, CLIP, tight=False),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "delay"), RARE)
def test_it_streams(entry: Entry, delay: int | None) -> None:
    facts = check(entry)
    assert not facts.recomputed and delay in (None, *facts.delays)


def test_places_overlap_in_a_single_entry() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        columns = m.down(x).unflatten(1, (4, 4)).repeat_interleave(3, 3).flatten(1, 2)
        return F.fold(columns, (x.shape[2], 4), 2, stride=(2, 1)).mean(3)

    torch.manual_seed(0)
    module, clip = Graph(forward, down=conv(2, 1, 2, out=16)).eval(), torch.randn(1, 4, 2)
    compiled = co3d.compile(module, (clip,))
    assert not compiled.info.recomputed and co3d.verify(compiled, module, (clip,)).passed


ENDS = {
    "a layer behind entries before the first frame": (
        lambda m, x: m.gru(F.pad(m.a(x), (6, 0), value=0.5).mT)[0].mT,
        {"gru": lambda: nn.GRU(4, 3, batch_first=True)},
    ),
    "three layers behind entries before the first frame": (
        lambda m, x: m.c(m.b(m.a(F.pad(x, (8, 0), value=0.5)))),
        {"b": conv, "c": conv},
    ),
    "frames counted": (lambda m, x: m.a(x) * torch.arange(x.shape[2]), {}),
    "edges repeated at both ends": (
        lambda m, x: m.wide(F.pad(m.a(x), (2, 2), mode="replicate")),
        {"wide": lambda: conv(5)},
    ),
    "sums behind a reflection": (lambda m, x: F.pad(m.a(x), (3, 0), mode="reflect").cumsum(2), {}),
    "a reflection in front": (lambda m, x: m.b(F.pad(m.a(x), (3, 0), mode="reflect")), {"b": conv}),
}


@pytest.mark.parametrize("name", ENDS)
def test_it_streams_with_ends(name: str) -> None:
    forward, layers = ENDS[name]
    module = Graph(forward, a=conv(padding=1), **{key: make() for key, make in layers.items()}).eval()
    streams(module, module, [8, 11], clip_frames=12)


def test_entries_outside_are_marked_once_for_all_that_read_them() -> None:
    def states(forward: Any) -> int:
        module = Graph(forward, a=conv(padding=1), b=conv(padding=1), c=conv(5, padding=2)).eval()
        return len(co3d.compile(module, (torch.randn(CLIP),), boundary="exact").info.states)

    # the past that the longer kernel reads is there for the other one, too
    assert states(lambda m, x: m.b(y := m.a(x).relu()) + m.c(y)) <= states(lambda m, x: m.c(m.a(x).relu())) + 1


def _less_its_mean(m: Any, x: Tensor) -> Tensor:
    """A gate over one frame would make it zero."""
    weight, y = torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None], m.a(x)
    return y * weight - y.mean(2, True) * weight


def _attending(*, past: bool) -> Any:
    def forward(m: Any, x: Tensor) -> Tensor:
        seen = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool)
        y = m.a(x).mT
        return F.scaled_dot_product_attention(y, y, y, attn_mask=seen.tril() if past else seen.triu()).mT

    return forward


WINDOWS = {
    "less its mean": (_less_its_mean, "aten.sub"),
    "attention to all of the past": (_attending(past=True), "aten.scaled_dot_product_attention"),
    "attention to all of the future": (_attending(past=False), "aten.scaled_dot_product_attention"),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_it_is_a_window(name: str) -> None:
    forward, operator = WINDOWS[name]
    compiled = co3d.compile(Graph(forward, a=conv(padding=1)).eval(), (torch.randn(CLIP),))
    assert [row.operator for row in compiled.info.recomputed] == [operator]


def test_blocks_are_refused_where_strides_are_dense() -> None:
    module = Graph(lambda m, x: m.a(x).unflatten(2, (-1, 4)).softmax(-1).flatten(2), a=conv(padding=1)).eval()
    with pytest.raises(co3d.UnsupportedError, match="entries for one"):
        co3d.compile(module, (torch.randn(CLIP),), stride_mode="dense")


def test_no_tensor_of_a_head_has_more_than_four_dims() -> None:
    layers = (nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Conv3d(4, 5, 1), nn.ReLU(), nn.Flatten())
    compiled = co3d.compile(nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 6, 6),))
    values = (node.meta.get("val") for node in compiled.program.graph.nodes)
    assert max(value.dim() for value in values if isinstance(value, Tensor)) == 4
