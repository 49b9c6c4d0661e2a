"""Recurrent layers and running sums behind a delay: exact from the stream's first entry on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from marks import long
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import co3d_compile as co3d

pytestmark = pytest.mark.slow


class Recurrence(nn.Module):
    """A few layers that look ahead, then something that remembers for good."""

    def __init__(self, kind: str, *before: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), *before)
        layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        self.kind, learned = kind.split()[-1] if kind not in SO_FAR else kind, kind.startswith("learned ")
        self.packed = kind.startswith("packed ")
        self.layer = layers[self.kind](6, 5, 2, batch_first=True) if self.kind in layers else None
        self.start = nn.Parameter(torch.randn(2, 2, 1, 5)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        if self.start is not None:
            h, c = self.start.expand(-1, -1, len(x), -1).contiguous()
            return self.layer(x, (h, c) if self.kind == "lstm" else h)[0]
        if self.packed:
            lengths = torch.full((len(x),), x.shape[1])
            rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.layer(rows)[0], batch_first=True)[0]
        return self.layer(x)[0] if self.layer is not None else SO_FAR[self.kind](x)


SO_FAR: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: x.cumsum(1),
    "whole numbers": lambda x: (x > 0).cumsum(1),
    "cumprod": lambda x: (1 + 0.1 * x.tanh()).cumprod(1),
    "logcumsumexp": lambda x: torch.where(x > 0.5, x, -torch.inf).logcumsumexp(1).exp(),
    "cummax": lambda x: x.round(decimals=1).cummax(1)[0],
    "index of cummax": lambda x: x.round(decimals=1).cummax(1)[1],
    "cummin": lambda x: torch.cat(x.cummin(1), -1),
}


KINDS = ["lstm", "gru", "rnn", "learned lstm", "learned gru", "packed lstm", "packed gru", *SO_FAR]
IN_FOURS = ("lstm", "learned gru", "cumsum", "cummin")


@pytest.mark.parametrize(
    ("kind", "pulse"), [*((k, 1) for k in KINDS), *((k, 4) if k in IN_FOURS else long(k, 4) for k in KINDS)]
)
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
    assert session.info.receptive_field is None and not session.info.recomputed


# What a layer pads its operand with is not what the layers before it make of a state of zeros.
BEFORE: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "convolution": lambda: (nn.ReLU(), nn.Conv1d(6, 6, 5, padding=2)),
    "max pool": lambda: (nn.MaxPool1d(3, 1, 1),),
    "average pool": lambda: (nn.AvgPool1d(3, 1, 1),),
    "average of what is there": lambda: (nn.AvgPool1d(3, 1, 1, count_include_pad=False),),
    "strides": lambda: (nn.MaxPool1d(3, 2, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 6, 3, 2, 1)),
    "edge": lambda: (nn.Conv1d(6, 6, 3, padding=1, padding_mode="replicate"), nn.Conv1d(6, 6, 3, padding=2)),
    "up-sampling": lambda: (nn.ConvTranspose1d(6, 6, 4, 2, 1), nn.Conv1d(6, 6, 3, padding=1)),
    "linear up-sampling": lambda: (nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d(6, 6, 3, padding=1)),
}


@pytest.mark.parametrize("kind", ["gru", "cumsum"])
@pytest.mark.parametrize("before", BEFORE)
def test_layers_in_front_begin_as_the_clip_does(before: str, kind: str) -> None:
    torch.manual_seed(0)
    model = Recurrence(kind, *BEFORE[before]()).eval()
    compiled = co3d.compile(model, (torch.randn(1, 4, 16),))
    x = torch.randn(2, 4, 64)
    with torch.inference_mode():
        expected = model(x).numpy()
    session = co3d.StreamSession(compiled, batch=2, threads=1)
    (delay,), (pulse,) = session.info.delays.values(), session.info.frames_per_step.values()
    for _ in range(2):  # again behind a reset
        steps = [session.step(x[:, :, j : j + pulse].numpy()).reshape(2, -1, expected.shape[2])
                 for j in range(0, 64, pulse)]  # fmt: skip
        streamed = np.concatenate(steps, axis=1)[:, delay:]
        inside = slice(0, expected.shape[1] * 3 // 4)  # behind it are entries that read the clip's padding
        np.testing.assert_allclose(streamed[:, inside], expected[:, inside], rtol=1e-4, atol=1e-5)
        session.reset()


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("pulse", [1, 3])
@pytest.mark.parametrize("pad", [nn.ReflectionPad1d((4, 0)), nn.ReflectionPad1d((2, 2))], ids=["in front", "both ends"])
def test_a_reflection_in_front_is_waited_for(pad: nn.Module, pulse: int, boundary: str) -> None:
    """It is made of entries that come later, and the layer reads it for good."""
    torch.manual_seed(0)
    clip, model = torch.randn(1, 4, 12), Recurrence("gru", nn.ReLU(), pad, nn.Conv1d(6, 6, 5)).eval()
    if boundary == "exact" and pad.padding[1]:
        with pytest.raises(co3d.UnsupportedError, match="from inside the clip at its ends"):
            co3d.compile(model, (clip,), boundary=boundary)
        return
    compiled = co3d.compile(model, (clip,), boundary=boundary, frames_per_step=pulse)
    assert not compiled.info.recomputed and co3d.verify(compiled, model, (clip,)).passed
    x = torch.randn(1, 4, 30)
    with torch.inference_mode():
        expected = model(x).numpy()
    session = co3d.StreamSession(compiled, threads=1)
    (delay,) = session.info.delays.values()
    results = [session.step(x[:, :, j : j + pulse].numpy()).reshape(1, pulse, -1) for j in range(0, 30, pulse)]
    streamed = np.concatenate(results, 1)[:, delay:]
    np.testing.assert_allclose(streamed[:, :20], expected[:, : streamed.shape[1]][:, :20], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pulse", [1, 2])
@pytest.mark.parametrize("kind", ["lstm", "cumsum"])
def test_a_first_entry_before_the_first_frame(kind: str, pulse: int) -> None:
    """More padding in front than the kernel reads: the layer waits until it can begin with the first entry."""
    torch.manual_seed(0)
    model = Recurrence(kind, nn.Conv1d(6, 6, 1, padding=2)).eval()
    model.conv[0] = nn.Conv1d(4, 6, 1)
    compiled = co3d.compile(model, (torch.randn(1, 4, 8),), frames_per_step=pulse)
    x = torch.randn(2, 4, 24)
    with torch.inference_mode():
        expected = model(x).numpy()
    session = co3d.StreamSession(compiled, batch=2, threads=1)
    steps = [session.step(x[:, :, j : j + pulse].numpy()).reshape(2, pulse, -1) for j in range(0, 24, pulse)]
    assert set(session.info.delays.values()) == {0}
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected[:, :24], rtol=1e-4, atol=1e-5)


class PerPixel(nn.Module):
    """A recurrence for each pixel: the batch shares its dim with space, in front of it or behind."""

    def __init__(self, kind: str, batch_leads: bool, early: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3) if early else 3, padding=(0, 1, 1) if early else 1)
        self.layer = nn.GRU(4, 4, batch_first=True) if kind == "gru" else None
        self.order = (0, 3, 4, 2, 1) if batch_leads else (3, 4, 0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(self.order)
        rows = y.flatten(0, 2)
        rows = self.layer(rows)[0] if self.layer is not None else rows.cumsum(1)
        return rows.reshape(y.shape).permute([self.order.index(d) for d in range(5)])


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("batch_leads", [True, False])
@pytest.mark.parametrize("kind", ["gru", "cumsum"])
def test_a_recurrence_for_each_pixel(kind: str, batch_leads: bool, early: bool, boundary: str) -> None:
    torch.manual_seed(0)
    model = PerPixel(kind, batch_leads, early).eval()
    compiled = co3d.compile(model, (torch.randn(1, 3, 8, 3, 2),), boundary=boundary)
    x = torch.randn(2, 3, 12, 3, 2)
    with torch.inference_mode():
        expected = model(x).numpy()
    session = co3d.StreamSession(compiled, batch=2, threads=1)
    (delay,) = session.info.delays.values()
    results = [session.step(x[:, :, n].numpy()) for n in range(12)]
    results += session.flush() if boundary == "exact" else []
    streamed = np.stack(results, 2)[:, :, delay:]
    inside = slice(0, 12 if boundary == "exact" else 12 - 2 * delay)
    assert not session.info.recomputed
    np.testing.assert_allclose(streamed[:, :, inside], expected[:, :, inside], rtol=1e-4, atol=1e-5)


class GateInFront(nn.Module):
    """Squeeze-and-excitation, and what remembers for good."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 1)
        self.layer = nn.GRU(6, 5, batch_first=True) if kind == "gru" else None

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        x = self.conv(x)
        pooled = x.mean(2, keepdim=True)
        if window:
            ends = range(1, x.shape[2] + 1)
            pooled = torch.stack([x[:, :, max(0, n - window) : n].mean(2) for n in ends], 2)
        x = (x * self.fc(pooled).sigmoid()).transpose(1, 2)
        return self.layer(x)[0] if self.layer is not None else torch.cumsum(x, 1)


