"""What has no meaning beyond the clip is refused where it must stream, by its operator and by what it does to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import few
from small_graphs import conv
from torch import Tensor, nn
from zoo import Graph

import co3d_compile as co3d

SERIES, VIDEO = (1, 4, 8), (1, 4, 8, 6, 6)


def _mixed(m: Any, x: Tensor) -> Tensor:
    return m.a(x).transpose(1, 2) @ m.a(x)


def _pairs(x: Tensor) -> Tensor:
    """Time among the places: (1, 4, 8, 36) to (1, 4, 288)."""
    return x.flatten(3).flatten(2)


# A forward, the operator, and what is said of it; `m.a` is a convolution over time.
ROWS: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...], str, str]] = {
    "sums of flags in order": (lambda m, x: (m.a(x) > 0).cummax(2).values, SERIES, "cummax", "orders flags"),
    "sums over folded time": (lambda m, x: _pairs(x).cumsum(2), VIDEO, "cumsum", "into which time is folded"),
    "weights of frames": (lambda m, x: F.conv1d(x, m.a(x)[:, :, :3].repeat(4, 1, 1)), SERIES, "conv1d",
                          "has weights that are computed from the frames"),
    "one after the other": (lambda m, x: torch.cat([m.a(x), m.a(x.flip(1))], 2), SERIES, "cat",
                            "joins several sequences along time"),
    "a clip beside it": (lambda m, x: torch.cat([m.a(x), m.clip.weight[None]], 1), SERIES, "cat",
                         "concatenates a constant with a time axis"),
    "behind folded time": (lambda m, x: torch.cat([_pairs(x), torch.zeros(1, 4, 36)], 2), VIDEO, "cat",
                           "along a dim into which time is folded"),
    "channels are frames": (lambda m, x: F.conv1d(m.a(x).mT, m.square.weight[..., None]), SERIES, "conv1d",
                            "time is among the channels"),
    "a kernel over folded time": (lambda m, x: F.conv1d(_pairs(x), m.three.weight.view(1, 4, 3)), VIDEO, "conv1d",
                                  "folded into a spatial dim that the kernel slides over"),
    "rows are frames": (lambda m, x: torch.linalg.det(m.a(x)[:, :, :4]), SERIES, "det", "whose rows or columns are"),
    "columns are frames": (lambda m, x: torch.linalg.det(m.a(x)[:, :, :4].mT), SERIES, "det", "whose rows or columns"),
    "a weight for each frame": (lambda m, x: F.linear(m.a(x), m.square.weight), SERIES, "linear",
                                "sums over features into which time is folded"),
    "over frames": (lambda m, x: m.square.weight @ m.a(x).mT, SERIES, "matmul", "sums over time"),
    "every pair": (_mixed, SERIES, "matmul", "computes every pair of entries"),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT), SERIES, "scaled_dot_product_attention",
                  "attention over time"),
    "the middle one": (lambda m, x: m.a(x).median(2).values, SERIES, "median", "selects among all entries"),
    "one entry beside all": (lambda m, x: m.a(x) - m.a(x)[:, :, -1:], SERIES, "sub",
                             "spreads a single entry over the whole time axis"),
    "two rates": (lambda m, x: m.a(x)[:, :, ::2] + m.a(x)[:, :, :4], SERIES, "add",
                  "operands with different numbers of entries per step"),
    "positions": (lambda m, x: m.a(x) + m.clip.weight[:, :8], SERIES, "add", "meets a constant with a time axis"),
    "both directions": (lambda m, x: m.both(m.a(x).mT)[0], SERIES, "gru", "reads the clip in both directions"),
    "begun by frames": (lambda m, x: m.one(m.a(x).mT, m.a(x)[:, :, -1][None])[0], SERIES, "gru",
                        "starts from a hidden state that is computed from frames"),
    "by a factor that is not whole": (lambda m, x: F.interpolate(m.a(x), size=12), SERIES, "upsample_nearest1d",
                                      "by a factor that is not whole"),
    "by a factor that is nearly whole": (lambda m, x: F.interpolate(m.a(x), scale_factor=2.1), SERIES,
                                         "upsample_nearest1d", "by a factor that is not whole"),
    "aligned corners": (lambda m, x: F.interpolate(m.a(x), scale_factor=2.0, mode="linear", align_corners=True), SERIES,
                        "upsample_linear1d", "aligns corners"),
    "resampled folded time": (lambda m, x: F.interpolate(_pairs(x), scale_factor=2.0), VIDEO, "upsample_nearest1d",
                              "resamples a dim into which time is folded"),
    "a picture of time": (lambda m, x: F.interpolate(m.a(x)[:, None], scale_factor=2.0, mode="bicubic"), SERIES,
                          "upsample_bicubic2d", "resamples time and space at once"),
    "cut out of folded time": (lambda m, x: _pairs(x)[:, :, 5:-7], VIDEO, "slice", "cuts a dim into which time is"),
    "one of folded time": (lambda m, x: _pairs(x)[:, :, 5], VIDEO, "select", "selects from a dim into which time is"),
    "a pad on folded time": (lambda m, x: F.pad(_pairs(x), (1, 1)), VIDEO, "pad", "pads a dim into which time is"),
    "entries in an order": (lambda m, x: m.a(x)[:, :, [3, 1, 0, 2]], SERIES, "index", "gathers entries of the clip"),
    "backwards": (lambda m, x: m.a(x).flip(2), SERIES, "flip", "computes along the whole time axis"),
    "softmax": (lambda m, x: m.a(x).softmax(2), SERIES, "softmax", "computes along the whole time axis"),
    "normalised": (lambda m, x: F.layer_norm(m.a(x), (8,), m.clip.weight[0]), SERIES, "layer_norm",
                   "normalises over the whole time axis"),
    "the deviation": (lambda m, x: m.a(x) / m.a(x).std(2, keepdim=True), SERIES, "std", "reduces over the whole time"),
}  # fmt: skip


QUICK = (
    "one after the other",
    "channels are frames",
    "a kernel over folded time",
    "every pair",
    "one entry beside all",
    "two rates",
    "positions",
    "both directions",
    "by a factor that is not whole",
    "one of folded time",
    "entries in an order",
    "softmax",
    "the deviation",
)


@pytest.mark.parametrize("name", few(ROWS, *QUICK))
def test_it_is_refused_by_what_it_does(name: str) -> None:
    forward, shape, operator, reason = ROWS[name]
    space = [1, 1] if len(shape) == 5 else []
    layers = {
        "a": conv(padding=1) if not space else nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)),
        "clip": nn.Embedding(4, 8), "square": nn.Embedding(8, 8), "three": nn.Embedding(4, 3),
        "one": nn.GRU(4, 4, batch_first=True), "both": nn.GRU(4, 4, batch_first=True, bidirectional=True),
    }  # fmt: skip
    module = Graph(forward, **layers).eval()
    with pytest.raises(co3d.UnsupportedError) as refused:
        co3d.compile(module, (torch.randn(shape),), unsupported="error", pool_scope="recompute")
    assert operator in str(refused.value) and reason in str(refused.value), refused.value
