"""Parts of random networks: a few layers and a function that joins them. All take and give (N, C, T, S)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.gates import ScopedNorm, newest_max, newest_mean

Args = Mapping[str, Any]
Build = Callable[[Args, int, int], nn.Module]
BUILD: dict[str, Build] = {}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "hardswish": F.hardswish,
}  # fmt: skip


class Made(nn.Module):
    """Layers and the function that joins them; a gate knows over how many entries it pools in the oracle's copy."""

    def __init__(self, function: Callable[..., Tensor], gate: bool = False, **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.gate = function, gate
        self.window: int | None = None
        self.entries, self.whole = 0, 0  # in the last run; in a window
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        self.entries = x.shape[2]
        return self.function(self, x)


def build(function: Callable[[Args, int, int], nn.Module]) -> Callable[[Args, int, int], nn.Module]:
    """Decorator: the function ``_name`` builds the kind ``name`` for so many channels and places."""
    BUILD[function.__name__.lstrip("_")] = function
    return function


# --- what slides over time


@build
def _conv(a: Args, c: int, s: int) -> nn.Module:
    front = (a["k"] - 1) * a["d"] if a["causal"] else 0
    pad = 0 if a["causal"] else a["p"]
    conv = nn.Conv2d(c, a["out"], (a["k"], a["ks"]), (a["s"], 1), (pad, a["ks"] // 2), (a["d"], 1), a["groups"])
    return Made(lambda m, x: m.conv(F.pad(x, (0, 0, front, 0))), conv=conv)


@build
def _pool(a: Args, c: int, s: int) -> nn.Module:
    geometry = (a["k"], 1), (a["s"], 1), (a["p"], 0)
    if a["maximum"]:
        return nn.MaxPool2d(*geometry, (a["d"], 1), False, a["ceil"])
    return nn.AvgPool2d(*geometry, a["ceil"], a["count"], a["divisor"])


@build
def _crop(a: Args, c: int, s: int) -> nn.Module:
    return Made(lambda m, x: x[:, :, a["a"] : x.shape[2] - a["b"] : a["s"]])


@build
def _pad(a: Args, c: int, s: int) -> nn.Module:
    return Made(lambda m, x: F.pad(x, (0, 0, a["a"], a["b"]), value=a["value"]))


@build
def _up(a: Args, c: int, s: int) -> nn.Module:
    if a["how"] == "transposed":
        return nn.ConvTranspose2d(c, c, (a["k"], 1), (a["r"], 1), (a["p"], 0))
    if a["how"] == "repeat":
        return Made(lambda m, x: x.repeat_interleave(a["r"], 2))
    mode = "bilinear" if a["how"] == "linear" else "nearest"
    return Made(lambda m, x: F.interpolate(x, scale_factor=(float(a["r"]), 1.0), mode=mode))


@build
def _shift(a: Args, c: int, s: int) -> nn.Module:
    def written(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        h = max(1, c // 2)
        y[:, :h, 1:] = x[:, :h, :-1]
        y[:, h:, : y.shape[2] - a["n"]] = x[:, h:, a["n"] :]
        return y

    def joined(m: Any, x: Tensor) -> Tensor:
        late = torch.cat([x.new_zeros(*x.shape[:2], a["n"], x.shape[3]), x[:, :, : x.shape[2] - a["n"]]], 2)
        return torch.cat([late[:, : c // 2], x[:, c // 2 :]], 1)

    return Made({"written": written, "joined": joined, "rolled": lambda m, x: joined(m, x) - x}[a["how"]])


@build
def _unfold(a: Args, c: int, s: int) -> nn.Module:
    k, st = a["k"], a["s"]
    if a["how"] == "tensor":
        return Made(lambda m, x: m.mix(x.unfold(2, k, st)).squeeze(-1), mix=nn.Linear(k, 1))

    def columns(m: Any, x: Tensor) -> Tensor:
        y = F.unfold(x, (k, 1), stride=(st, 1), padding=(a["p"], 0))
        return m.mix(y).reshape(x.shape[0], c, -1, x.shape[3])

    return Made(columns, mix=nn.Conv1d(c * k, c, 1))


@build
def _overlap(a: Args, c: int, s: int) -> nn.Module:
    k, st = a["k"], a["s"]

    def blocks(m: Any, x: Tensor) -> Tensor:
        n, _, t, s = x.shape
        y = m.wide(x).permute(0, 3, 1, 2).reshape(n * s, c * k, t)
        length = (t - 1) * st + k
        if a["how"] == "fold":
            y = F.fold(y, (1, length), (1, k), stride=(1, st))[:, :, 0]
        else:
            y = y.reshape(n * s, c, k, t).transpose(2, 3).reshape(n * s, c, t * k)
            index = (torch.arange(t)[:, None] * st + torch.arange(k)).flatten()
            y = y.new_zeros(n * s, c, length).index_add(2, index, y)
        return y.reshape(n, s, c, length).permute(0, 2, 3, 1)

    return Made(blocks, wide=nn.Conv2d(c, c * k, 1))


# --- what remembers, and loops


def _cell(kind: str, c: int, both: bool, layers: int, first: bool) -> nn.Module:
    cells: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    return cells[kind](c, c, layers, batch_first=first, bidirectional=both)


@build
def _rows(a: Args, c: int, s: int) -> nn.Module:
    """A recurrent layer over the places of each frame."""

    def run(m: Any, x: Tensor) -> Tensor:
        n, _, t, s = x.shape
        y = x.permute(0, 2, 3, 1).reshape(n * t, s, c)
        y, last = m.cell(y) if a["first"] else m.cell(y.transpose(0, 1))
        y = y if a["first"] else y.transpose(0, 1)
        if a["last"]:
            state = last[0] if isinstance(last, tuple) else last
            y = y + state[-1][:, None].repeat(1, 1, y.shape[2] // c)
        return m.join(y).reshape(n, t, s, c).permute(0, 3, 1, 2)

    return Made(
        run,
        cell=_cell(a["kind"], c, a["both"], a["layers"], a["first"]),
        join=nn.Linear(c * (2 if a["both"] else 1), c),
    )


@build
def _columns(a: Args, c: int, s: int) -> nn.Module:
    """A recurrent layer over time for each place."""

    def run(m: Any, x: Tensor) -> Tensor:
        n, _, t, s = x.shape
        y = x.permute(0, 3, 2, 1).reshape(n * s, t, c)
        y = m.cell(y)[0] if a["first"] else m.cell(y.transpose(0, 1))[0].transpose(0, 1)
        return y.reshape(n, s, t, c).permute(0, 3, 2, 1)

    return Made(run, cell=_cell(a["kind"], c, False, a["layers"], a["first"]))


@build
def _cumulative(a: Args, c: int, s: int) -> nn.Module:
    return Made(lambda m, x: x.cumsum(2) / torch.arange(1, x.shape[2] + 1, dtype=x.dtype).view(-1, 1))


@build
def _loop(a: Args, c: int, s: int) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        t = x.shape[2]
        if a["how"] == "select":
            return torch.stack([torch.tanh(m.f(x[:, :, k])) for k in range(t)], 2)
        if a["how"] == "unbind":
            return torch.stack([m.f(y) for y in x.unbind(2)], 2)
        if a["how"] == "split":
            return torch.cat([m.f(y.squeeze(2)).unsqueeze(2) for y in x.split(1, 2)], 2)
        if a["how"] == "chunk":
            return torch.cat([m.f(y.squeeze(2)).unsqueeze(2) for y in x.chunk(t, 2)], 2)
        return torch.stack([m.f(x[:, :, k + 1] - x[:, :, k]) for k in range(t - 1)], 2)

    return Made(run, f=nn.Conv1d(c, c, 3, padding=1))


# --- attention, norms, gates


@build
def _attend(a: Args, c: int, s: int) -> nn.Module:
    """Attention over places, or over time with a band."""

    def run(m: Any, x: Tensor) -> Tensor:
        t = x.shape[2]
        over_time = a["band"] > 0
        y = x.permute(0, 3, 2, 1) if over_time else x.permute(0, 2, 3, 1)
        b, rows, tokens = y.shape[0], y.shape[1], y.shape[2]
        q, k, v = (p.reshape(b * rows, tokens, 1, c).transpose(1, 2) for p in m.qkv(y).chunk(3, -1))
        mask = torch.ones(t, t, dtype=torch.bool).tril().triu(1 - a["band"]) if over_time else None
        if a["hand"] and mask is None:
            weights = torch.softmax(q @ k.transpose(-1, -2) * c**-0.5, -1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(b, rows, tokens, c)
        return x + (y.permute(0, 3, 2, 1) if over_time else y.permute(0, 3, 1, 2))

    return Made(run, qkv=nn.Linear(c, 3 * c))


@build
def _norm(a: Args, c: int, s: int) -> nn.Module:
    def by_hand(m: Any, x: Tensor) -> Tensor:
        off = x - x.mean(1, keepdim=True)
        return off / (off.square().mean(1, keepdim=True) + 0.1).sqrt()

    numbers = {"channels": c, "frame": c * s, "frame_group": c * s}.get(a["how"], 2)
    if numbers == 1:
        raise ValueError("of one number a norm leaves rounding alone")

    how: dict[str, Callable[[], nn.Module]] = {
        "channels": lambda: Made(lambda m, x: m.n(x.movedim(1, -1)).movedim(-1, 1), n=nn.LayerNorm(c)),
        "frame": lambda: Made(lambda m, x: m.n(x.transpose(1, 2)).transpose(1, 2), n=nn.LayerNorm((c, s))),
        "frame_group": lambda: Made(
            lambda m, x: m.n(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2),
            n=nn.GroupNorm(1, c),
        ),
        "batch": lambda: nn.BatchNorm2d(c),
        "hand": lambda: Made(by_hand),
        "unit": lambda: Made(lambda m, x: F.normalize(x, dim=1, eps=0.1)),
        "softmax": lambda: Made(lambda m, x: x.softmax(1 if c > 1 else 3)),
    }
    return how[a["how"]]()


@build
def _gate(a: Args, c: int, s: int) -> nn.Module:
    def pooled(m: Any, x: Tensor) -> Tensor:
        maximum = a["pool"] == "amax"
        if m.window is not None:
            y = x.amax(3, True) if maximum else x.mean(3, True)
            return newest_max(y, m.window) if maximum else newest_mean(y, m.window)
        if a["pool"] == "adaptive":
            return F.adaptive_avg_pool2d(x, 1)
        return x.amax((2, 3), True) if maximum else x.mean((2, 3), keepdim=True)

    return Made(lambda m, x: x * torch.sigmoid(F.softsign(m.f(pooled(m, x)))), gate=True, f=nn.Conv2d(c, c, 1))


@build
def _graph(a: Args, c: int, s: int) -> nn.Module:
    """A mean over time makes a matrix that every frame is multiplied by."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, v = m.q(x), m.v(x)
        q = newest_mean(q, m.window) if m.window is not None else q.mean(2)
        graph = torch.tanh(q.unsqueeze(-1) - q.unsqueeze(-2))
        if m.window is not None:
            return torch.einsum("nctuv,nctv->nctu", graph, v)
        if a["how"] == "einsum":
            return torch.einsum("ncuv,nctv->nctu", graph, v)
        return torch.matmul(v, graph.transpose(2, 3))

    return Made(run, gate=True, q=nn.Conv2d(c, c, 1), v=nn.Conv2d(c, c, 1))


@build
def _statistics(a: Args, c: int, s: int) -> nn.Module:
    """A norm over time and places: group or instance norm."""
    groups = c if a["how"] == "instance" else 1
    norm: nn.Module = nn.InstanceNorm2d(c, affine=True) if a["how"] == "instance" else nn.GroupNorm(1, c)

    def run(m: Any, x: Tensor) -> Tensor:
        if m.window is None:
            return m.n(x)
        return ScopedNorm(groups, m.n, m.window)(x.unsqueeze(-1)).squeeze(-1)

    return Made(run, gate=True, n=norm)


# --- what moves dims and places


@build
def _view(a: Args, c: int, s: int) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        n, _, t, s = x.shape
        if a["how"] == "batch":
            return m.f(x.transpose(1, 2).reshape(n * t, c, s)).reshape(n, t, c, s).transpose(1, 2)
        if a["how"] == "channels":
            return m.g(x.permute(0, 1, 3, 2).reshape(n, c * s, t)).reshape(n, c, s, t).permute(0, 1, 3, 2)
        if a["how"] == "places":
            return m.h(x.flatten(2, 3)).unflatten(2, (t, s))
        if a["how"] == "first":
            return m.lin(x.permute(2, 0, 3, 1)).permute(1, 3, 0, 2)
        y = x.permute(0, 3, 2, 1).flatten(0, 1)
        return m.lin(y).unflatten(0, (n, s)).permute(0, 3, 2, 1)

    f, g, h = nn.Conv1d(c, c, 3, padding=1), nn.Conv1d(c * s, c * s, 3, padding=1), nn.Conv1d(c, c, 1)
    return Made(run, f=f, g=g, h=h, lin=nn.Linear(c, c))


@build
def _gather(a: Args, c: int, s: int) -> nn.Module:
    order = torch.tensor(a["order"])
    how: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "index": lambda m, x: x[:, order % c],
        "select": lambda m, x: x.index_select(3, order[:s] % s),
        "flip": lambda m, x: x.flip(3),
        "roll": lambda m, x: x.roll(1, 3),
        "scatter": lambda m, x: torch.zeros_like(x).scatter_add(3, (order[:s] % s).expand(x.shape), x),
        "sort": lambda m, x: x.sort(3)[0],
        "topk": lambda m, x: x.topk(1, 1)[0].expand(-1, c, -1, -1),
        "repeat": lambda m, x: torch.cat([x, x.repeat(1, 1, 1, 1)], 1),
        "where": lambda m, x: torch.where(x > 0, x, x[:, order % c]),
        "clamp": lambda m, x: x.clamp(min=x.mean(1, keepdim=True)),
    }
    return Made(how[a["how"]])


@build
def _count(a: Args, c: int, s: int) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        n, _, t, s = x.shape
        line = torch.arange(t, dtype=x.dtype) * 0.25
        if a["how"] == "plain":
            return x + line.view(-1, 1)
        if a["how"] == "expanded":
            return x + line.view(1, 1, -1, 1).expand(n, c, t, s)
        return torch.cat([x, (line + 1).view(1, 1, -1, 1).expand(n, 1, t, s)], 1)

    return Made(run)


@build
def _act(a: Args, c: int, s: int) -> nn.Module:
    return Made(lambda m, x: ACTS[a["how"]](x))
