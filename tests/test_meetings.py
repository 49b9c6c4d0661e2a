"""Networks in which many rules meet, so that the quick tests ask each of them: ends, starts, loops, folded batches.

Each stands for many rows of the tables that take longer (`test_ends`, `test_starts`, `test_recurrent`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import all_but
from oracle import check
from small_graphs import conv, entry, fn, up
from torch import Tensor, nn
from unlike_streams import streams
from zoo import Graph

import co3d_compile as co3d
from co3d_compile.support.machine import block_channels

LATE = 7.0  # below zero a zero outside would win a maximum and pull a mean


def banded(x: Tensor) -> Tensor:
    """Attention of each entry to itself and the three before it."""
    index = torch.arange(x.shape[1])
    seen = (index <= index[:, None]) & (index > index[:, None] - 4)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)


def _pyramid(m: Any, x: Tensor) -> Tensor:
    first, last = x[:, :, 0].unsqueeze(2), x[:, :, -1:]
    y = F.relu(m.a(torch.cat([first, first, x, last], 2))) - LATE
    low = m.down(torch.cat([m.mean(y), m.most(y)], 1))
    return m.z(m.y(F.pad(m.up(low) + y, (5, 0), value=0.5))) + m.smooth(low)


def _heads(m: Any, x: Tensor) -> Any:
    y = m.conv(torch.cat([x, x.flip(1)], 0)).unflatten(1, (2, 2)).flatten(0, 1).transpose(1, 2)
    behind = banded(y).transpose(1, 2).unflatten(0, (-1, 2)).flatten(1, 2)
    y = behind.unflatten(1, (2, 2)).transpose(0, 1).flatten(0, 1).transpose(1, 2)  # heads in front of the batch
    y = banded(y).transpose(1, 2).unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)
    a, b = m.merge(y).unflatten(0, (2, -1))
    edge = F.pad(x, (2, 0), mode="replicate")
    so_far = a.cumsum(2) / torch.arange(1, x.shape[2] + 1)
    return (
        torch.cat([a - b.flip(1), so_far], 1),
        edge.relu(),
        m.mean(so_far - LATE),
        m.b(m.a(F.pad(x, (6, 0), value=0.5))),
    )


def _remembered(m: Any, x: Tensor) -> Any:
    every, (last, _) = m.lstm(F.pad(m.conv(x), (2, 0), value=0.5).transpose(1, 2))
    again = F.pad(every.transpose(1, 2), (2, 1), mode="replicate")
    return m.gru(again.transpose(1, 2))[0].transpose(1, 2), last[-1]


def _autoencoder(m: Any, x: Tensor) -> Tensor:
    x = m.a(torch.cat([x[:, :, :1]] * 2 + [x], 2))
    low = torch.cat([x[:, :, :1], F.avg_pool1d(x[:, :, 1:], 2, 2)], 2)
    low = m.b(torch.cat([low[:, :, :1]] * 2 + [F.silu(low)], 2))
    return m.c(torch.cat([low[:, :, :1], F.interpolate(low[:, :, 1:], scale_factor=2.0)], 2))


def _so_far(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    most, least = y.cummax(2), (-y).unflatten(1, (2, 2)).cummin(3)
    sums = torch.cat([(y > 0).cumsum(2, dtype=x.dtype), y.logcumsumexp(2), (1 + y.tanh() / 9).cumprod(2)], 1)
    return sums, most.values + least.values.flatten(1, 2), most.indices + least.indices.flatten(1, 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int], dict[str, Any]]] = {
    "pyramid": (
        fn(_pyramid, a=lambda: conv(4), mean=lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False),
           most=lambda: nn.MaxPool1d(3, 2, 1), down=lambda: conv(padding=1, c=8), up=lambda: up(4, 2, 1),
           y=lambda: conv(padding=1), z=lambda: conv(6), smooth=lambda: nn.Upsample(scale_factor=2, mode="linear")),
        [8, 12, 14],
        {},
    ),
    "heads": (fn(_heads, a=lambda: conv(padding=1), b=lambda: conv(6), conv=lambda: conv(padding=1),
                 merge=lambda: conv(padding=1),
                 mean=lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False)), [8, 9, 5], {}),
    "remembered": (fn(_remembered, conv=lambda: conv(padding=1), lstm=lambda: nn.LSTM(4, 5, 2, batch_first=True),
                      gru=lambda: nn.GRU(5, 3, batch_first=True)), [8, 11], {}),
    "so far": (fn(_so_far, conv=lambda: conv(padding=1)), [8, 11], {"frames_per_step": 2}),
    "autoencoder": (fn(_autoencoder, a=conv, b=conv, c=lambda: conv(padding=1)), [9, 13], {"clip_frames": 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", all_but(NETWORKS, "heads", "so far"))
def test_streams_of_unlike_length(name: str) -> None:
    build, lengths, options = NETWORKS[name]
    torch.manual_seed(1)
    module = build().eval()
    streams(module, module, lengths, **options)


def _newest(x: Tensor, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduced over the newest eight entries, or as many as there are."""
    return torch.stack([reduced(x[:, :, max(0, n - 7) : n + 1]) for n in range(x.shape[2])], 2)


