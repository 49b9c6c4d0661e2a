"""Time where the network has it, if the user does not say: dim 2, or a refusal that names the dim to give."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import co3d_compile as co3d


class PerFrame(nn.Module):
    """A 2D network on each frame of (N, T, C, H, W), and a recurrent layer over their features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.rnn = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        features = torch.relu(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
        return self.rnn(features.reshape(n, t, 8))[0]


class Features(nn.Module):
    """A recurrent layer over (N, T, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class BothWays(nn.Module):
    """A recurrent layer of two directions, which is on a window, over (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(4, 5, 3, padding=1), nn.LSTM(5, 6, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.conv(x).transpose(1, 2))[0]


@pytest.mark.parametrize(
    ("network", "clip", "said"),
    [
        (PerFrame(), torch.rand(1, 8, 3, 10, 10), r"Dim 2 of x .*aten.conv2d in conv .* dim 1 .* of 8 entries"),
        (Features(), torch.rand(1, 9, 5), r"Dim 2 of x .*aten.gru in rnn .* dim 1 .* of 9 entries"),
    ],
    ids=["frames in the batch of 2D layers", "a recurrent layer"],
)
def test_another_dim_is_named(network: nn.Module, clip: Tensor, said: str) -> None:
    with pytest.raises(co3d.UsageError, match=said):
        co3d.compile(network.eval(), (clip,))
    assert co3d.compile(network, (clip,), time_dim=1).info.recomputed == ()
    assert co3d.compile(network, (clip,), time_dim=2).info.recomputed  # a dim that is given is obeyed


def test_a_clip_without_a_batch_is_refused() -> None:
    with pytest.raises(
        co3d.UsageError, match=r"\(3, 8, 6, 6\) has no dim for the batch: .*conv3d in 0 .* clip\[None\]"
    ):
        co3d.compile(nn.Sequential(nn.Conv3d(3, 4, 3)).eval(), torch.rand(3, 8, 6, 6))


def test_a_window_alone_is_no_reason() -> None:
    assert co3d.compile(BothWays().eval(), (torch.rand(1, 4, 9),)).info.recomputed[0].operator == "aten.lstm"


class Wave(nn.Module):
    """A convolution over samples, (N, T), scaled by what belongs to the speaker, if that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 5)

    def forward(self, x: Tensor, speaker: Tensor | None = None) -> Tensor:
        features = self.conv(x.unsqueeze(1))
        return features if speaker is None else features * speaker.unsqueeze(2)


def test_a_series_of_numbers_has_one_dim_for_time() -> None:
    assert co3d.compile(Wave().eval(), (torch.rand(1, 20),)).info.inputs[0].time_dim == 1


class Spectrogram(nn.Module):
    """A 2D convolution over (N, 1, T, F), and a recurrent layer of two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(1, 2, 3, padding=1), nn.GRU(8, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.conv(x).transpose(1, 2).flatten(2))[0]


def test_a_single_channel_is_no_sequence() -> None:
    compiled = co3d.compile(Spectrogram().eval(), (torch.rand(1, 1, 9, 4),))
    assert compiled.info.inputs[0].time_dim == 2
    assert [f.operator for f in compiled.info.recomputed] == ["aten.gru"]


class Stacked(nn.Module):
    """A 2D network on frames that are stacked as channels, (N, T * 3, H, W), and the mean of their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x.view(-1, 3, *x.shape[2:])).relu().mean((2, 3))
        return self.fc(features).view(x.shape[0], -1, 2).mean(1)


def test_what_looks_like_pictures_is_doubted() -> None:
    """The rows of pictures stream as well as frames do, and no comparison finds it."""
    network, clip = Stacked().eval(), (torch.rand(1, 12, 8, 8),)
    with pytest.warns(co3d.Co3dWarning, match="Dim 2 of x is taken for time, of 8 entries, but .* time_dim=1"):
        co3d.compile(network, clip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert co3d.compile(network, clip, time_dim=1).info.frames_per_step == {"x": 3}
        co3d.compile(nn.Conv2d(3, 4, (3, 1)).eval(), (torch.rand(1, 3, 8, 8),))
