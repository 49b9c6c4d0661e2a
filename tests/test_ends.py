"""`boundary="exact"`: the streamed and flushed sequence is the untouched model's own output on the whole clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import open_session
from oracle_ends import check_boundary
from small_graphs import conv, fn, of, row, up
from torch import Tensor, nn
from unlike_streams import run, streams
from zoo import Entry, Reference, Window, randomise
from zoo.longclip import eager

import co3d_compile as co3d

pytestmark = pytest.mark.slow

SHAPE = (1, 4, 12)
LATE = 7.0  # shifts values so that a zero in place of what the clip reads is the largest or a gross error


def below(layer: nn.Module) -> Callable[[], nn.Module]:
    """The layer on values below zero: a zero outside would win a maximum and pull a mean."""
    return fn(lambda m, x: m.layer(m.conv(x) - LATE), layer=lambda: layer, conv=lambda: conv(padding=1))


POOLS = [
    row("max pool", below(nn.MaxPool1d(3, 1, 1)), None),
    row("max pool 3 2 1", below(nn.MaxPool1d(3, 2, 1)), None),
    row("max pool dilated", below(nn.MaxPool1d(3, 1, 1, dilation=2)), None),
    row("max pool ceil", below(nn.MaxPool1d(3, 2, ceil_mode=True)), None),
    row("max pool long past", below(nn.MaxPool1d(8, 1, 4)), None),
    row("max pool 3d", fn(lambda m, x: m.pool(m.conv(x) - LATE), pool=lambda: nn.MaxPool3d(3, (1, 2, 2), 1),
                          conv=lambda: nn.Conv3d(3, 4, 3, padding=1)), None, (1, 3, 8, 6, 6)),
    row("average pool", below(nn.AvgPool1d(3, 1, 1)), None),
    row("average pool, no pad counted", below(nn.AvgPool1d(3, 1, 1, count_include_pad=False)), None),
    row("average pool ceil", below(nn.AvgPool1d(3, 2, ceil_mode=True)), None),
    row("average pool ceil, pad counted", below(nn.AvgPool1d(4, 3, 1, ceil_mode=True)), None),
    row("average pool ceil, no pad counted", below(nn.AvgPool1d(4, 3, 1, ceil_mode=True, count_include_pad=False)),
        None),
    row("average pool, divisor", lambda: nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0), divisor_override=5), None,
        (1, 3, 8, 4, 4)),
    row("average pool, divisor, no pad counted", lambda: nn.AvgPool3d(3, 1, 1, count_include_pad=False,
                                                                      divisor_override=5), None, (1, 3, 8, 4, 4)),
    row("average pool 3d, no pad counted", lambda: nn.AvgPool3d(3, 1, 1, count_include_pad=False), None,
        (1, 3, 8, 4, 4)),
]  # fmt: skip

PADS = [
    row("convolutions with a bias", of(conv(padding=1), nn.ReLU(), conv(5, padding=2), conv(padding=2)), None),
    row("causal pad", fn(lambda m, x: m.b(F.pad(m.a(F.pad(x, (2, 0))), (2, 0))), a=conv, b=conv), 0),
    row("causal pad and crop", fn(lambda m, x: m.b(m.a(x)[:, :, :-2]), a=lambda: conv(padding=2),
                                  b=lambda: conv(padding=1)), None),
    row("bias on a causal pad", fn(lambda m, x: m.b(F.pad(m.a(F.pad(x, (3, 0))), (2, 0))), a=lambda: conv(1), b=conv),
        None),
    row("unlike entries before the first frame", fn(lambda m, x: m.b(m.a(F.pad(x, (6, 0), value=0.5))),
                                                    a=lambda: conv(padding=1), b=lambda: conv(6)), None),
    row("constant pad", fn(lambda m, x: m.conv(F.pad(x, (2, 3), value=1.5)), conv=lambda: conv(5)), None),
    row("constant causal pad", fn(lambda m, x: m.conv(F.pad(x, (8, 0), value=-1.0)), conv=lambda: conv(3, 4)), 0),
    row("replicate pad", lambda: nn.Sequential(conv(padding=1), nn.ReplicationPad1d((2, 1)), conv(4)), None),
    row("causal replicate pad", fn(lambda m, x: m.conv(F.pad(x, (2, 0), mode="replicate")), conv=conv), 0),
    row("replicate in a convolution", of(conv(padding=1), conv(padding=1, padding_mode="replicate")), None),
    row("replicate by concatenation", fn(lambda m, x: m.conv(torch.cat([x[:, :, :1], x[:, :, :1], x, x[:, :, -1:]], 2)),
                                         conv=lambda: conv(4)), None),
    row("concat of zeros", fn(lambda m, x: m.conv(torch.cat([x.new_zeros(1, 4, 2), m.a(x), x.new_zeros(1, 4, 1)], 2)),
                              conv=conv, a=lambda: conv(padding=1)), None),
    row("shift", fn(lambda m, x: m.b(torch.cat([(y := m.a(x))[:, :, 1:], y.new_zeros(1, 4, 1)], 2)),
                    a=lambda: conv(padding=1), b=lambda: conv(padding=1)), None),
    row("shift, negated", fn(lambda m, x: m.b(1 - torch.cat([(y := m.a(x)).new_zeros(1, 4, 1), y[:, :, :-1]], 2)),
                             a=lambda: conv(padding=1), b=lambda: conv(padding=1)), None),
    row("pad of the result", fn(lambda m, x: F.pad(x, (3, 0), value=2.0)), 0),
    row("crop at the end", fn(lambda m, x: m.conv(x[:, :, :-3]), conv=lambda: conv(padding=1)), None),
    row("crops", fn(lambda m, x: m.b(m.a(x)[:, :, 2:-1]), a=lambda: conv(padding=1), b=lambda: conv(5, padding=2)),
        None),
]  # fmt: skip


def both(x: Tensor, front: int = 2, back: int = 2) -> Tensor:
    return F.pad(x, (front, back), mode="replicate")


def tokens(x: Tensor, dim: int = 1) -> Tensor:
    """The edges of (N, T, C), each repeated twice by ``cat``."""
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([first, first, x, last, last], dim)


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x[:, :, :-1]], 2)


def recurrent(kind: type[nn.RNNBase], pad: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return fn(lambda m, x: m.conv(m.layer(pad(x).transpose(1, 2))[0].transpose(1, 2)),
              layer=lambda: kind(4, 4, batch_first=True), conv=lambda: conv(padding=1))  # fmt: skip


def banded(x: Tensor) -> Tensor:
    """Attention of each entry to itself and the three before it."""
    index = torch.arange(x.shape[1])
    seen = (index <= index[:, None]) & (index > index[:, None] - 4)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)


# Copies of an entry at the edge: what reads them may come before that entry does.
EDGES = [
    row("moving average of tokens", fn(lambda m, x: x - m.pool(
        tokens(x.transpose(1, 2)).permute(0, 2, 1)), pool=lambda: nn.AvgPool1d(5, 1)), None),
    row("frames in the batch", fn(lambda m, x: m.b(m.a(tokens(x.transpose(1, 2)).flatten(0, 1)).unflatten(
        0, (x.shape[0], -1)).transpose(1, 2)), a=lambda: nn.Conv2d(3, 4, 3, padding=1),
        b=lambda: nn.Conv3d(4, 4, (5, 1, 1))), None, (1, 3, 8, 4, 4)),
    row("edges and a gate", fn(lambda m, x: m.a((y := both(x)) * torch.sigmoid(m.g(y))), a=lambda: conv(5),
                               g=lambda: conv(1)), None),
    row("edges in front, zeros behind", fn(lambda m, x: m.a(torch.cat([x[:, :, :1], x, x.new_zeros(1, 4, 1)], 2)),
                                           a=conv), None),
    row("edges under padding", of(nn.ReplicationPad1d(1), conv(5, padding=2), conv()), None),
    row("edges under a long padding", of(conv(padding=1), nn.ReplicationPad1d(2), conv(padding=1), conv(4)), None),
    row("edges under a pool", of(nn.ReplicationPad1d(2), nn.MaxPool1d(3, 1, 1)), None),
    row("edges under a mean of what is there", of(nn.ReplicationPad1d(2), nn.AvgPool1d(3, 1, 1, False, False)), None),
    row("edges of a padding", fn(lambda m, x: m.a(both(F.pad(x, (3, 0), value=1.5))), a=lambda: conv(4)), None),
    row("edges of edges", fn(lambda m, x: m.a(both(both(x, 1, 1), 2, 1)), a=lambda: conv(5)), None),
    row("edges, cropped", fn(lambda m, x: m.a(y := both(x)) + m.b(y[:, :, 1:-1]) + y[:, :, 2:-2], a=lambda: conv(5),
                             b=conv), None),
    row("edges of two", fn(lambda m, x: both(x, 2, 0) + both(m.a(x), 1, 1), a=lambda: conv(padding=1)), None),
    row("edges, counted", fn(lambda m, x: m.a((y := both(x)) + torch.arange(y.shape[2])), a=lambda: conv(5)), None),
    row("edges of the result", fn(lambda m, x: F.relu(both(m.a(x), 2, 0)), a=lambda: conv(padding=1)), None),
    row("edges of the input", fn(lambda m, x: F.relu(both(x, 2, 0))), 0),
    row("last entry again", fn(lambda m, x: F.relu(both(x, 0, 2))), 0),
    row("more edges than are read", fn(lambda m, x: m.a(both(x, 4, 0)), a=conv), 0),
    row("lags with edges", fn(lambda m, x: m.a(torch.cat([both(x, n, 0)[:, :, : x.shape[2]] for n in range(4)], 1)),
                              a=lambda: conv(1, c=16)), 0),
    row("difference with an edge", fn(lambda m, x: m.a(x - shifted(x)), a=lambda: conv(padding=1)), None),
    row("difference, edge of it", fn(lambda m, x: both(x[:, :, 1:] - x[:, :, :-1], 1, 0) + x), None),
    row("edges, transposed convolution", fn(lambda m, x: m.a(both(x)), a=lambda: up(3, 1, 1)), None),
    row("edges, strides, edges", of(nn.ReplicationPad1d(1), conv(3, 1, 2), nn.ReplicationPad1d(2), conv(5)), None),
    row("edges, attention", fn(lambda m, x: m.a(banded(both(x, 2, 0).transpose(1, 2)).transpose(1, 2)),
                               a=lambda: conv(padding=1)), None),
    row("edges, 4 frames a step", of(conv(padding=1), nn.ReplicationPad1d(2), nn.ReLU(), conv(5)), None,
        options={"frames_per_step": 4}),
    row("edges of the result, 4 frames a step", fn(lambda m, x: F.relu(both(m.a(x), 2, 0)), a=lambda: conv(padding=1)),
        None, options={"frames_per_step": 4}),
]  # fmt: skip

# What remembers for good and begins before the first frame.
EARLY = [
    *(row(f"padding under {kind.__name__}", recurrent(kind, lambda x: F.pad(x, (2, 0), value=0.5)), None)
      for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    row("padding under an LSTM, 4 frames a step", recurrent(nn.LSTM, lambda x: F.pad(x, (3, 0), value=0.5)), None,
        options={"frames_per_step": 4}),
    row("edges under an LSTM", recurrent(nn.LSTM, both), None),
    row("padding under a cumulative sum", fn(lambda m, x: F.pad(x, (2, 0), value=0.5).cumsum(2)), 0),
    row("edges under a cumulative sum", fn(lambda m, x: both(x).cumsum(2)), 0),
    row("moving sum", fn(lambda m, x: (s := F.pad(x, (3, 0)).cumsum(2))[:, :, 3:] - s[:, :, :-3]), None),
]  # fmt: skip

GRAPHS = [
    row("residual", fn(lambda m, x: (y := m.a(x)) + m.b(F.relu(y + m.c(y))), a=lambda: conv(padding=1),
                       b=lambda: conv(5, padding=2), c=lambda: conv(padding=1)), None),
    row("concat", fn(lambda m, x: m.c(torch.cat([x, m.a(x), m.b(x)], 1)), a=lambda: conv(padding=1),
                     b=lambda: conv(5, padding=2), c=lambda: conv(padding=1, c=12)), None),
    row("strides", of(conv(padding=1), conv(3, 1, 2, 1), nn.ReLU(), conv(padding=1), conv(3, 1, 2, 1), conv(padding=1)),
        None),
    row("strided shortcut", fn(lambda m, x: m.b(m.short(x) + m.a(x)), a=lambda: conv(3, 1, 2, 1),
                               b=lambda: conv(padding=1), short=lambda: conv(1, 1, 2)), None),
    row("down and up", fn(lambda m, x: m.b(m.up(m.down(x)) + m.a(x)), a=lambda: conv(padding=1), up=lambda: up(4, 2, 1),
                          b=lambda: conv(padding=1), down=lambda: conv(3, 1, 2, 1)), None),
    row("linear up-sampling", of(conv(padding=1), nn.Upsample(scale_factor=2, mode="linear"), conv(padding=1)), None),
    row("4 frames a step", of(conv(padding=1), nn.MaxPool1d(3, 1, 1), conv(5, padding=2)), None,
        options={"frames_per_step": 4}),
    row("replicate, 4 frames a step", of(conv(padding=1), nn.ReplicationPad1d((2, 1)), conv(4)), None,
        options={"frames_per_step": 4}),
    row("attention of joints", fn(lambda m, x: banded(x.permute(0, 3, 2, 1).flatten(0, 1)).unflatten(
        0, (-1, 3)).permute(0, 3, 2, 1)), None, (1, 4, 12, 3)),
    row("attention of heads in the batch", fn(lambda m, x: banded(m.conv(x).unflatten(1, (2, 2)).flatten(
        0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, (-1, 2)).flatten(1, 2),
        conv=lambda: conv(padding=1)), None),
    row("cumulative sum", fn(lambda m, x: m.conv(x).cumsum(2), conv=lambda: conv(padding=1)), None),
    row("mean of all so far, its count expanded", fn(lambda m, x: m.conv(x).cumsum(2) / torch.arange(
        1, x.shape[2] + 1)[None, None].expand(1, 4, -1), conv=lambda: conv(padding=1)), None),
    row("counted, in more channels", fn(lambda m, x: m.conv(x) + torch.arange(x.shape[2]).expand(1, 4, -1),
                                        conv=lambda: conv(padding=1, out=1)), None),
    row("above its count", fn(lambda m, x: (m.conv(x) > torch.arange(x.shape[2]) / 8).float(),
                              conv=lambda: conv(padding=1)), None),
    row("tokens counted", fn(lambda m, x: (m.conv(x).transpose(1, 2).flatten(1) + 0.25 * torch.arange(
        4 * x.shape[2])).unflatten(1, (-1, 4)).transpose(1, 2), conv=lambda: conv(padding=1)), None),
    row("steps counted", fn(lambda m, x: m.conv(x) + torch.arange(x.shape[2]), conv=lambda: conv(padding=1)), None),
    row("steps counted by a sum of ones", fn(lambda m, x: m.conv(x).cumsum(2) / torch.ones_like(x[:, :1]).cumsum(2),
                                             conv=lambda: conv(padding=1)), None),
]  # fmt: skip


def head(name: str, result: Callable[[Tensor], Tensor], **fields: Any) -> Any:
    def make(module: Any) -> Reference:
        return Reference(module.conv, (Window(result),))

    return row(name, fn(lambda m, x: result(m.conv(x)), conv=lambda: conv(padding=1)), None, SHAPE, reference=make,
               expect="window", **fields)  # fmt: skip


HEADS = [
    head("mean head", lambda x: x.mean(2)),
    head("maximum head", lambda x: x.amax(2)),
    head("softmax head", lambda x: x.softmax(2).amax(2)),
    head("mean head, 4 frames a step", lambda x: x.mean(2), options={"frames_per_step": 4}),
    head("last entry, 4 frames a step", lambda x: x[:, :, -1], options={"frames_per_step": 4}),
]


@pytest.mark.parametrize("case", [pytest.param(p.values[0], id=p.id) for p in [*POOLS, *PADS, *EDGES, *EARLY, *GRAPHS]])
def test_both_ends(case: Entry) -> None:
    check_boundary(case, clips=2)


@pytest.mark.parametrize("case", [pytest.param(p.values[0], id=p.id) for p in HEADS])
def test_the_last_result_is_the_clips_own_answer(case: Entry) -> None:
    check_boundary(case)


@pytest.mark.parametrize(("case", "delay"), [p for p in [*PADS, *EDGES, *EARLY] if p.values[1] is not None])
def test_what_is_causal_stays_without_delay(case: Entry, delay: int) -> None:
    compiled = co3d.compile(case.build(), case.examples(), boundary="exact")
    assert tuple(compiled.info.delays.values()) == (delay,)


class Tagger(nn.Module):
    """A convolution and an LSTM behind it, scores per frame and from the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm = conv(padding=1), nn.LSTM(4, 5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        every, (last, _) = self.lstm(self.conv(x).transpose(1, 2))
        return every.transpose(1, 2), last[-1]


def gated(mean: Callable[[Tensor], Tensor]) -> nn.Module:
    def block() -> nn.Module:
        return nn.Conv3d(4, 4, 3, padding=1)

    return fn(lambda m, x: m.b((y := m.a(x)) * torch.sigmoid(mean(y))), a=block, b=block)()


def newest(x: Tensor, window: int) -> Tensor:
    """The mean over the newest entries, as many as there are."""
    x = x.mean((3, 4), True)
    return torch.stack([x[:, :, max(0, n + 1 - window) : n + 1].mean(2) for n in range(x.shape[2])], 2)


@pytest.mark.parametrize("index", [0, 3, -2])
@pytest.mark.parametrize("pulse", [1, 4])
def test_the_last_selection_is_that_of_the_last_clip(index: int, pulse: int) -> None:
    module = fn(lambda m, x: m.b(m.a(x))[:, :, index], a=lambda: conv(padding=1), b=lambda: conv(5, padding=2))()
    at = index % 8 - 8

    def expected(clip: Tensor) -> Tensor:
        return module.get_submodule("b")(module.get_submodule("a")(clip))[:, :, at]

    streams(module, expected, [8, 12, 16], frames_per_step=pulse)


@pytest.mark.parametrize("options", [{}, {"frames_per_step": 4}, {"state_io": "renamed"}], ids=str)
def test_streams_end_at_different_steps(options: dict[str, Any]) -> None:
    module = of(conv(padding=1), nn.MaxPool1d(3, 1, 1), nn.ReLU(), conv(5, padding=2))().eval()
    streams(module, module, [9, 4, 14], **options)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_strided_windows_by_unfold_in_streams_of_any_length(size: int) -> None:
    module = fn(lambda m, x: m.a(x.unfold(2, size, 2).amax(-1)), a=lambda: conv(padding=1))().eval()
    streams(module, module, [8, 9, 13, 14, 15])


def test_columns_of_a_kernel_over_time_in_streams_of_any_length() -> None:
    def columns(m: Any, x: Tensor) -> Tensor:
        y = F.unfold(x[..., None], (3, 1), padding=(1, 0), stride=(2, 1))
        return m.b(m.a(y))

    module = fn(columns, a=lambda: conv(1, c=12), b=lambda: conv(padding=1))().eval()
    streams(module, module, [8, 9, 13, 14, 15])


@pytest.mark.parametrize("pulse", [4, 8])
def test_strided_streams_of_any_length(pulse: int) -> None:
    module = of(
        conv(3, 1, 2, 1), nn.ReLU(), conv(padding=1), nn.MaxPool1d(2, 2, ceil_mode=True), conv(padding=1)
    )().eval()
    streams(module, module, [16, 9, 13, 6], frames_per_step=pulse)


def test_a_recurrent_layer_keeps_its_state_at_the_ends() -> None:
    torch.manual_seed(1)
    module = Tagger().eval()
    streams(module, module, [8, 5, 11])


def test_a_gate_over_one_frame() -> None:
    torch.manual_seed(1)
    module = gated(lambda y: y.mean((2, 3, 4), True)).eval()
    expected = gated(lambda y: y.mean((3, 4), True)).eval()
    expected.load_state_dict(module.state_dict())
    streams(module, expected, [8, 5])


@pytest.mark.parametrize("pulse", [1, 4])
def test_a_gate_over_a_window_counts_what_is_there(pulse: int) -> None:
    torch.manual_seed(1)
    module = gated(lambda y: y.mean((2, 3, 4), True)).eval()
    expected = gated(lambda y: newest(y, 8)).eval()
    expected.load_state_dict(module.state_dict())
    streams(module, expected, [12, 8], pool_scope="window", frames_per_step=pulse)


def test_one_stream_is_reset_and_another_joins_late() -> None:
    torch.manual_seed(2)
    build = fn(lambda m, x: m.b(F.pad(m.a(F.pad(x, (2, 0), value=3.0)), (2, 2))), a=conv, b=lambda: conv(5, padding=1))
    module = randomise(build(), torch.randn(SHAPE))
    session = open_session(co3d.compile(module, (torch.randn(SHAPE),), boundary="exact"), 2)
    (delay,) = session.info.delays.values()
    first, second = torch.randn(1, 4, 6), torch.randn(1, 4, 7)
    empty = torch.randn(1, 4, 0)
    before = run(session, [first, empty], 6 + session.info.flush_steps)
    session.reset(stream=0)
    after = run(session, [second, second], 7 + session.info.flush_steps)
    with eager():
        wanted = [module(first)[0].numpy(), module(second)[0].numpy()]
    for results, stream, expected in ((before, 0, wanted[0]), (after, 0, wanted[1]), (after, 1, wanted[1])):
        got = np.stack([r[stream] for r in results], 1)[:, delay : delay + expected.shape[1]]
        np.testing.assert_allclose(got, expected, atol=1e-4)


REFUSED = [
    (of(nn.ReflectionPad1d(1), conv()), "reflection_pad1d"),
    (of(conv(padding=1, padding_mode="circular")), "cat"),
]


@pytest.mark.parametrize(("build", "operator"), REFUSED)
def test_what_has_no_ends_is_refused_by_name(build: Callable[[], nn.Module], operator: str) -> None:
    with pytest.raises(co3d.UnsupportedError, match=operator):
        co3d.compile(build().eval(), (torch.randn(SHAPE),), boundary="exact")


def test_dense_strides_have_no_ends() -> None:
    with pytest.raises(co3d.UsageError, match="dense"):
        co3d.compile(conv(3, 1, 2, 1), (torch.randn(SHAPE),), boundary="exact", stride_mode="dense")


def test_channels_are_in_fours_with_ends_too() -> None:
    layers = nn.Conv3d(4, 18, 1), nn.Conv3d(18, 18, (3, 1, 1), padding=(1, 0, 0), groups=18), nn.Conv3d(18, 4, 1)
    module = nn.Sequential(*layers).eval()
    compiled = co3d.compile(module, (torch.randn(1, 4, 8, 4, 4),), boundary="exact")
    assert {s.shape[1] for s in compiled.info.states if len(s.shape) == 4} == {20}
    streams(module, module, [6, 9])


def test_the_price_is_two_counters() -> None:
    blocks = [nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)]
    module, clip = nn.Sequential(nn.Conv3d(3, 8, 1), *blocks).eval(), torch.randn(1, 3, 8, 16, 16)
    plain, exact = (co3d.compile(module, (clip,), boundary=b).report() for b in ("stream", "exact"))
    assert exact.gmac_step == plain.gmac_step
    assert exact.state_bytes == plain.state_bytes + 16
