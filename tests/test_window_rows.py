"""Windows and gates by the table of DESIGN section 1: what is applied to the newest entries, and with which delay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import all_but
from oracle import check_row
from small_graphs import conv, fn, row, up
from torch import Tensor, nn
from zoo import Entry, Expect, Reference, Window
from zoo.gates import newest_max, newest_mean


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
    windowed("vector times rows", lambda x: x.softmax(2).mT @ torch.linspace(1, 2, 4)),
    windowed("vector times columns", lambda x: torch.linspace(1, 2, x.shape[2]) @ x.softmax(2).mT),
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
    row("weights of six phases", fn(lambda m, x: m.conv(x) * (torch.arange(x.shape[2]) % 6 + 1.0).sin(),
        conv=lambda: conv(padding=1)), 6, (1, 4, 12), tight=False),
    row("other weights at both ends", fn(lambda m, x: x * torch.where((torch.arange(x.shape[2]) < 2) | (
        torch.arange(x.shape[2]) > x.shape[2] - 3), 2.0, 1.0)), 2, (1, 4, 16), tight=False),
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
        "less the mean of all numbers",
        fn(lambda m, x: m.a(x) - x.mean(), a=lambda: conv(padding=1)),
        1,
        reference=lambda m: Reference(lambda x: m.a(x) - x.mean(1, True)),
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


TABLE = [*WINDOWS, *NO_GATES, *PYRAMIDS, *GATES]
# As another one of the table, but for the operator.
ALIKE = (
    *("mean-kept", "sum", "adaptive-maximum", "flip", "adaptive-to-three", "mean-of-4", "entries-until-the-end"),
    *("no-gate,-centred-by-a-sum", "no-gate,-centred-behind-a-view", "no-gate,-root-mean-square"),
    *("no-gate,-divided-by-its-moments", "no-gate,-above-its-mean", "pyramid,-nearest", "pyramid,-linear"),
    *("max-gate-frame", "max-gate-window", "adaptive-gate-frame"),
)


@pytest.mark.parametrize(("case", "delay"), all_but(TABLE, *ALIKE))
def test_row(case: Entry, delay: int | None) -> None:
    check_row(case, delay)
