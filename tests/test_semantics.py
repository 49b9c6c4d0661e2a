"""The table of DESIGN section 1, row by row: small graphs through the oracle, with the delay each row states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check
from torch import Tensor, nn
from zoo import Entry, Expect, Graph, Reference, Window, randomise
from zoo.gates import newest_max, newest_mean

import co3d_compile as co3d

CLIP = (1, 4, 24)


def conv(kernel: int = 3, dilation: int = 1, stride: int = 1, padding: int = 0, c: int = 4, **more: Any) -> nn.Conv1d:
    return nn.Conv1d(c, more.pop("out", 4), kernel, stride, padding, dilation, **more)


def up(kernel: int, stride: int, padding: int = 0, output_padding: int = 0, dilation: int = 1) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(4, 4, kernel, stride, padding, output_padding, dilation=dilation)


def entry(name: str, factory: Callable[[], nn.Module], *shapes: tuple[int, ...], **fields: Any) -> Entry:
    clips = shapes or (CLIP,)
    generator = torch.Generator().manual_seed(5)
    examples = [torch.randn(shape, generator=generator) for shape in clips]
    return Entry(name, lambda: randomise(factory(), *examples), clips, **{"tight": True, **fields})


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


def row(name: str, factory: Callable[[], nn.Module], delay: int | None, *shapes: Any, **fields: Any) -> Any:
    return pytest.param(entry(name, factory, *shapes, **fields), delay, id=name.replace(" ", "-"))


def of(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def fn(forward: Callable[..., Any], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Graph(forward, **{name: make() for name, make in layers.items()})


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


def windowed(
    name: str, head: Callable[[Tensor], Tensor], time_dim: int = 2, expect: Expect = "window", **fields: Any
) -> Any:
    """A padded convolution, then something applied to the newest T entries."""

    def make(module: nn.Module) -> Reference:
        return Reference(module.get_submodule("conv"), (Window(head),), (time_dim,))

    factory = fn(lambda m, x: head(m.conv(x)), conv=lambda: conv(padding=1))
    return row(name, factory, 1, (1, 4, 8), expect=expect, reference=make, **fields)


WINDOWS = [
    windowed("mean", lambda x: x.mean(2)),
    windowed("mean kept", lambda x: x.mean(2, keepdim=True)),
    windowed("sum", lambda x: x.sum(2)),
    windowed("maximum", lambda x: x.amax(2)),
    windowed("adaptive average", lambda x: F.adaptive_avg_pool1d(x, 1)),
    windowed("adaptive maximum", lambda x: F.adaptive_max_pool1d(x, 1)),
    windowed("pool of the whole clip", lambda x: F.avg_pool1d(x, x.shape[2], 1)),
    windowed("standard deviation", lambda x: x.std(2)),
    windowed("log-sum-exp", lambda x: x.logsumexp(2)),
    windowed("softmax", lambda x: x.softmax(2)),
    windowed("flip", lambda x: x.flip(2)),
    windowed("adaptive to four", lambda x: F.adaptive_avg_pool1d(x, 4)),
    windowed("adaptive to three", lambda x: F.adaptive_max_pool1d(x, 3)),
    windowed("sort", lambda x: x.sort(2).values),
    windowed("mean of 12", lambda x: x.mean(2), options={"window": 12}),
    windowed("pool of 20", lambda x: F.avg_pool1d(x, x.shape[2], 1), options={"window": 20}),
    windowed("mean of 4", lambda x: x.mean(2), options={"window": 4}),
    windowed("mean, 4 frames a step", lambda x: x.mean(2), options={"frames_per_step": 4}),
    row("mean of one entry in the clip, of four in the window",
        fn(lambda m, x: F.adaptive_avg_pool1d(m.conv(x), 1).flatten(1), conv=lambda: conv(3, 1, 8, 1)), 0, (1, 4, 8),
        expect="window", options={"window": 32},
        reference=lambda m: Reference(m.conv, (Window(lambda x: x.mean(2)),))),
    windowed("rows of all clips numbered in one go", lambda x: (x.transpose(1, 2).flatten(0, 1) + torch.arange(
        x.shape[0] * x.shape[2])[:, None]).unflatten(0, (x.shape[0], -1)).transpose(1, 2), expect="recompute"),
    windowed("share of the clip that is over", lambda x: x + torch.arange(x.shape[2]) / x.shape[2], expect="recompute"),
    windowed("entries until the end", lambda x: x + (x.shape[2] - torch.arange(x.shape[2])), expect="recompute"),
    windowed("normalised by its norm", lambda x: F.normalize(x, dim=2), expect="recompute"),
    windowed("convolved with its own first entry", lambda x: F.conv1d(
        x.reshape(1, -1, x.shape[2]), x[:, :, :1].reshape(-1, 1, 1), groups=x.shape[0] * 4).reshape(x.shape),
        expect="recompute"),
    windowed("times its own first entry as weights", lambda x: F.linear(x.transpose(1, 2), x[0, :, :1].t()),
             expect="recompute"),
    windowed("mean of frames and joints in a dim", lambda x: x.unflatten(1, (2, 2)).transpose(2, 3).flatten(2).mean(2)),
    windowed("maximum of rows of joints", lambda x: x.unflatten(1, (2, 2)).permute(0, 3, 2, 1).flatten(1, 2).amax(1)),
    windowed("overlapping pool, up-sampled, meets its operand", lambda x: torch.cat([_spread_over_time(x), x], 1)),
]  # fmt: skip


def _spread_over_time(x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 4 * 4 * x.shape[2]).view(4, 4, -1)
    return F.conv_transpose1d(F.max_pool1d(x, x.shape[2], 1), weight, stride=x.shape[2])


# The last pool of a pyramid takes all entries of the clip, and goes on with the next ones behind it.
PYRAMIDS = [
    row(f"pyramid, {name}", fn(lambda m, x: m.merge(torch.cat([m.up(m.low(m.pool(x))), x], 1)), pool=pool, up=up_again,
                               low=lambda: conv(padding=1), merge=lambda: conv(c=8, padding=1)), delay, (1, 4, 4))
    for name, pool, up_again, delay in [
        ("transposed", lambda: nn.MaxPool1d(4), lambda: up(4, 4), 5),
        ("nearest", lambda: nn.AvgPool1d(4), lambda: nn.Upsample(scale_factor=4), 5),
        ("linear", lambda: nn.MaxPool1d(4), lambda: nn.Upsample(scale_factor=4, mode="linear"), 7),
    ]
]  # fmt: skip


def _standardised(x: Tensor) -> Tensor:
    x = x - x.mean(2, True)
    return x / (x.square().mean(2, True) + 1e-5).sqrt()


def _by_moments(x: Tensor) -> Tensor:
    return x * (x.square().mean(2, True) - x.mean(2, True).square() + 1e-5).rsqrt()


# Over one entry nothing of the entry would be left: no gates, whatever they are written as.
NO_GATES = [
    windowed(f"no gate, {name}", head, expect="recompute")
    for name, head in [
        ("centred", lambda x: x - x.mean(2, True)),
        ("centred by a sum", lambda x: x - x.sum(2, True) / 8),
        ("centred behind a view", lambda x: (x.transpose(1, 2) - x.mean(2)[:, None]).transpose(1, 2)),
        ("centred behind an operator", lambda x: x.relu() - x.amax(2, True).expand_as(x).relu()),
        ("standardised", _standardised),
        ("divided by its moments", _by_moments),
        ("divided by its maximum", lambda x: x / x.abs().amax(2, True)),
        ("root mean square", lambda x: x * torch.rsqrt(x.square().mean(2, True) + 1e-6)),
        ("above its mean", lambda x: (x > x.mean(2, True)).float()),
    ]
]


def gated(name: str, gate: Callable[[Tensor], Tensor], replaced: Callable[[Tensor, int], Tensor]) -> list[Any]:
    """A pool that meets its own input again, in the scopes frame and window."""
    shape = (1, 4, 6, 4, 4)
    cases = []
    for scope, window in (("frame", 1), ("window", 6)):

        def reference(module: Any, window: int = window) -> Reference:
            def trunk(x: Tensor) -> Tensor:
                x = module.a(x)
                return module.b(x * torch.sigmoid(replaced(x, window)))

            return Reference(trunk)

        factory = fn(lambda m, x: m.b((y := m.a(x)) * torch.sigmoid(gate(y))),
                     a=lambda: nn.Conv3d(4, 4, 3, padding=1), b=lambda: nn.Conv3d(4, 4, 3, padding=1))  # fmt: skip
        cases.append(row(f"{name} {scope}", factory, 2, shape, reference=reference, options={"pool_scope": scope}))
    return cases


def _normed(x: Tensor, window: int) -> Tensor:
    """Each channel less its mean, by its deviation, over the last dim of the newest entries."""
    mean, square = (newest_mean(y.mean(3, True), window) for y in (x, x.square()))
    return (x - mean) * (square - mean.square() + 1e-5).rsqrt()


GATES = [
    *gated("mean gate", lambda x: x.mean((2, 3, 4), True), lambda x, w: newest_mean(x.mean((3, 4), True), w)),
    *gated("max gate", lambda x: x.amax((2, 3, 4), True), lambda x, w: newest_max(x.amax((3, 4), True), w)),
    *gated("adaptive gate", lambda x: F.adaptive_avg_pool3d(x, 1), lambda x, w: newest_mean(x.mean((3, 4), True), w)),
    row(
        "gate of a series",
        fn(
            lambda m, x: (y := m.a(x)) * torch.sigmoid(m.b(y.mean(2, True))),
            b=lambda: conv(1),
            a=lambda: conv(padding=1),
        ),
        1,
        reference=lambda m: Reference(lambda x: (y := m.a(x)) * torch.sigmoid(m.b(y))),
    ),
    row(
        "centred over the newest entries",
        fn(lambda m, x: (y := m.a(x)) - y.mean(2, True), a=lambda: conv(padding=1)),
        1,
        (1, 4, 6),
        options={"pool_scope": "window"},
        reference=lambda m: Reference(lambda x: (y := m.a(x)) - newest_mean(y, 6)),
    ),
]

TABLE = [
    *(conv_case(*case) for case in CONVS), *(chained_case(*case) for case in CHAINS), *POOLS, *CAUSAL, *UPSAMPLING,
    *SHIFTS, *MASKS, *OPERANDS, *WINDOWS, *NO_GATES, *PYRAMIDS, *GATES,
]  # fmt: skip


@pytest.mark.parametrize(("case", "delay"), TABLE)
def test_row(case: Entry, delay: int | None) -> None:
    facts = check(case)
    if delay is not None:
        assert facts.delays == (delay,)


# What a reader places the results by: the delay, entries per step, frames per entry.
PLACES = [
    ("the last entry by a slice", lambda m, x: m.conv(x)[:, :, -1:].squeeze(2), (1, 1, 1.0)),
    ("an entry by a slice", lambda m, x: m.conv(x)[:, :, 3:4].flatten(1), (1, 1, 1.0)),
    ("the last of a slice", lambda m, x: m.conv(x)[:, :, 3:][:, :, -1], (1, 1, 1.0)),
    ("the last of a strided slice", lambda m, x: m.conv(x)[:, :, 1::2][:, :, -1], (1, 1, 2.0)),
    ("the last of more entries", lambda m, x: F.interpolate(m.conv(x)[:, :, 2:], scale_factor=2)[:, :, -1],
     (2, 1, 0.5)),
    ("the last of a strided convolution", lambda m, x: m.down(m.conv(x)[:, :, 2:])[:, :, -1], (1, 1, 2.0)),
    ("mean of a slice", lambda m, x: m.conv(x)[:, :, 3:].mean(2), (1, 1, 1.0)),
    ("heads of chunks", lambda m, x: torch.cat([y.mean(2) for y in m.conv(x).chunk(2, 2)], 1), (1, 1, 1.0)),
    ("frames of a split, side by side", lambda m, x: torch.stack([y.squeeze(2) for y in m.conv(x).split(1, 2)], 2),
     (1, 1, 1.0)),
    ("channels to time", lambda m, x: m.conv(x).unflatten(1, (2, 2)).transpose(2, 3).flatten(2), (2, 2, 0.5)),
    ("stacked in time", lambda m, x: torch.stack([x, m.conv(x), x], 3).flatten(2), (3, 3, 1 / 3)),
    ("each entry twice", lambda m, x: m.conv(x).repeat_interleave(2, 2), (2, 2, 0.5)),
    ("each entry twice, by a view", lambda m, x: m.conv(x)[..., None].expand(-1, -1, -1, 2).flatten(2), (2, 2, 0.5)),
    ("entries of a window", lambda m, x: m.conv(x).softmax(2), (1, 8, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "forward", "places"), PLACES, ids=[name for name, _, _ in PLACES])
def test_what_a_reader_places_results_by(name: str, forward: Any, places: tuple[int, int, float]) -> None:
    module = fn(forward, conv=lambda: conv(padding=1), down=lambda: conv(3, 1, 2, 1))().eval()
    (output,) = co3d.compile(module, (torch.randn(1, 4, 8),)).info.outputs
    assert (output.delay, output.entries_per_step, output.frames_per_entry) == pytest.approx(places)


def _backwards(x: Tensor) -> Tensor:
    total, results = x[:, :, -1], []
    for t in reversed(range(x.shape[2])):
        total = 0.5 * total + x[:, :, t].tanh()
        results.insert(0, total)
    return torch.stack(results, 1)


# Where time is in what a window gives, also where an operator on it does not say so.
TIMES: list[tuple[str, Any, int | None]] = [
    ("softmax", lambda m, x: m.conv(x).softmax(2), 2),
    ("sorted", lambda m, x: m.conv(x).sort(2).values, 2),
    ("sorted, time in front of channels", lambda m, x: m.conv(x).sort(2).values.mT.relu(), 1),
    ("two of each channel, sorted", lambda m, x: m.conv(x).sort(2).indices.mT.reshape(x.shape[0], -1, 2, 2), 1),
    ("every pair of entries", lambda m, x: (y := m.conv(x)).mT @ y, 1),
    ("list of frames, from the last one on", lambda m, x: _backwards(m.conv(x)), 1),
    ("mean of the largest", lambda m, x: m.conv(x).topk(3, 2).values.mean(2), None),
    ("three largest", lambda m, x: m.conv(x).topk(3, 2).values, None),
    ("scores of all entries", lambda m, x: m.fc(m.conv(x).flatten(1)), None),
]


@pytest.mark.parametrize(("name", "forward", "dim"), TIMES, ids=[name for name, _, _ in TIMES])
def test_where_time_is_in_what_a_window_gives(name: str, forward: Any, dim: int | None) -> None:
    module = fn(forward, conv=lambda: conv(padding=1), fc=lambda: nn.Linear(32, 8))().eval()
    (output,) = co3d.compile(module, (torch.randn(1, 4, 8),)).info.outputs
    assert (output.has_time, output.time_dim) == (dim is not None, dim)
    assert output.entries_per_step == (8 if dim is not None else 1)


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
