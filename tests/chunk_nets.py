"""Causal networks that compute a clip chunk by chunk, with caches of the last frames, on (N, 4, T)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Tensor]
Cache = dict[str, Tensor]


class Chunked(nn.Module):
    """A few layers, and the lines of Python that join them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._forward = forward
        self.a, self.b, self.c = (nn.Conv1d(4, 4, 3) for _ in range(3))
        self.slow, self.fast, self.mix = nn.Conv1d(4, 4, 3, stride=2), nn.Conv1d(4, 8, 3), nn.Conv1d(4, 4, 1)
        self.norm, self.scale = nn.GroupNorm(2, 4), nn.BatchNorm1d(4)
        self.up, self.wide = nn.ConvTranspose1d(4, 4, 4, stride=2), nn.ConvTranspose1d(4, 4, 3, dilation=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.heads, self.place = nn.Linear(4, 12), nn.Parameter(torch.randn(4, 13))

    def forward(self, x: Tensor) -> Tensor:
        """What the lines compute."""
        return self._forward(self, x)


def ones(x: Tensor) -> Iterator[Tensor]:
    """Chunks of one frame."""
    return (x[:, :, t : t + 1] for t in range(x.shape[2]))


def first_alone(x: Tensor) -> Iterator[Tensor]:
    """The first frame by itself, then chunks of four."""
    yield x[:, :, :1]
    for t in range(1, x.shape[2], 4):
        yield x[:, :, t : t + 4]


def causal(conv: nn.Module, x: Tensor, cache: Cache, name: str) -> Tensor:
    """A convolution on a chunk and the last two frames before it; zeros in front of the first ones."""
    past = cache.get(name)
    count = 0 if past is None else past.shape[2]
    joined = x if past is None else torch.cat([past, x], 2)
    cache[name] = joined[:, :, -2:].clone()
    return conv(F.pad(joined, (2 - count, 0)))


def replicated(conv: nn.Module, x: Tensor, cache: Cache, name: str) -> Tensor:
    """The same, with the first frame in front of the first ones."""
    past = cache[name] if name in cache else torch.cat([x[:, :, :1]] * 2, 2)
    joined = torch.cat([past, x], 2)
    cache[name] = joined[:, :, -2:]
    return conv(joined)


def layers(chunks: Callable[[Tensor], Any], cached: Callable[..., Tensor]) -> Forward:
    """Two convolutions and a way past them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        cache: Cache = {}
        out = []
        for chunk in chunks(x):
            y = F.silu(cached(m.a, chunk, cache, "a"))
            out.append(chunk + F.silu(cached(m.b, y, cache, "b")))
        return m.mix(torch.cat(out, 2))

    return forward


def starts_with_zeros(m: Any, x: Tensor) -> Tensor:
    past, out = x.new_zeros(x.shape[0], 4, 2), None
    for chunk in x.split(3, 2):
        joined = torch.cat([past, m.mix(chunk)], 2)
        past = joined[:, :, -2:]
        y = torch.tanh(m.a(joined))
        out = y if out is None else torch.cat([out, y], 2)
    return out


def doubled(m: Any, x: Tensor) -> Tensor:
    """The first frame as it is; of each other one two."""
    cache: Cache = {}
    out = []
    for t, chunk in enumerate(ones(x)):
        y = causal(m.a, chunk, cache, "a")
        if t:
            y = causal(m.fast, y, cache, "twice").unflatten(1, (2, 4)).permute(0, 2, 3, 1).flatten(2)
        out.append(causal(m.b, F.relu(y), cache, "b"))
    return torch.cat(out, 2)


def halved(m: Any, x: Tensor) -> Tensor:
    """The first frame as it is; of the others each two one."""
    cache: Cache = {}
    out = []
    for t, chunk in enumerate(first_alone(x)):
        y = causal(m.a, chunk, cache, "a")
        last = y[:, :, -1:]
        if t:
            y = m.slow(torch.cat([cache["half"], y], 2))
        cache["half"] = last
        out.append(causal(m.b, F.relu(y), cache, "b"))
    return torch.cat(out, 2)


def attention_in_a_frame(m: Any, x: Tensor) -> Tensor:
    """Channels of a frame attend to each other: frames are folded into the batch, and come out again."""
    cache: Cache = {}
    out = []
    for chunk in ones(x):
        y = causal(m.a, chunk, cache, "a")
        rows = m.heads(y.transpose(1, 2).reshape(-1, 4))
        q, k, v = rows.reshape(-1, 1, 4, 3).chunk(3, -1)
        y = y + F.scaled_dot_product_attention(q, k, v).reshape(x.shape[0], -1, 4).transpose(1, 2)
        out.append(causal(m.b, F.normalize(y, dim=1), cache, "b"))
    return torch.cat(out, 2)


def one_layer_twice(m: Any, x: Tensor) -> Tensor:
    """One convolution for two layers, each with a cache of its own."""
    cache: Cache = {}
    out = [causal(m.a, torch.relu(causal(m.a, chunk, cache, "1")), cache, "2") for chunk in ones(x)]
    return torch.cat(out, 2)


def written(m: Any, x: Tensor) -> Tensor:
    cache: Cache = {}
    y = torch.empty_like(x)
    for t, chunk in enumerate(ones(x)):
        y[:, :, t : t + 1] = causal(m.a, chunk, cache, "a")
    return y


def pooled(k: int, pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pool over each frame and those before it, as many as there are in a cache."""

    def cached(conv: nn.Module, x: Tensor, cache: Cache, name: str) -> Tensor:
        y = causal(conv, x, cache, name)
        past = cache[name + "p"] if name + "p" in cache else y[:, :, :1].expand(-1, -1, k - 1)
        joined = torch.cat([past, y], 2)
        cache[name + "p"] = joined[:, :, 1 - k :]
        return pool(joined, k, 1)

    return cached


def halved_by(pool: Callable[..., Tensor]) -> Forward:
    """The first frame as it is; of the others a pool of each two."""

    def forward(m: Any, x: Tensor) -> Tensor:
        cache: Cache = {}
        out = []
        for t, chunk in enumerate(first_alone(x)):
            y = causal(m.a, chunk, cache, "a")
            out.append(causal(m.b, pool(y, 2, 2) if t else y, cache, "b"))
        return torch.cat(out, 2)

    return forward


def spread(size: int) -> Forward:
    """A transposed convolution on a chunk and the frame before it, of which the middle is kept."""

    def forward(m: Any, x: Tensor) -> Tensor:
        cache: Cache = {}
        past, out = None, []
        for chunk in x.split(size, 2):
            y = torch.tanh(causal(m.a, chunk, cache, "a"))
            past = torch.zeros_like(y[:, :, :1]) if past is None else past
            wide = m.up(torch.cat([past, y], 2))[:, :, 2:-2]
            past = y[:, :, -1:]
            out.append(causal(m.b, wide, cache, "b"))
        return torch.cat(out, 2)

    return forward


def spread_apart(m: Any, x: Tensor) -> Tensor:
    """The same with taps that lie apart, and the last frames of all chunks at the end."""
    past, out = None, []
    for chunk in x.split(3, 2):
        joined = chunk if past is None else torch.cat([past, chunk], 2)
        wide = m.wide(joined)
        out.append(wide[:, :, joined.shape[2] - chunk.shape[2] : joined.shape[2]])
        past = joined[:, :, -4:]
    return m.mix(torch.cat([*out, wide[:, :, joined.shape[2] :]], 2))


def repeated(size: int) -> Forward:
    """Each frame three times, in chunks."""

    def forward(m: Any, x: Tensor) -> Tensor:
        cache: Cache = {}
        out = []
        for chunk in x.split(size, 2):
            y = F.interpolate(causal(m.a, chunk, cache, "a"), scale_factor=3.0)
            out.append(causal(m.b, y, cache, "b"))
        return torch.cat(out, 2)

    return forward


# Each is a stream, with this delay.
def deep(m: Any, x: Tensor) -> Tensor:
    """Causal convolutions with more layers between them than Python's stack is deep."""
    cache: Cache = {}
    out = []
    for chunk in x.split(5, 2):
        y = causal(m.a, chunk, cache, "a")
        for _ in range(200):
            y = torch.sin(y)
        out.append(causal(m.b, y, cache, "b"))
    return torch.cat(out, 2)


def pieces(
    f: Callable[[Any, Tensor], Tensor],
    cut: Callable[[Tensor], Any] = lambda rows: rows.split(4),
    join: Callable[[list[Tensor]], Tensor] = torch.cat,
) -> Forward:
    """Frames as rows of a batch, some rows at a time, between convolutions over time."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.conv1d(x, m.a.weight, padding=1)
        rows = y.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        rows = join([f(m, p) for p in cut(rows)])
        return F.conv1d(rows.flatten(1).unflatten(0, (x.shape[0], -1)).transpose(1, 2), m.b.weight, padding=1)

    return forward


def layered(m: Any, rows: Tensor) -> Tensor:
    return torch.tanh(m.scale(m.mix(m.norm(rows))))


def reparametrized(m: Any, rows: Tensor) -> Tensor:
    """A weight that each piece computes again."""
    return F.conv1d(rows, m.mix.weight / m.mix.weight.norm())


def cut_by_range(rows: Tensor) -> list[Tensor]:
    return [rows[i : i + 3] for i in range(0, rows.shape[0], 3)]


def written_by_rows(m: Any, x: Tensor) -> Tensor:
    def join(parts: list[Tensor]) -> Tensor:
        out, at = torch.empty_like(torch.cat(parts)), 0
        for part in parts:
            out[at : at + part.shape[0]] = part
            at += part.shape[0]
        return out

    return pieces(layered, join=join)(m, x)


def one_behind_the_other(m: Any, x: Tensor) -> Tensor:
    """Norms in pieces, with the first frame in front of each convolution, as Mochi's autoencoder has them."""
    for conv in (m.a, m.b):
        rows = torch.cat([m.norm(p) for p in x.transpose(1, 2).flatten(0, 1).split(8)])
        y = F.silu(rows.unflatten(0, (x.shape[0], -1)).transpose(1, 2))
        x = conv(torch.cat([y[:, :, :1], y[:, :, :1], y], 2))
    return x


def attended(m: Any, rows: Tensor) -> Tensor:
    """Three numbers of each row, made of its own, attend to each other."""
    words = torch.cat([rows, rows.sin(), rows.cos()], 2).transpose(1, 2)
    return m.attention(words, words, words, need_weights=False)[0].mean(1).unsqueeze(2)


def alone(m: Any, row: Tensor) -> Tensor:
    """One row, as a batch of one."""
    return layered(m, row[None])[0]


def squeezed(m: Any, row: Tensor) -> Tensor:
    return layered(m, row.unsqueeze(0)).squeeze(0)


def of_time(k: int) -> Forward:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.conv1d(x, m.a.weight, padding=1)
        y = torch.cat([m.mix(torch.relu(p)) * 2 for p in y.split(k, 2)], 2)
        return F.conv1d(y, m.b.weight, padding=1)

    return forward


def two_results(m: Any, x: Tensor) -> Tensor:
    rows = F.conv1d(x, m.a.weight, padding=1).transpose(1, 2).flatten(0, 1).unsqueeze(2)
    both = [(torch.tanh(h), h.mean(1, keepdim=True)) for h in map(m.mix, rows.split(7))]
    rows = torch.cat([a for a, _ in both]) * torch.cat([b for _, b in both])
    return F.conv1d(rows.flatten(1).unflatten(0, (x.shape[0], -1)).transpose(1, 2), m.b.weight, padding=1)


CHUNKED: dict[str, tuple[Forward, int]] = {
    "one frame each": (layers(ones, causal), 0),
    "two frames each": (layers(lambda x: x.split(2, 2), causal), 0),
    "first one alone": (layers(first_alone, causal), 0),
    "first one repeated": (layers(ones, replicated), 0),
    "starts with zeros": (starts_with_zeros, 0),
    "doubled": (doubled, 1),
    "halved": (halved, 0),
    "attention in a frame": (attention_in_a_frame, 0),
    "one layer twice": (one_layer_twice, 0),
    "written": (written, 0),
    "means of a cache": (layers(ones, pooled(3, F.avg_pool1d)), 0),
    "maxima of a cache": (layers(lambda x: x.split(4, 2), pooled(2, F.max_pool1d)), 0),
    "means of two": (halved_by(F.avg_pool1d), 0),
    "maxima of two": (halved_by(F.max_pool1d), 0),
    "spread": (spread(1), 0),
    "spread, four each": (spread(4), 0),
    "spread by taps that lie apart": (spread_apart, 0),
    "repeated": (repeated(1), 0),
    "repeated, four each": (repeated(4), 0),
    "deep": (deep, 0),
    "rows, split": (pieces(layered), 2),
    "rows, in two": (pieces(layered, lambda rows: rows.chunk(2)), 2),
    "rows, each in a batch of one": (pieces(alone, list, torch.stack), 2),
    "rows, with attention in each": (pieces(attended), 2),
    "rows, squeezed": (pieces(squeezed, torch.unbind, torch.stack), 2),
    "rows, in slices": (pieces(layered, cut_by_range), 2),
    "rows, one by one": (pieces(layered, lambda rows: [rows[i : i + 1] for i in range(rows.shape[0])]), 2),
    "rows, by a weight of their own": (pieces(reparametrized), 2),
    "rows, written": (written_by_rows, 2),
    "rows, two results": (two_results, 2),
    "rows, one behind the other": (one_behind_the_other, 0),
    "two pieces of time": (of_time(7), 2),
    "three pieces of time": (of_time(5), 2),
}


def over_a_chunk(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.mix(torch.softmax(chunk, 2)) for chunk in x.split(5, 2)], 2)


