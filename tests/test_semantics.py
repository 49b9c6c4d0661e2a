"""The table of DESIGN section 1, row by row: small graphs through the oracle, with the delay each row states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import all_but
from oracle import check, check_row
from small_graphs import CLIP, conv, entry, fn, of, row, up
from torch import Tensor, nn
from zoo import Entry, Reference, Window

import co3d_compile as co3d


def conv_delay(delay: int, k: int, d: int, s: int, p: int) -> int:
    """The row of convolutions and pools."""
    return -1 - (p - 1 - delay - (k - 1) * d) // s


# kernel, dilation, stride, padding
CONVS = [
    (1, 1, 1, 0), (2, 1, 1, 0), (3, 1, 1, 0), (3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 1, 3), (4, 1, 1, 2), (5, 1, 1, 2),
    (3, 2, 1, 0), (3, 2, 1, 2), (3, 4, 1, 4), (2, 7, 1, 0), (1, 1, 2, 0), (2, 1, 2, 0), (3, 1, 2, 0), (3, 1, 2, 1),
    (3, 1, 2, 2), (4, 1, 2, 1), (5, 1, 2, 2), (3, 2, 2, 2), (3, 1, 3, 1), (7, 1, 4, 3), (5, 3, 4, 6), (1, 1, 4, 0),
    (1, 1, 1, 2),
]  # fmt: skip


def conv_case(k: int, d: int, s: int, p: int) -> Any:
    delay = conv_delay(0, k, d, s, p)
    return pytest.param(entry(f"conv k{k} d{d} s{s} p{p}", lambda: conv(k, d, s, p)), delay, id=f"conv-{k}-{d}-{s}-{p}")


def chained_case(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> Any:
    """Two convolutions: the second meets a delay."""
    delay = conv_delay(conv_delay(0, *first), *second)
    name = "chain-" + "-".join(map(str, (*first, *second)))
    build = entry(name, lambda: nn.Sequential(conv(*first), nn.ReLU(), conv(*second)))
    return pytest.param(build, delay, id=name)


CHAINS = [
    ((3, 1, 1, 1), (3, 1, 1, 1)), ((3, 1, 2, 1), (3, 1, 1, 1)), ((3, 1, 2, 1), (3, 1, 2, 1)),
    ((3, 1, 1, 1), (3, 1, 2, 1)), ((5, 1, 1, 2), (1, 1, 2, 0)), ((3, 1, 2, 0), (3, 2, 2, 1)),
    ((1, 1, 1, 3), (3, 1, 2, 1)),
]  # fmt: skip

IN_WORDS = [
    row("padding in words", of(conv(padding="valid"), conv(padding="same"), conv(4, padding="same")), 5),
]

POOLS = [
    row("max pool", lambda: nn.MaxPool1d(3, 1, 1), 1),
    row("max pool strided", lambda: nn.MaxPool1d(2), 0),
    row("max pool dilated", lambda: nn.MaxPool1d(3, 1, 1, dilation=2), 3),
    row("max pool 3 2 1", lambda: nn.MaxPool1d(3, 2, 1), 0),
    row("average pool", lambda: nn.AvgPool1d(3, 1, 1), 1),
    row("average pool, no pad counted", lambda: nn.AvgPool1d(3, 1, 1, count_include_pad=False), 1),
    row("average pool strided", lambda: nn.AvgPool1d(4, 2, 1), 1),
    row("average pool ceil", lambda: nn.AvgPool1d(3, 2, ceil_mode=True), 1),
    row("max pool 3d", lambda: nn.MaxPool3d(3, (1, 2, 2), 1), 1, (1, 3, 8, 6, 6)),
    row("average pool 3d", lambda: nn.AvgPool3d((2, 3, 3), (2, 1, 1), (0, 1, 1)), 0, (1, 3, 8, 6, 6)),
    row("average pool, divisor", lambda: nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0), divisor_override=5), 1, (1, 3, 8, 4, 4)),
    row(
        "pool over space, divisor, no pad counted",
        lambda: nn.AvgPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), True, False, divisor_override=5),
        0,
        (1, 3, 6, 6, 6),
    ),
    row(
        "pool of folded frames, divisor, no pad counted",
        fn(
            lambda m, x: m.pool(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, x.shape[2])).transpose(1, 2),
            pool=lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=4),
        ),
        0,
        (1, 3, 6, 6, 6),
    ),
]

CAUSAL = [
    row("pad in front", fn(lambda m, x: m.conv(F.pad(x, (2, 0))), conv=conv), 0, causal=True),
    row("pad and crop", fn(lambda m, x: m.conv(x)[:, :, :-2], conv=lambda: conv(padding=2)), 0, causal=True),
    row("pad in front, dilated", fn(lambda m, x: m.conv(F.pad(x, (8, 0))), conv=lambda: conv(3, 4)), 0, causal=True),
    row("concat in front", fn(lambda m, x: m.conv(torch.cat([x.new_zeros(x.shape[0], 4, 2), x], 2)), conv=conv), 0,
        causal=True),
    row("a difference of nothing in front", fn(lambda m, x: m.conv(torch.cat([(x - x)[:, :, :2], x], 2)), conv=conv), 0,
        causal=True),
    row("an entry times zero in front", fn(lambda m, x: m.conv(torch.cat([x[:, :, :1] * 0, x], 2)), conv=lambda:
        conv(2)), 0, causal=True),
    row("nothing in front of a kernel of one tap", fn(lambda m, x: m.b(m.a(torch.cat([x.new_zeros(x.shape[0], 4, 0), x],
        2))), a=lambda: conv(1), b=conv), 2),
    row("two causal", fn(lambda m, x: m.b(F.pad(m.a(F.pad(x, (2, 0))), (1, 0))), a=conv, b=lambda: conv(2)), 0,
        causal=True),
    row("causal strided", fn(lambda m, x: m.conv(F.pad(x, (2, 0))), conv=lambda: conv(3, 1, 2)), 0, causal=True),
]  # fmt: skip

# An entry that waits for the last of its taps: the row of transposed convolutions.
UPSAMPLING = [
    row("transposed 2 2", lambda: up(2, 2), 0),
    row("transposed 4 2 1", lambda: up(4, 2, 1), 1),
    row("transposed 3 2 1 1", lambda: up(3, 2, 1, 1), 1),
    row("transposed 3 1 1", lambda: up(3, 1, 1), 1),
    row("transposed 5 3 1", lambda: up(5, 3, 1), 1),
    row("transposed dilated", lambda: up(3, 2, 0, 0, 2), 0),
    row("nearest 2", lambda: nn.Upsample(scale_factor=2), 0),
    row("nearest, exact 2", lambda: nn.Upsample(scale_factor=2, mode="nearest-exact"), 0),
    row("nearest 3", lambda: nn.Upsample(scale_factor=3), 0),
    row("linear 2", lambda: nn.Upsample(scale_factor=2, mode="linear"), 1),
    row("linear 3", lambda: nn.Upsample(scale_factor=3, mode="linear"), 1),
    row("linear 4", lambda: nn.Upsample(scale_factor=4, mode="linear"), 2),
    row("nearest, over space", lambda: nn.Upsample(scale_factor=(1, 2, 3)), 0, (1, 2, 6, 3, 4)),
    row(
        "linear, over space",
        fn(lambda m, x: F.interpolate(x, (x.shape[2], 9, 8), mode="trilinear")),
        0,
        (1, 2, 6, 3, 4),
    ),
    row("log-softmax of channels", fn(lambda m, x: x.log_softmax(1)), 0),
    row("nearest, down by 2", fn(lambda m, x: F.interpolate(x, scale_factor=0.5)), 0),
    row("linear, down by 2", fn(lambda m, x: F.interpolate(x, scale_factor=0.5, mode="linear")), 0),
    row("linear, down by 3", fn(lambda m, x: F.interpolate(x, scale_factor=1 / 3, mode="linear")), 0),
    row(
        "transposed, by the general operator",
        fn(
            lambda m, x: torch.convolution(x, m.up.weight, m.up.bias, (2,), (1,), (1,), True, (1,), 1),
            up=lambda: up(3, 2),
        ),
        1,
    ),
    row(
        "convolution, by the general operator",
        fn(lambda m, x: torch.convolution(x, m.conv.weight, m.conv.bias, (2,), (1,), (3,), False, (0,), 1), conv=conv),
        conv_delay(0, 3, 3, 2, 1),
    ),
    row("repeat interleave", fn(lambda m, x: torch.repeat_interleave(x, 2, dim=2)), 0),
    row("conv, transposed", of(conv(padding=1), up(4, 2, 1)), 3),
    row("down and up", of(conv(4, 1, 2, 1), nn.ReLU(), up(4, 2, 1)), 3),
]

SHIFTS = [
    row("crop in front", fn(lambda m, x: m.conv(x[:, :, 3:]), conv=lambda: conv(padding=1)), 4),
    row("crop at the end", fn(lambda m, x: m.conv(x[:, :, :-3]), conv=lambda: conv(padding=1)), 1),
    row("strided slice", fn(lambda m, x: m.conv(x[:, :, 1::2]), conv=lambda: conv(padding=1)), 1),
    row("pad in front of a result", fn(lambda m, x: F.pad(m.conv(x), (3, 0)), conv=conv), -1),
    row("pad at the end", fn(lambda m, x: F.pad(m.conv(x), (0, 3)), conv=conv), 2),
    row("pad with a constant", fn(lambda m, x: m.conv(F.pad(x, (2, 2), value=0.5)), conv=conv), 0),
    row("pad front and back 3d", lambda: nn.Sequential(nn.ConstantPad3d(1, 0.0), nn.Conv3d(3, 4, 3)), 1,
        (1, 3, 8, 6, 6)),
    row("replication pad", lambda: nn.Sequential(nn.ReplicationPad1d((1, 1)), conv()), 1),
    row("flip of channels", fn(lambda m, x: m.conv(x).flip(1), conv=conv), 2),
    row("split with sizes", fn(lambda m, x: m.conv(torch.split(x, [2, x.shape[2] - 2], dim=2)[1]), conv=conv), 4),
]  # fmt: skip


def written_over(x: Tensor, where: Callable[[Tensor], Any], number: float | Tensor) -> Tensor:
    y = x.clone()
    y[where(y)] = number
    return y


def kept_statistics() -> nn.Module:
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    norm.running_mean, norm.running_var = torch.linspace(-0.3, 0.3, 4), torch.linspace(0.5, 2, 4)
    return norm


NORMS = [
    row("instance norm with statistics of its own", of(conv(padding=1), kept_statistics(), conv(padding=1)), 2),
]

MASKS = [
    row("written over where it is negative", fn(lambda m, x: m.b(written_over(m.a(x), lambda y: y < 0, 0)),
                                                a=lambda: conv(padding=1), b=lambda: conv(padding=1)), 2),
    row("frames written over", fn(lambda m, x: m.b(written_over(m.a(x).mT, lambda y: y.mean(2) < 0, 0.5).mT),
                                  a=lambda: conv(padding=1), b=lambda: conv(padding=1)), 2),
    row("channels written over", fn(lambda m, x: m.conv(written_over(x, lambda y: (slice(None), torch.arange(4) < 2),
                                                                     torch.tensor([1.0]))), conv=conv), 2),
]  # fmt: skip

# The delayed residual: the largest delay wins, the other operand is held back.
OPERANDS = [
    row("residual", fn(lambda m, x: x + m.conv(x), conv=lambda: conv(padding=1)), 1),
    row("residual unpadded", fn(lambda m, x: x[:, :, 1:-1] + m.conv(x), conv=conv), 2),
    row("residual end-aligned", fn(lambda m, x: x[:, :, 2:] + m.conv(x), conv=conv), 2),
    row("nested", fn(lambda m, x: x + m.b(F.relu(x + m.a(x))), a=lambda: conv(padding=1),
                     b=lambda: conv(5, padding=2)), 3),
    row("strided shortcut", fn(lambda m, x: m.short(x) + m.conv(x), conv=lambda: conv(3, 1, 2, 1),
                               short=lambda: conv(1, 1, 2)), 0),
    row("strided shortcut, delayed", fn(lambda m, x: m.short(m.a(x)) + m.conv(m.a(x)), a=lambda: conv(padding=1),
                                        conv=lambda: conv(3, 1, 2, 1), short=lambda: conv(1, 1, 2)), 1),
    row("concat", fn(lambda m, x: torch.cat([x, m.a(x), m.b(x)], 1), a=lambda: conv(padding=1),
                     b=lambda: conv(5, padding=2)), 2),
    row("product", fn(lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=lambda: conv(padding=1),
                      b=lambda: conv(7, padding=3)), 3),
    row("stack", fn(lambda m, x: torch.stack([x, m.a(x)], 1).sum(1), a=lambda: conv(5, padding=2)), 2),
    row("where", fn(lambda m, x: torch.where(x > 0, m.a(x), x), a=lambda: conv(padding=1)), 1),
    row("same tensor twice", fn(lambda m, x: m.a(x) + m.a(x) * x, a=lambda: conv(padding=1)), 1),
    row("ahead of its operand", fn(lambda m, x: F.pad(x, (2, 0))[:, :, :-2] + x), 0),
    row("two outputs", fn(lambda m, x: (m.a(x), m.b(x)), a=lambda: conv(padding=1), b=lambda: conv(5, padding=2)), None,
        reference=lambda m: Reference(m, (0, 1), (2, 2))),
    row("two inputs", fn(lambda m, x, y: m.a(x) + y, a=lambda: conv(padding=1)), 1, CLIP, CLIP),
    row("batched matmul", fn(lambda m, x: torch.matmul(m.a(x).transpose(1, 2).unsqueeze(2),
                                                       x.transpose(1, 2).unsqueeze(3)).flatten(2).transpose(1, 2),
                             a=lambda: conv(padding=1)), 1),
    row("grouped and depthwise", of(conv(padding=1, groups=2), conv(padding=1, groups=4)), 2),
    row("scalar model", fn(lambda m, x: x * 2 + 1), 0),
]  # fmt: skip

TABLE = [
    *(conv_case(*case) for case in CONVS), *(chained_case(*case) for case in CHAINS), *IN_WORDS, *POOLS, *CAUSAL,
    *UPSAMPLING, *SHIFTS, *NORMS, *MASKS, *OPERANDS,
]  # fmt: skip


# Kernels that differ by one number from another one.
ALIKE = (
    *("conv-2-1-1-0", "conv-3-1-1-2", "conv-4-1-1-2", "conv-5-1-1-2", "conv-3-2-1-0", "conv-3-4-1-4", "conv-1-1-2-0"),
    *("conv-2-1-2-0", "conv-3-1-2-0", "conv-3-1-2-2", "conv-5-1-2-2", "conv-3-1-3-1", "conv-1-1-4-0", "conv-1-1-1-2"),
    *("chain-3-1-2-1-3-1-1-1", "chain-3-1-1-1-3-1-2-1", "max-pool-3-2-1", "average-pool-strided", "causal-strided"),
    *("transposed-3-2-1-1", "transposed-3-1-1", "nearest-3", "linear-3", "linear,-down-by-3", "residual-end-aligned"),
)


@pytest.mark.parametrize(("case", "delay"), all_but(TABLE, *ALIKE))
def test_row(case: Entry, delay: int | None) -> None:
    check_row(case, delay)


def test_last_states_of_several_layers() -> None:
    torch.manual_seed(0)
    module = fn(
        lambda m, x: torch.cat(m.rnn(x)[1], 2).transpose(0, 1).flatten(1),
        rnn=lambda: nn.LSTM(4, 3, 2, batch_first=True),
    )().eval()
    session = co3d.StreamSession(co3d.compile(module, (torch.randn(1, 6, 4),), time_dim=1), threads=1)
    x = torch.randn(1, 9, 4)
    for t in range(9):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.step_one(x[:, t].numpy())), module(x[:, : t + 1]))


@pytest.mark.parametrize(
    ("layer", "clip", "state", "nodes"),
    [
        (lambda: nn.Conv3d(8, 2, 3, (1, 2, 2), 1), (1, 8, 6, 8, 8), ("N", 2, 4, 4), ["0/Conv", "0/Conv_1", "0/Add"]),
        (lambda: nn.Conv1d(2, 8, 3, padding=1), (1, 2, 6), ("N", 2), ["0/Concat", "0/Gemm"]),
    ],
    ids=["sums", "entries"],
)
def test_a_state_holds_the_smaller_of_sums_and_entries(layer: Any, clip: Any, state: Any, nodes: list[str]) -> None:
    compiled = co3d.compile(nn.Sequential(layer()).eval(), (torch.randn(clip),))
    assert [tuple(s.shape) for s in compiled.info.states] == [state, state]
    assert [n.name for n in compiled.model.graph][: len(nodes)] == nodes


def test_what_the_tracer_notes_about_a_cast_is_no_operator() -> None:
    cast = entry("cast", fn(lambda m, x: m.conv(torch.as_tensor(x).to(torch.float32)), conv=conv))
    assert check(cast).recomputed == ()


def test_entries_without_a_tap_read_nothing() -> None:
    """With stride 2 and dilation 2 every other entry is the bias alone: the oldest of the window is one of these."""
    factory = fn(lambda m, x: m.up(x).sum(2), up=lambda: up(4, 2, 2, dilation=2))
    gaps = entry("gaps", factory, (1, 4, 4), tight=False, reference=lambda m: Reference(m.up, (Window(_sum),)))
    assert check(gaps).receptive_field == 7


def _sum(x: Tensor) -> Tensor:
    return x.sum(2)
