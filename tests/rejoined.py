"""Loops over frames and parts that are local in time, from the tables of their tests: rows of docs/networks.md."""

from __future__ import annotations

import torch
from local_networks import CHANNELS, LENGTH, LOCAL
from local_networks import network as with_part
from loop_nets import CASES
from loop_network import Network
from torch import nn
from torch.nn import functional as F
from zoo import Entry, Reference, long_clip

LOOPS = {
    "ConvLSTM": "conv_lstm",
    "ConvGRU": "conv_gru_of_slices",
    "LSTM cell": "lstm_cell",
    "selective scan": "selective_scan",
    "exponential smoothing": "moving_average",
    "caches of the last frames": "caches_of_two_layers",
}
"""Networks of ``loop_nets``."""
PARTS = {
    "similarities in a band": "band",
    "attention in overlapping chunks": "chunks beside each other",
    "attention in a band, masked": "mask -1e9",
    "attention in a band, by hand": "softmax by hand",
    "attention in a band with ALiBi": "bias by distance",
    "attention in a band with learned biases": "learned biases",
    "attention in blocks": "blocks by a mask",
    "histograms": "histogram",
}
"""Networks of ``local_networks``."""


def _loop(name: str, case: str) -> Entry:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Network(CASES[case].forward).eval()

    forgets = CASES[case].field is not None
    return Entry(
        name, build, (CASES[case].shape,), time_dim=1, reference=long_clip(CASES[case].dim), causal=True,
        nan_start=forgets,
    )  # fmt: skip


def _part(name: str, part: str) -> Entry:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return with_part(LOCAL[part][0]())

    return Entry(name, build, ((1, CHANNELS, LENGTH),), reference=_whole_chunks)


def _whole_chunks(network: nn.Module) -> Reference:
    """The network on clips of any length, of which it takes whole chunks of four frames alone."""
    return Reference(lambda x: network(F.pad(x, (0, -x.shape[2] % 4)))[:, :, : x.shape[2]])


REJOINED = {
    **{name: _loop(name, case) for name, case in LOOPS.items()},
    **{name: _part(name, part) for name, part in PARTS.items()},
}