@pytest.mark.parametrize("boundary", ["stream", "exact"])
@pytest.mark.parametrize("kind", ["gru", "cumsum"])
def test_a_gate_over_the_newest_window_begins_with_what_there_is(kind: str, boundary: str) -> None:
    torch.manual_seed(0)
    model, example = GateInFront(kind).eval(), (torch.randn(1, 4, 8),)
    compiled = co3d.compile(model, example, pool_scope="window", boundary=boundary)
    assert co3d.verify(compiled, model, example).passed
    x = torch.randn(1, 4, 30)
    with torch.inference_mode():
        expected = model(x, window=8).numpy()
    session = co3d.StreamSession(compiled, threads=1)
    (delay,) = session.info.delays.values()
    streamed = np.stack([session.step(frame.numpy()) for frame in x.unbind(2)][delay:], 1)
    np.testing.assert_allclose(streamed, expected[:, : 30 - delay], rtol=1e-4, atol=1e-5)


def test_a_layer_that_starts_from_what_is_pooled_is_a_window() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.start = nn.GRU(4, 6, batch_first=True), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x, self.start(x.mean(1))[None])[0]
            return found

    torch.manual_seed(0)
    net, clip = Started().eval(), torch.randn(1, 8, 4)
    session = co3d.StreamSession(co3d.compile(net, (clip,), time_dim=1))
    for frame in clip.unbind(1):
        got = session.step(frame.numpy())
    np.testing.assert_allclose(got, net(clip).detach(), atol=1e-5)