def _normed(x: Tensor) -> Tensor:
    """Two groups of two channels, by the first two moments of the newest entries."""
    rows = x.unflatten(1, (2, 2))
    mean, square = (_newest(r.mean(2), lambda v: v.mean(2)) for r in (rows, rows.square()))
    return ((rows - mean[:, :, None]) * (square - mean.square() + 1e-5).rsqrt()[:, :, None]).flatten(1, 2)


def test_gates_and_norms_over_a_window_count_what_is_there() -> None:
    def clip(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.a(x))
        return m.b(y * y.mean(2, True).sigmoid() + y.amax(2, True).sigmoid())

    def entries(m: Any, x: Tensor) -> Tensor:
        y = _normed(m.a(x)) * m.norm.weight[:, None] + m.norm.bias[:, None]
        return m.b(y * _newest(y, lambda v: v.mean(2)).sigmoid() + _newest(y, lambda v: v.amax(2)).sigmoid())

    layers = {"a": conv(padding=1), "b": conv(padding=1), "norm": nn.GroupNorm(2, 4)}
    for numbers in layers["norm"].parameters():
        nn.init.normal_(numbers)
    streams(
        Graph(clip, **layers).eval(),
        Graph(entries, **layers).eval(),
        [12, 8, 5],
        pool_scope="window",
        frames_per_step=2,
    )


def _pictures(m: Any, x: Tensor) -> Tensor:
    """Operators on pictures, of frames in the batch: between them time is folded."""
    f = m.conv(x).transpose(1, 2).flatten(0, 1)
    shuffled = F.pixel_shuffle(F.interpolate(F.interpolate(f, (9, 7), mode="bilinear"), (6, 6)), 2).flatten(1)
    sampled = F.grid_sample(
        f, m.grid.weight.view(1, 3, 3, 2).tanh().expand(f.shape[0], -1, -1, -1), align_corners=False
    )
    columns = F.unfold(f, (3, 2), padding=(1, 0), stride=(2, 1)).mean(2)
    joints = torch.bmm(m.joints.weight[None].expand(f.shape[0], -1, -1), f.flatten(2)).amax(2).repeat(2, 1, 1).sum(0)
    cov = torch.matmul(f.flatten(2), f.flatten(2).mT) / 36 + torch.eye(4)
    rows = m.rows(f.mean(1), f.mean((2, 3))[None, :, :3])[0].flatten(1)
    y = torch.cat([shuffled, sampled.flatten(1), columns, joints, torch.linalg.det(cov)[:, None], rows], 1)
    return m.last(y.unflatten(0, (x.shape[0], -1)).transpose(1, 2))