def with_a_place(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.mix(torch.tanh(chunk) * m.place[:, t : t + 1]) for t, chunk in enumerate(ones(x))], 2)


def remembering(m: Any, x: Tensor) -> Tensor:
    """Each frame is made of all before it."""
    h, out = torch.zeros_like(x[:, :, :1]), []
    for chunk in ones(x):
        h = torch.tanh(m.mix(chunk) + 0.5 * h)
        out.append(h)
    return torch.cat(out, 2)


def in_order(m: Any, x: Tensor) -> Tensor:
    """The channels of each frame by their values."""
    return torch.cat([m.mix(chunk.topk(4, 1)[0]) for chunk in x.split(5, 2)], 2)


def statistics_of_rows(m: Any, rows: Tensor) -> Tensor:
    return F.batch_norm(rows, None, None, training=True)


def pieces_alone(f: Callable[[Any, Tensor], Tensor]) -> Forward:
    """Frames as rows of a batch, in two pieces."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        rows = torch.cat([m.mix(f(m, p)) for p in rows.chunk(2)])
        return rows.flatten(1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    return forward


def padded_pieces(m: Any, x: Tensor) -> Tensor:
    """A convolution over time that sees zeros at the ends of each piece."""
    return torch.cat([F.conv1d(p, m.a.weight, padding=1) for p in x.split(7, 2)], 2)


# None of them is computed frame by frame from a few frames.
NOT_CHUNKED: dict[str, Forward] = {
    "over a chunk": over_a_chunk,
    "with a place": with_a_place,
    "remembering": remembering,
    "by an operator that gives several tensors": in_order,
    "rows by their statistics": pieces_alone(statistics_of_rows),
    "rows without their mean": pieces_alone(lambda m, p: p - p.mean(0, keepdim=True)),
    "rows in the other order": pieces_alone(lambda m, p: p.flip(0)),
    "rows by their number": pieces_alone(lambda m, p: p * torch.arange(p.shape[0]).view(-1, 1, 1)),
    "over one of two pieces": lambda m, x: torch.cat([m.mix(torch.softmax(p, 2)) for p in x.split(7, 2)], 2),
}
