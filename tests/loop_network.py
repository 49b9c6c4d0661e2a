"""The layers that loops over frames in tests are made of, on (N, T, features) or (N, T, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Tensor]
PICTURES, SERIES = (1, 6, 3, 5, 5), (1, 6, 4)


class Network(nn.Module):
    """A few layers, and the lines of Python that join them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward
        self.gates, self.out = nn.Conv2d(3 + 4, 16, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(16)
        self.peep = nn.Parameter(0.3 * torch.randn(4, 1, 1))
        self.gru, self.lstm, self.second = nn.GRUCell(4, 5), nn.LSTMCell(4, 5), nn.GRUCell(5, 5)
        self.rnn = nn.RNNCell(4, 5)
        self.first = nn.Parameter(torch.randn(5))
        self.head, self.mix, self.embed = nn.Linear(5, 2), nn.Linear(8, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.GRUCell(4, 4), nn.GRUCell(4, 4)])
        self.decay = nn.Parameter(-torch.rand(4, 3))
        self.to_b, self.to_c, self.to_d = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 4)
        self.cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.places = nn.Parameter(torch.randn(6, 4))
        self.add_module("named-1", nn.Linear(4, 4))
        self.to_state, self.to_cell = nn.Linear(4, 5), nn.Linear(4, 5)
        self.look, self.wide = nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(3, 16, 3)
        self.two_layers = nn.LSTM(4, 5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """What the lines compute."""
        return self._forward(self, x)


def zeros(x: Tensor, *shape: int) -> Tensor:
    return x.new_zeros(x.shape[0], *shape)