@pytest.mark.slow
def test_operators_on_pictures_stream() -> None:
    layers = {
        "conv": lambda: nn.Conv3d(3, 4, 3, padding=1), "grid": lambda: nn.Embedding(9, 2),
        "rows": lambda: nn.GRU(6, 3, batch_first=True),
        "joints": lambda: nn.Embedding(4, 4), "last": lambda: conv(padding=1, c=227),
    }  # fmt: skip
    facts = check(entry("pictures", fn(_pictures, **layers), (1, 3, 8, 6, 6)))
    assert not facts.recomputed and facts.delays == (2,)


def test_pictures_are_read_at_computed_places_in_every_way() -> None:
    ways = [
        (m, p, a) for m in ("bilinear", "nearest", "bicubic") for p in ("zeros", "border", "reflection") for a in (0, 1)
    ]

    def forward(m: Any, x: Tensor) -> Tensor:
        f = m.conv(x).transpose(1, 2).flatten(0, 1)
        read = [F.grid_sample(f, 1.5 * f[:, :2].movedim(1, 3), *way[:2], align_corners=bool(way[2])) for way in ways]
        return torch.cat(read, 1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    facts = check(entry("sampled", fn(forward, conv=lambda: nn.Conv3d(3, 4, 3, padding=1)), (1, 3, 8, 6, 5)))
    assert not facts.recomputed


def test_channels_and_frames_by_lists_of_indices() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).roll(3, 1)[:, [2, 0, 1, 3]][:, [-3, -2, -1]])
        late = torch.zeros_like(y)
        late[:, :, 1:] = y[:, :, :-1]
        return y[:, :, torch.arange(0, x.shape[2], 2)] + late[:, :, ::2]

    picked = entry("picked", fn(forward, a=lambda: conv(padding=1), b=lambda: conv(padding=1, c=3)))
    facts = check(picked)
    assert not facts.recomputed and facts.frames_per_step == (2,)


