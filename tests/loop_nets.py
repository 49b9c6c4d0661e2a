"""Networks with loops over frames written by hand, in many spellings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from loop_filters import (
    carried_along,
    filter_in_transposed_form,
    filter_of_order_two,
    less_the_background,
    mean_and_variance_so_far,
    moving_average,
    on_each_frame_twice,
    smoothed_from_the_first_frame,
    spiking,
    turning,
)
from loop_network import PICTURES, SERIES, Forward, zeros
from loop_starts import another_first_turn, both_states_started_by_layers, change_of_features, started_by_a_layer
from torch import Tensor


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


def frames_of_a_network(m: Any, x: Tensor) -> Tensor:
    """Features of all frames at once, folded into the batch; then a cell."""
    y, h, out = m.cnn(x.flatten(0, 1)).unflatten(0, x.shape[:2]), zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(y[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def frames_of_a_network_with_batch_norm(m: Any, x: Tensor) -> Tensor:
    y, h, out = m.norm(m.wide(x.flatten(0, 1))).relu().mean((2, 3)).unflatten(0, x.shape[:2]), zeros(x, 5), []
    for t in range(x.shape[1]):
        h = m.gru(y[:, t, :4], h)
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


def behind_frames_written_in_place(m: Any, x: Tensor) -> Tensor:
    """Some channels come a frame later, and all stand in another order."""
    y = torch.zeros_like(x)
    y[:, 1:, :1] = x[:, :-1, :1]
    y[:, :, 1:] = x[:, :, 1:]
    return gru_cell(m, y[:, :, torch.tensor([2, 0, 1, 3])])


def behind_frames_side_by_side(m: Any, x: Tensor) -> Tensor:
    return gru_cell(m, x.unfold(1, 2, 1).mean(-1))


def recurrent_layer_frame_by_frame(m: Any, x: Tensor) -> Tensor:
    h, out = None, []
    for t in range(x.shape[1]):
        y, h = m.two_layers(x[:, t : t + 1], h)
        out.append(m.head(y))
    return torch.cat(out, 1)


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


def part_with_a_sign_in_its_name(m: Any, x: Tensor) -> Tensor:
    h, out = zeros(x, 4), []
    for t in range(x.shape[1]):
        h = torch.tanh(getattr(m, "named-1")(x[:, t]) + h)
        out.append(h)
    return torch.stack(out, 1)


def sum_of_the_last_states(m: Any, x: Tensor) -> Tensor:
    """Each of the first states is a zero of its own."""
    h, states, out = zeros(x, 4), [zeros(x, 4) for _ in range(3)], []
    for t in range(x.shape[1]):
        h = torch.tanh(m.embed(h) + torch.stack(states[-3:]).sum(0) + m.to_d(x[:, t]))
        states.append(h)
        out.append(h)
    return torch.stack(out, 1)


def weighing_the_last_states(m: Any, x: Tensor) -> Tensor:
    """As many values are handed on in the middle of a turn as at its end (a motion-aware unit)."""
    h, out = None, []
    states, features = ([zeros(x, 4) for _ in range(3)] for _ in range(2))
    for t in range(x.shape[1]):
        feature = m.to_d(x[:, t])
        h = zeros(x, 4) if h is None else h
        last, beside = torch.stack(states[-3:]), torch.stack(features[-3:])
        weights = torch.stack([(beside[i] * m.embed(feature)).sum(1) for i in range(3)])
        trend = (last * weights.unsqueeze(-1).softmax(0)).sum(0)
        h = torch.tanh(m.embed(h) + trend + feature)
        states.append(h)
        features.append(feature)
        out.append(h)
    return torch.stack(out, 1)


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
        Case(filter_in_transposed_form, states=2),
        Case(mean_and_variance_so_far, states=3),  # one of them counts
        Case(spiking),
        Case(turning, states=2),  # its parts
        Case(carried_along, states=3),
        Case(started_by_a_layer, states=2),  # one of them tells the first frame
        Case(both_states_started_by_layers, states=3),
        Case(another_first_turn, states=3),
        Case(change_of_features, states=4),
        Case(frames_of_a_network, PICTURES),
        Case(frames_of_a_network_with_batch_norm, PICTURES),
        Case(network_inside_of_the_loop, PICTURES),
        Case(list_of_features, PICTURES),
        Case(behind_a_look_ahead, states=6),
        Case(behind_frames_written_in_place, states=3),
        Case(behind_frames_side_by_side, states=3),
        Case(on_each_frame_twice),
        Case(recurrent_layer_frame_by_frame, states=2),
        Case(per_pixel, PICTURES),
        Case(attention_to_the_last_state),
        Case(last_frames_in_a_list, states=2, field=3),
        Case(difference_to_the_frame_before, field=2),
        Case(last_frames_in_a_tensor, field=3),
        Case(caches_of_two_layers, states=2, field=5),
        Case(part_with_a_sign_in_its_name),
        Case(sum_of_the_last_states, states=3),
        Case(weighing_the_last_states, states=6),
    )
}
