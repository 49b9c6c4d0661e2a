"""Recurrent layers and running sums behind a delay: exact from the stream's first entry on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import co3d_compile as co3d


class Recurrence(nn.Module):
    """A convolution that looks one frame ahead, then something that remembers for good."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        self.layer = layers[kind](6, 5, 2, batch_first=True) if kind in layers else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        return self.layer(x)[0] if self.layer is not None else torch.cumsum(x, 1)


@pytest.mark.parametrize("pulse", [1, 4])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "cumsum"])
def test_exact_from_the_first_entry(kind: str, pulse: int) -> None:
    torch.manual_seed(0)
    model = Recurrence(kind).eval()
    compiled = co3d.compile(model, (torch.randn(1, 4, 8),), frames_per_step=pulse)
    x = torch.randn(2, 4, 40)
    with torch.inference_mode():
        expected = model(x).numpy()
    session = co3d.StreamSession(compiled, batch=2, threads=1)
    (delay,) = session.info.delays.values()
    steps = [session.step(x[:, :, j : j + pulse].numpy()).reshape(2, pulse, -1) for j in range(0, 40, pulse)]
    streamed = np.concatenate(steps, axis=1)[:, delay:]
    inside = slice(0, 40 - 2 * delay)  # the clip's last entry reads its padding
    np.testing.assert_allclose(streamed[:, inside], expected[:, inside], rtol=1e-4, atol=1e-5)
    assert session.info.receptive_field is None