@pytest.mark.parametrize("form", ["", "to_native"])
def test_two_frames_a_step_share_convolutions(form: str) -> None:
    """Kernels of three, five and four entries, with more channels than fill a block of the machine's kernels."""
    if form and block_channels() == 1:
        pytest.skip("ONNX Runtime has no blocked layout on this machine")

    def wide(kernel: int) -> nn.Conv3d:
        return nn.Conv3d(18, 18, (kernel, 3, 3), padding=(kernel // 2, 1, 1))

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu()).relu()
        return m.c(y * y.mean((3, 4), True).sigmoid())

    layers = {"a": lambda: wide(3), "b": lambda: wide(5), "c": lambda: wide(4)}
    pairs = entry("pairs", fn(forward, **layers), (1, 18, 8, 6, 6), tight=False, options={"frames_per_step": 2})
    check(pairs, form=form)


def _two_last(m: Any, x: Tensor) -> Tensor:
    """The first frame once more, of some channels, cut before it and behind it; two results in one batch."""
    parted = torch.cat([x[:, :1, :1], x[:, 1:3, :1]], 1)
    a, b = torch.cat([parted, x[:, :3, :1], x[:, :3]], 2), torch.cat([x[:, :, :1][:, 1:], x[:, 1:]], 2)
    both = torch.cat([m.a(a)[:, :, -1], m.b(b)[:, :, -1]], 0).relu().unflatten(0, (2, -1))
    return (both * torch.tensor([1.0, -2.0]).view(2, 1, 1)).sum(0)


def test_the_last_entries_of_two_branches_in_one_batch() -> None:
    torch.manual_seed(0)
    module, clip = fn(_two_last, a=lambda: conv(c=3), b=lambda: conv(c=3, padding=1))().eval(), torch.randn(1, 4, 8)
    compiled = co3d.compile(module, (clip,))
    assert not compiled.info.recomputed
    assert co3d.verify(compiled, module, (clip,)).passed


def _given_back(m: Any, x: Tensor) -> Tensor:
    """What a gate pools, given to every entry again: behind the other dims, in front of them, beside a new one."""
    y, frames = m.a(x), x.shape[2]
    pooled = y.mean(2)
    behind = y * pooled[:, :, None].expand(-1, -1, frames) + y * pooled[:, :, None].repeat(1, 1, frames)
    beside = (y[None].expand(2, -1, -1, -1) * pooled[:, :, None].expand(2, -1, -1, frames).sigmoid()).sum(0)
    front = (y.permute(2, 0, 1) * pooled.expand(frames, -1, -1)).permute(1, 2, 0)
    placed = y * F.interpolate(y.amax(2, True), size=frames, mode="nearest-exact")
    return m.b(placed + behind + beside + front + pooled.mean(1)[:, None, None].repeat(1, 4, frames))


def test_what_a_gate_pools_is_given_back_in_several_ways() -> None:
    torch.manual_seed(0)
    module, clip = fn(_given_back, a=lambda: conv(padding=1), b=conv)().eval(), torch.randn(1, 4, 8)
    compiled = co3d.compile(module, (clip,))
    assert not compiled.info.recomputed
    assert co3d.verify(compiled, module, (clip,)).passed


def test_a_single_entry_is_up_sampled() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        low = m.down(x)
        return F.interpolate(low, scale_factor=2) + m.up(low) + F.interpolate(low, scale_factor=2, mode="linear") + x

    torch.manual_seed(0)
    module, clip = fn(forward, down=lambda: conv(3, 1, 2, 1), up=lambda: up(2, 2))().eval(), torch.randn(1, 4, 2)
    compiled = co3d.compile(module, (clip,))
    assert not compiled.info.recomputed
    assert co3d.verify(compiled, module, (clip,)).passed


def test_a_mean_of_what_is_there_in_float64() -> None:
    module = nn.Sequential(conv(padding=1), nn.AvgPool1d(5, 1, 2, count_include_pad=False)).double().eval()
    clip = torch.randn(1, 4, 8, dtype=torch.float64)
    session = co3d.StreamSession(co3d.compile(module, (clip,), boundary="exact"))
    assert session.info.inputs[0].shape[0] == "N"
    results = [session.step(frame.numpy()) for frame in clip.unbind(2)] + session.flush()
    with torch.no_grad():
        streamed = torch.stack([torch.from_numpy(result) for result in results[3:]], 2)
        torch.testing.assert_close(streamed, module(clip), rtol=0, atol=1e-12)


def _heads_in_front(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).unflatten(1, (2, 2)).transpose(0, 1).flatten(0, 1)
    return (y.softmax(2) * y).sum(2).unflatten(0, (2, -1)).transpose(0, 1).flatten(1)


def _less_the_first(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return (y - y[:, :, :1] - y[:, :, 0].unsqueeze(2)).cumsum(2).softmax(2).amax(2)


def _filled_forward(m: Any, x: Tensor) -> Tensor:
    """Each frame by the last one that was large."""
    y, places = m.a(x), torch.arange(x.shape[2])
    large: Tensor = torch.where(y > 0.3, places, 0 * places).cummax(2).values
    return y.gather(2, large)


NEWEST: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "heads in front of the batch": (fn(_heads_in_front, a=lambda: conv(1)), {}),
    "the first frame of a window": (fn(_less_the_first, a=lambda: conv(1)), {"recurrence": "window"}),
    "places of frames in a window": (fn(_filled_forward, a=lambda: conv(1)), {}),
    "a kernel on the mean": (
        fn(lambda m, x: m.b(m.a(x).mean(2, True))[:, :, 0], a=lambda: conv(1), b=lambda: conv(padding=1)),
        {},
    ),
    "channels and places in one dim": (
        fn(
            lambda m, x: m.b(m.a(x).unflatten(1, (2, 2)).mean(3).flatten(1)),
            a=lambda: conv(1),
            b=lambda: nn.Linear(4, 3),
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", NEWEST)
def test_results_of_the_newest_clip(name: str) -> None:
    build, options = NEWEST[name]
    torch.manual_seed(1)
    module, x = build().eval(), torch.randn(2, 4, 20)
    session = co3d.StreamSession(co3d.compile(module, (torch.randn(1, 4, 8),), **options), batch=2)
    for seen in range(1, 21):
        result = torch.from_numpy(session.step(x[:, :, seen - 1].numpy()))
        if seen > session.info.warmup_steps:
            with torch.no_grad():
                torch.testing.assert_close(result, module(x[:, :, seen - 8 : seen]), atol=1e-5, rtol=0)


def _folded(m: Any, x: Tensor) -> Tensor:
    columns = F.fold(m.a(x), (2 * x.shape[2], 1), (2, 1), stride=(2, 1)).squeeze(3)
    frames = columns.transpose(1, 2).flatten(0, 1).unflatten(1, (2, 1)).expand(-1, -1, 4)
    return F.fold(frames, (3, 3), 1, padding=0, stride=2).flatten(1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def test_columns_are_folded_over_time_and_over_places() -> None:
    facts = check(entry("folded", fn(_folded, a=lambda: conv(padding=1))))
    assert not facts.recomputed and facts.delays == (2,)


def test_a_layer_with_projections() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.lstm(m.a(x).transpose(1, 2))[0].transpose(1, 2)
        return y

    module = Graph(forward, a=conv(padding=1), lstm=nn.LSTM(4, 5, batch_first=True, proj_size=2)).eval()
    streams(module, module, [8, 11])


def test_a_layer_with_projections_over_places() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = m.lstm(x.permute(0, 2, 3, 1).flatten(0, 1))[0]
        y: Tensor = rows.mean(1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return m.a(y)

    torch.manual_seed(0)
    lstm = nn.LSTM(4, 5, batch_first=True, proj_size=2)
    module, clip = Graph(forward, a=conv(padding=1, c=2), lstm=lstm).eval(), torch.randn(1, 4, 8, 5)
    compiled = co3d.compile(module, (clip,))
    assert not compiled.info.recomputed and co3d.verify(compiled, module, (clip,)).passed


def test_pools_over_places_come_first() -> None:
    """What is left to remember is small."""
    for layer in (nn.MaxPool3d((3, 2, 2), (1, 2, 2)), nn.AvgPool3d((3, 2, 2), (1, 2, 2))):
        info = co3d.compile(layer, (torch.randn(1, 3, 8, 6, 6),)).info
        assert {state.shape[-2:] for state in info.states} == {(3, 3)}


def test_each_state_of_a_paired_file_has_an_output() -> None:
    """Also one that takes what another one was."""
    info = co3d.compile(nn.Sequential(conv(5), nn.MaxPool1d(4, 1)), (torch.randn(1, 4, 12),)).info
    assert not {state.output for state in info.states} & {state.input for state in info.states}


def test_a_constant_with_a_row_for_each_frame() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.a(x).unflatten(1, (2, 2)).transpose(2, 3)
        return (y * torch.stack([torch.tensor([2.0, -1.0])] * x.shape[2])).transpose(2, 3).flatten(1, 2)

    facts = check(entry("rows", fn(forward, a=lambda: conv(padding=1))))
    assert not facts.recomputed and facts.delays == (1,)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "trilinear"])
def test_places_are_up_sampled_by_a_broken_factor(mode: str) -> None:
    """Five places become seven: the factor is 1.5, and not 7 / 5."""
    module = nn.Sequential(
        nn.Conv3d(2, 3, 3, padding=1), nn.Upsample(scale_factor=(2.0, 1.5, 1.5), mode=mode), nn.Conv3d(3, 2, 1)
    )
    facts = check(entry("broken", lambda: module, (1, 2, 8, 5, 5)))
    assert not facts.recomputed


def test_norms_of_pictures_add_what_they_say_to_the_variance() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.norm(m.a(x).transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return y

    layers = {"a": lambda: nn.Conv3d(2, 3, 3, padding=1), "norm": lambda: nn.GroupNorm(1, 3, eps=0.5)}
    check(entry("normed", fn(forward, **layers), (1, 2, 8, 5, 5)))