class Given(nn.Module):
    """A recurrent layer, or a loop over frames, behind a convolution that starts from an input without time."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        more = {} if kind is nn.GRUCell else {"num_layers": 2, "batch_first": True}
        self.conv, self.layer, self.start = nn.Conv1d(4, 4, 3, padding=1), kind(4, 5, **more), nn.Linear(3, 5)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        h, rows = self.start(given).transpose(0, 1), self.conv(x).transpose(1, 2)
        if isinstance(self.layer, nn.GRUCell):
            state, found = h[0], []
            for row in rows.unbind(1):
                state = self.layer(row, state)
                found.append(state)
            return torch.stack(found, 2)
        y: Tensor = self.layer(rows, (h, h * 2) if isinstance(self.layer, nn.LSTM) else h)[0]
        return y.transpose(1, 2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.GRUCell])
@pytest.mark.parametrize("pulse", [1, 2])
def test_a_layer_starts_from_an_input_without_time(kind: Callable[..., nn.Module], pulse: int) -> None:
    model = Given(kind).eval()
    clip = torch.randn(1, 4, 8), torch.randn(1, 2, 3)
    compiled = co3d.compile(model, clip, time_dim=[2, None], frames_per_step=pulse)
    assert not compiled.info.recomputed
    result = co3d.verify(compiled, model, clip)
    assert result.passed, result.reason
    session, (delay,) = co3d.StreamSession(compiled, batch=2), compiled.info.delays.values()
    for seed in range(2):  # the second from other states, behind a reset
        torch.manual_seed(seed)
        x, given = torch.randn(2, 4, 20), torch.randn(2, 2, 3)
        steps = [x[:, :, t : t + pulse] if pulse > 1 else x[:, :, t] for t in range(0, 20, pulse)]
        results = [session.step((frames.numpy(), given.numpy())) for frames in steps]
        found = np.concatenate([np.asarray(r).reshape(2, 5, pulse) for r in results], 2)[:, :, delay:]
        with torch.no_grad():
            np.testing.assert_allclose(found, model(x, given)[:, :, : 20 - delay].numpy(), atol=1e-5)
        session.reset()
