"""Networks with loops over frames written by hand, in many spellings, on (N, T, features) or (N, T, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        self.look = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """What the lines compute."""
        return self._forward(self, x)


def zeros(x: Tensor, *shape: int) -> Tensor:
    return x.new_zeros(x.shape[0], *shape)


def conv_lstm(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 4, *x.shape[3:]), []
    c = torch.zeros_like(h)
    for t in range(x.shape[1]):
        i, f, o, g = m.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(m.out(h))
    return torch.stack(out, 1)


def conv_lstm_with_peepholes(m: Any, x: Tensor) -> Tensor:
    h = c = zeros(x, 4, *x.shape[3:])
    out = []
    for frame in x.unbind(1):
        i, f, o, g = m.norm(m.gates(torch.cat([frame, h], 1))).split(4, 1)
        c = torch.sigmoid(f + m.peep * c) * c + torch.sigmoid(i + m.peep * c) * g.tanh()
        h = torch.sigmoid(o + m.peep * c) * c.tanh()
        out.append(h)
    return torch.stack(out, 2)


def conv_gru_of_slices(m: Any, x: Tensor) -> Tensor:
    """Frames with a dim of one, results joined along it; state of the first turn made inside of the loop."""
    h, out = None, []
    for t in range(x.shape[1]):
        frame = x[:, t : t + 1].squeeze(1)
        if h is None:
            h = zeros(x, 4, *x.shape[3:])
        r, z, n, _ = m.gates(torch.cat([frame, h], 1)).chunk(4, 1)
        h = torch.sigmoid(z) * h + (1 - torch.sigmoid(z)) * torch.tanh(n * torch.sigmoid(r))
        out.append(h.unsqueeze(1))
    return torch.cat(out, 1)


def gru_cell(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(x[:, t], h)
        out.append(h)
    return m.head(torch.stack(out, 1))


def last_of_gru_cell(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 5)
    for t in range(x.shape[1]):
        h = m.gru(x[:, t], h)
    return m.head(h)


def lstm_cell(m: Any, x: Tensor) -> Tensor:
    h, c, out = zeros(x, 5), zeros(x, 5), []
    for frame in x.split(1, 1):
        h, c = m.lstm(frame[:, 0], (h, c))
        out += [m.head(h)]
    return torch.stack(out).transpose(0, 1)


def last_of_lstm_cell(m: Any, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = m.lstm(x[:, t], state)
    return m.head(state[0]) + m.head(state[1])


def rnn_cell_time_first(m: Any, x: Tensor) -> Tensor:
    x, h, out = x.transpose(0, 1), x.new_zeros(x.shape[0], 5), []
    for frame in x:
        h = m.rnn(frame, h)
        out.append(h)
    return torch.stack(out).permute(1, 0, 2)


def learned_start(m: Any, x: Tensor) -> Tensor:
    h, out = m.first.expand(x.shape[0], 5), []
    for t in range(x.shape[1]):
        h = m.gru(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def written_into_a_tensor(m: Any, x: Tensor) -> Tensor:
    h, y = zeros(x, 5), x.new_empty(x.shape[0], x.shape[1], 2)
    for t in range(x.shape[1]):
        h = m.gru(x[:, t], h)
        y[:, t] = m.head(h)
    return y


def joined_one_by_one(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 5)
    y = m.head(h)[:, None][:, :0]
    for t in range(x.shape[1]):
        h = m.gru(x[:, t], h)
        y = torch.cat([y, m.head(h)[:, None]], 1)
    return y


def layers_in_a_list(m: Any, x: Tensor) -> Tensor:
    states, out = [zeros(x, 4) for _ in m.layers], []
    for t in range(x.shape[1]):
        y = x[:, t]
        for k, layer in enumerate(m.layers):
            states[k] = y = layer(y, states[k])
        out.append(y)
    return torch.stack(out, 1)


def last_states_of_layers(m: Any, x: Tensor) -> Tensor:
    states = [zeros(x, 4) for _ in m.layers]
    for t in range(x.shape[1]):
        y = x[:, t]
        for k, layer in enumerate(m.layers):
            states[k] = y = layer(y, states[k])
    return torch.cat(states, 1)


def one_loop_after_the_other(m: Any, x: Tensor) -> Tensor:
    frames = list(x.unbind(1))
    for layer in m.layers:
        h = zeros(x, 4)
        for t, frame in enumerate(frames):
            h = layer(frame, h)
            frames[t] = h
    return torch.stack(frames, 1)


def one_cell_for_both_loops(m: Any, x: Tensor) -> Tensor:
    frames = list(x.unbind(1))
    for _ in range(2):
        h = zeros(x, 4)
        for t, frame in enumerate(frames):
            h = m.layers[0](frame, h)
            frames[t] = h
    return torch.stack(frames, 1)


def selective_scan(m: Any, x: Tensor) -> Tensor:
    s, out = zeros(x, 4, 3), []
    b, c, d = torch.cat([m.to_b(x), m.to_c(x), torch.nn.functional.softplus(m.to_d(x))], -1).split([3, 3, 4], -1)
    b = torch.stack([b, -b], 2).max(2).values
    for k in range(x.shape[1]):
        s = s * torch.exp(d[:, k, :, None] * m.decay) + d[:, k, :, None] * b[:, k, None] * x[:, k, :, None]
        out.append((s * c[:, k, None]).sum(-1))
    return torch.stack(out, 1)


def moving_average(m: Any, x: Tensor) -> Tensor:
    average, out = zeros(x, 4), []
    for t in range(x.shape[1]):
        average = 0.9 * average + 0.1 * x[:, t]
        out.append(m.embed(x[:, t] - average))
    return torch.stack(out, 1)


def smoothed_from_the_first_frame(m: Any, x: Tensor) -> Tensor:
    """The first frame is the start, and the first result."""
    y = m.embed(x)
    h = y[:, 0]
    out = [h]
    for t in range(1, x.shape[1]):
        h = 0.7 * h + 0.3 * y[:, t]
        out.append(h)
    return torch.stack(out, 1)


def less_the_background(m: Any, x: Tensor) -> Tensor:
    """The first frame is the start, and is read by the first turn too."""
    background, out = x[:, 0], []
    for t in range(x.shape[1]):
        out.append(m.embed(x[:, t] - background))
        background = 0.9 * background + 0.1 * x[:, t]
    return torch.stack(out, 1)


def filter_of_order_two(m: Any, x: Tensor) -> Tensor:
    """Two values before are handed on, which start from zeros in the shape of a frame."""
    before = earlier = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        y = x[:, t] + 0.3 * before - 0.2 * earlier
        out.append(m.embed(y))
        before, earlier = y, before
    return torch.stack(out, 1)


def spiking(m: Any, x: Tensor) -> Tensor:
    """A leaky neuron; what it starts from is a number, so that the first turn has other operators."""
    potential, out = 0.0, []
    for t in range(x.shape[1]):
        potential = potential + (m.embed(x[:, t]) - potential) / 2.0
        spike = (potential >= 0.1).to(x.dtype)  # type: ignore[attr-defined]
        potential = potential * (1 - spike)
        out.append(spike)
    return torch.stack(out, 1)


def carried_along(m: Any, x: Tensor) -> Tensor:
    """What is handed on is moved by two frames that follow each other, but for the first one."""
    h, out = zeros(x, 4), []
    for t in range(x.shape[1]):
        if t > 0:
            h = h + torch.tanh(m.embed(x[:, t] - x[:, t - 1]))
        h = torch.tanh(m.mix(torch.cat([x[:, t], h], -1)))
        out.append(h)
    return torch.stack(out, 1)


def frames_of_a_network(m: Any, x: Tensor) -> Tensor:
    """Features of all frames at once, folded into the batch; then a cell."""
    y, h, out = m.cnn(x.flatten(0, 1)).unflatten(0, x.shape[:2]), zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(y[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def network_inside_of_the_loop(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(m.cnn(x[:, t]), h)
        out.append(m.head(h))
    return torch.stack(out, 1)


def list_of_features(m: Any, x: Tensor) -> Tensor:
    features, h, out = [m.cnn(frame) for frame in x.unbind(1)], zeros(x, 5), []
    for f in features:
        h = m.gru(f, h)
        out.append(m.head(h))
    return torch.stack(out, 1)


def behind_a_look_ahead(m: Any, x: Tensor) -> Tensor:
    y, h, out = m.look(x.mT).mT, zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(y[:, t], h)
        out.append(m.head(h))
    return m.look(torch.stack(out, 1).repeat(1, 1, 2).mT).mT


def per_pixel(m: Any, x: Tensor) -> Tensor:
    """A cell for each pixel: the batch shares its dim with space."""
    n, t, _, height, width = x.shape
    h, out = x.new_zeros(n * height * width, 4), []
    for k in range(t):
        y = torch.cat([x[:, k], x[:, k, :1]], 1).permute(0, 2, 3, 1).reshape(-1, 4)
        h = m.layers[0](y, h)
        out.append(h.view(n, height, width, 4).permute(0, 3, 1, 2))
    return torch.stack(out, 1)


def attention_to_the_last_state(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 4), []
    for t in range(x.shape[1]):
        weights = torch.softmax(m.embed(h) * x[:, t], -1)
        h = torch.tanh(m.mix(torch.cat([weights * x[:, t], h], -1)))
        out.append(h)
    return torch.stack(out, 1)


def last_frames_in_a_list(m: Any, x: Tensor) -> Tensor:
    cache, out = [zeros(x, 4), zeros(x, 4)], []
    for t in range(x.shape[1]):
        out.append(m.mix(torch.cat([cache[0], x[:, t]], -1)) + m.embed(cache[1]))
        cache = [cache[1], x[:, t]]
    return torch.stack(out, 1)


def difference_to_the_frame_before(m: Any, x: Tensor) -> Tensor:
    before, out = x[:, 0], []
    for t in range(1, x.shape[1]):
        out.append(m.embed(x[:, t] - before).relu())
        before = x[:, t]
    return torch.stack(out, 1)


def last_frames_in_a_tensor(m: Any, x: Tensor) -> Tensor:
    cache, out = zeros(x, 3, 4), []
    for t in range(x.shape[1]):
        cache = torch.cat([cache[:, 1:], x[:, t : t + 1]], 1)
        out.append(m.mix(cache[:, ::2].flatten(1)))
    return torch.stack(out, 1)


def caches_of_two_layers(m: Any, x: Tensor) -> Tensor:
    first, second, out = zeros(x, 2, 4), zeros(x, 2, 4), []
    for t in range(x.shape[1]):
        y = m.mix(torch.cat([first[:, 0], x[:, t]], -1)).relu()
        first = torch.stack([first[:, 1], x[:, t]], 1)
        out.append(m.mix(torch.cat([second[:, 0], y], -1)))
        second = torch.stack([second[:, 1], y], 1)
    return torch.stack(out, 1)


# Near misses: what a clip has of these is no layer with state, or none that a stream could go on with.


def backwards(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 5), []
    for t in reversed(range(x.shape[1])):
        h = m.gru(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def discounted_by_its_index(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 5)
    for t in range(x.shape[1]):
        h = m.gru(x[:, t] * 0.9**t, h)
    return h


def started_by_all_frames(m: Any, x: Tensor) -> Tensor:
    h = m.embed(x.mean(1))
    for t in range(x.shape[1]):
        h = m.layers[0](x[:, t], h)
    return h


def summed(m: Any, x: Tensor) -> Tensor:
    total = zeros(x, 4)
    for t in range(x.shape[1]):
        total = total + m.embed(x[:, t]).relu()
    return total / x.shape[1]


def largest(m: Any, x: Tensor) -> Tensor:
    h, best = zeros(x, 4), zeros(x, 4)
    for t in range(x.shape[1]):
        h = torch.tanh(m.mix(torch.cat([x[:, t], x[:, t]], -1)))
        best = torch.maximum(best, h)
    return best


def refined(m: Any, x: Tensor) -> Tensor:
    y = x.mean(1)
    for _ in range(6):
        y = y + torch.tanh(m.embed(y))
    return y


def positions(m: Any, x: Tensor) -> Tensor:
    h = zeros(x, 4)
    for t in range(x.shape[1]):
        h = m.layers[0](x[:, t] + m.places[t], h)
    return h


NEAR_MISSES = {
    f.__name__: f
    for f in (
        backwards,
        discounted_by_its_index,
        started_by_all_frames,
        summed,
        largest,
        refined,
        positions,
    )
}


@dataclass(frozen=True)
class Case:
    """A network and what is expected of it.

    Attributes:
        forward: What it computes.
        shape: Of the clip.
        states: How many states the step has.
        last: Whether it returns the last result alone.
        dim: Where time is in the result.
        field: The receptive field, in frames; None: without bound.
    """

    forward: Forward
    shape: tuple[int, ...] = SERIES
    states: int = 1
    last: bool = False
    dim: int = 1
    field: int | None = None


CASES = {
    case.forward.__name__: case
    for case in (
        Case(conv_lstm, PICTURES, 2),
        Case(conv_lstm_with_peepholes, PICTURES, 2, dim=2),
        Case(conv_gru_of_slices, PICTURES),
        Case(gru_cell),
        Case(last_of_gru_cell, last=True),
        Case(lstm_cell, states=2),
        Case(last_of_lstm_cell, states=2, last=True),
        Case(rnn_cell_time_first),
        Case(learned_start, states=2),  # one of them tells the first frame
        Case(written_into_a_tensor),
        Case(joined_one_by_one),
        Case(layers_in_a_list, states=2),
        Case(last_states_of_layers, states=2, last=True),
        Case(one_loop_after_the_other, states=2),
        Case(one_cell_for_both_loops, states=2),
        Case(selective_scan),
        Case(moving_average),
        Case(smoothed_from_the_first_frame, states=3),  # the frame before, and one that tells the first frame
        Case(less_the_background, states=2),
        Case(filter_of_order_two, states=2),
        Case(spiking),
        Case(carried_along, states=3),
        Case(frames_of_a_network, PICTURES),
        Case(network_inside_of_the_loop, PICTURES),
        Case(list_of_features, PICTURES),
        Case(behind_a_look_ahead, states=6),
        Case(per_pixel, PICTURES),
        Case(attention_to_the_last_state),
        Case(last_frames_in_a_list, states=2, field=3),
        Case(difference_to_the_frame_before, field=2),
        Case(last_frames_in_a_tensor, field=3),
        Case(caches_of_two_layers, states=2, field=5),
    )
}
