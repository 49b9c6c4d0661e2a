"""A random network as data, the module it stands for, and how one is drawn from a seed.

The repr of a `Sketch` is a Python expression that gives it back: paste it into a test to run a failure again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import randomise

from .made import BUILD, Made

MOST = 4  # largest total stride
SHORTEST = 3  # entries that a tensor has at least
WHOLE = {"flatten", "std"}  # heads that do not slide: the padding that they read is part of their window
FIRST = {"columns", "cumulative", "count"}  # right only where nothing comes before the stream's first frame


@dataclass(frozen=True)
class Block:
    """One part: a kind of `BUILD` with its arguments, or `join` of two branches."""

    kind: str
    args: Mapping[str, Any] = field(default_factory=dict)
    a: tuple[Block, ...] = ()
    b: tuple[Block, ...] = ()

    def kinds(self) -> set[str]:
        """Its kind, and those inside it."""
        name = f"{self.kind}-{self.args['how']}" if "how" in self.args else self.kind
        return {self.kind, name} | {k for block in (*self.a, *self.b) for k in block.kinds()}

    def front(self, kind: str) -> int:
        """Entries that it crops, or pads, in front, on all ways together; those that a kernel reads nothing beside."""
        own = self.args["a"] if self.kind == kind else 0
        if kind == "pad" and self.kind == "conv":
            own = max(0, self.args["p"] - (self.args["k"] - 1) * self.args["d"])
        return own + sum(block.front(kind) for block in (*self.a, *self.b))


@dataclass(frozen=True)
class Sketch:
    """A network: `inputs` is plain, two, slow (a second one at half the rate), uint8 or tokens (whole numbers)."""

    blocks: tuple[Block, ...]
    inputs: str = "plain"
    channels: int = 2
    places: int = 3
    frames: int = 12
    time_dim: int = 2
    restore: bool = False
    head: str = ""
    scope: str = "frame"
    window: int = 0
    dense: bool = False
    pulse: int = 0
    batch: int = 1
    captured: int = 1
    ends: tuple[int, ...] = ()

    def kinds(self) -> set[str]:
        """The families that it has something of."""
        found = {k for block in self.blocks for k in block.kinds()} | {f"inputs-{self.inputs}", f"time-{self.time_dim}"}
        found |= {f"head-{self.head}"} if self.head else set()
        flags = {"window": self.window, "dense": self.dense, "ends": self.ends, "several frames a step": self.pulse}
        gates = {"gate", "graph", "statistics"} & found
        return found | {name for name, on in flags.items() if on} | ({f"scope-{self.scope}"} if gates else set())

    def front(self, kind: str) -> int:
        """Frames that are cropped, or padded, in front, at most."""
        return MOST * sum(block.front(kind) for block in self.blocks)


class Branches(nn.Module):
    """Two branches cut to one length and joined."""

    def __init__(self, how: str, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.how, self.a, self.b = how, a, b

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        self.lengths = a.shape[2], b.shape[2]
        length = min(self.lengths)
        a, b = a[:, :, :length], b[:, :, :length]
        if self.how == "cat":
            return torch.cat([a, b], 1)
        if self.how == "stack":
            return torch.stack([a, b], 2).mean(2)
        if self.how == "mul":
            return a * torch.sigmoid(b)
        return torch.maximum(a, b) if self.how == "larger" else a + b


class SketchNet(nn.Module):
    """The module: inputs to (N, C, T, S), the blocks, the output or a head."""

    def __init__(self, sketch: Sketch) -> None:
        super().__init__()
        self.sketch = sketch
        c = sketch.channels
        self.embed = nn.Embedding(8, c) if sketch.inputs == "tokens" else nn.Identity()
        self.mix = nn.Conv2d(c, c, 1)
        self.body = _sequence(sketch.blocks, c, sketch.places, sketch.frames)
        shape = self.body(torch.zeros(2, c, sketch.frames, sketch.places)).shape
        if min(shape) < 1 or shape[2] < SHORTEST:
            raise ValueError("too short")
        self.out = nn.Linear(shape[1] * shape[2] * shape[3], 3) if sketch.head == "flatten" else nn.Identity()
        self.sliding = len(sketch.blocks) - (_paddings(sketch.blocks) if sketch.head in WHOLE else 0)

    def taken(self, *inputs: Tensor) -> Tensor:
        """The inputs as one tensor (N, C, T, S)."""
        x, *more = inputs
        if self.sketch.inputs == "tokens":
            return self.embed(x.movedim(self.sketch.time_dim, 1)).permute(0, 3, 1, 2)
        x = x.movedim(self.sketch.time_dim, 2)
        if self.sketch.inputs == "uint8":
            x = x.to(self.mix.weight.dtype) / 255
        if more:
            y = self.mix(more[0].movedim(self.sketch.time_dim, 2))
            x = x + (F.interpolate(y, scale_factor=(2.0, 1.0)) if self.sketch.inputs == "slow" else y)
        return x

    def trunk(self, *inputs: Tensor) -> Tensor:
        """What has a time axis, without the paddings that are part of the head's window."""
        y = self.body[: self.sliding](self.taken(*inputs))
        return y.movedim(2, self.sketch.time_dim) if self.sketch.restore else y

    def head(self, y: Tensor) -> Tensor:
        """One answer for a clip's worth of entries."""
        y = y.movedim(self.sketch.time_dim, 2) if self.sketch.restore else y
        y = self.body[self.sliding :](y)
        how = self.sketch.head
        if how == "last":
            return y[:, :, -1]
        if how == "flatten":
            return self.out(y.flatten(1))
        return {"mean": y.mean, "amax": y.amax, "std": y.std}[how]((2, 3))

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.trunk(*inputs)
        return self.head(y) if self.sketch.head else y

    def scoped(self) -> SketchNet:
        """The copy whose gates pool over one entry, or over as many as the clip has."""
        twin = copy.deepcopy(self)
        for module in twin.modules():
            if isinstance(module, Made) and module.gate:
                module.window = 1 if self.sketch.scope == "frame" else module.whole
        return twin

    def uneven(self) -> bool:
        """Says whether branches of different rates meet: at one index, not at one time."""
        twin, found = self.scoped(), []
        for frames in (48, 96):
            twin.body(torch.zeros(1, self.sketch.channels, frames, self.sketch.places))
            found.append([m.lengths for m in twin.modules() if isinstance(m, Branches)])
        return any(b[0] - a[0] != b[1] - a[1] for a, b in zip(*found, strict=True))


def _paddings(blocks: tuple[Block, ...]) -> int:
    """Counts the paddings at the end that add more than a crop in front of them leaves out: those do not slide."""
    added, behind = 0, blocks[::-1]
    for number, block in enumerate(behind):
        if block.kind != "pad":
            cut = block.args["a"] + block.args["b"] if block.kind == "crop" and block.args["s"] == 1 else 0
            return number if added > cut else 0
        added += block.args["a"] + block.args["b"]
    return len(blocks)


def _sequence(blocks: tuple[Block, ...], c: int, s: int, frames: int) -> nn.Sequential:
    made = nn.Sequential()
    x = torch.zeros(2, c, frames, s)
    for block in blocks:
        c, s = x.shape[1], x.shape[3]
        if block.kind == "join":
            part: nn.Module = Branches(block.args["how"], *(_sequence(p, c, s, x.shape[2]) for p in (block.a, block.b)))
        else:
            part = BUILD[block.kind](block.args, c, s)
        made.append(part)
        with torch.no_grad():
            x = part.eval()(x)
    return made


def shapes(sketch: Sketch) -> tuple[tuple[int, ...], ...]:
    """The shapes of one clip of each input."""
    if sketch.inputs == "tokens":
        return (tuple(torch.empty(1, sketch.frames, sketch.places, device="meta").movedim(1, sketch.time_dim).shape),)
    count = {"two": [1, 1], "slow": [2, 1]}.get(sketch.inputs, [1])
    base = max(count)
    return tuple(
        tuple(
            torch.empty(1, sketch.channels, sketch.frames * n // base, sketch.places, device="meta")
            .movedim(2, sketch.time_dim)
            .shape
        )
        for n in count
    )


def module_of(sketch: Sketch) -> SketchNet:
    """The module with its weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    found = [torch.randn(shape, generator=generator) for shape in shapes(sketch)]
    dtype = dtypes(sketch)[0]
    if dtype != torch.float32:
        found[0] = (found[0].abs() * 2).clamp(0, 7).to(dtype)
    net = SketchNet(sketch)
    randomise(net, *found)
    if sketch.window:
        found = [torch.cat([x] * (sketch.window // sketch.frames), sketch.time_dim) for x in found]
    with torch.no_grad():
        net.trunk(*found)
    for module in net.modules():
        if isinstance(module, Made):
            module.whole = module.entries  # later runs are of other lengths
    return net


def dtypes(sketch: Sketch) -> tuple[torch.dtype, ...]:
    """The dtype of each input."""
    first = {"uint8": torch.uint8, "tokens": torch.int64}.get(sketch.inputs, torch.float32)
    return (first, *(torch.float32 for _ in shapes(sketch)[1:]))


# --- drawing


def draw(seed: int, most: int = 4) -> Sketch:
    """The network of a seed."""
    r = Random(seed)
    while True:
        sketch = _drawn(r, most)
        try:
            with torch.no_grad():
                module_of(sketch)
            return sketch
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
            continue  # a kernel that does not fit, a tensor without entries


def _drawn(r: Random, most: int) -> Sketch:
    inputs = r.choice(["plain", "plain", "plain", "two", "slow", "uint8", "tokens"])
    places = r.choice([1, 3, 4])
    blocks = tuple(_block(r, 1) for _ in range(r.randint(1, most)))
    kinds = {k for block in blocks for k in block.kinds()}
    head = r.choice(["", "", "mean", "amax", "std", "last", "flatten"]) if not kinds & FIRST else ""
    frames = r.choice([8, 10, 12, 13, 16]) if inputs != "slow" else r.choice([8, 12, 16])
    up = {"up", "overlap", "dense"} & kinds
    ends = r.random() < 0.2 and not head
    return Sketch(
        blocks,
        inputs,
        r.choice([1, 2, 4]),
        3 if {"statistics", "graph"} & kinds else places,  # of one number by itself nothing is left
        frames,
        time_dim=r.choice([2, 2, 1, 3] if inputs != "tokens" else [1, 2]),
        restore=inputs != "tokens" and r.random() < 0.3,
        head=head,
        scope=r.choice(["frame", "window"]),
        window=frames * 2 if head in ("mean", "amax", "std", "last") and inputs != "slow" and r.random() < 0.3 else 0,
        dense=inputs != "slow" and not up and not kinds & FIRST and not ends and r.random() < 0.1,
        pulse=r.choice([0, 0, 0, 4]),
        batch=r.choice([1, 2]),
        captured=r.choice([1, 1, 2]),
        ends=tuple(frames + r.randint(0, 9) for _ in range(2)) if ends else (),
    )


def _block(r: Random, depth: int) -> Block:
    if depth and r.random() < 0.25:
        parts = [tuple(_block(r, 0) for _ in range(r.randint(0, 2))) for _ in range(2)]
        return Block("join", {"how": r.choice(["add", "cat", "stack", "mul", "larger"])}, *parts)
    kind = r.choice(list(DRAWS))
    return Block(kind, DRAWS[kind](r))


def _conv(r: Random) -> dict[str, Any]:
    k, d = r.randint(1, 4), r.choice([1, 1, 2])
    return {
        "k": k, "d": d, "s": r.choice([1, 1, 1, 2]), "p": r.randint(0, (k - 1) * d + 1), "causal": r.random() < 0.25,
        "ks": r.choice([1, 3]), "out": r.choice([2, 4]), "groups": 1,
    }  # fmt: skip


def _pool(r: Random) -> dict[str, Any]:
    k = r.randint(1, 3)
    return {
        "k": k, "s": r.choice([1, 1, 2]), "p": r.randint(0, k // 2), "d": r.choice([1, 2]), "ceil": r.random() < 0.3,
        "count": r.random() < 0.5, "divisor": r.choice([None, None, 5]), "maximum": r.random() < 0.5,
    }  # fmt: skip


def _up(r: Random) -> dict[str, Any]:
    rate, k = r.choice([1, 2, 2]), r.randint(2, 4)
    return {"how": r.choice(["transposed", "repeat", "linear", "nearest"]), "r": rate, "k": k, "p": r.randint(0, 1)}


def _how(*names: str, **more: Any) -> Any:
    return lambda r: {"how": r.choice(names), **{name: draws(r) for name, draws in more.items()}}


def _recurrent(r: Random) -> dict[str, Any]:
    return {
        "kind": r.choice(["lstm", "gru", "rnn"]), "both": r.random() < 0.5, "layers": r.choice([1, 1, 2]),
        "first": r.random() < 0.5, "last": r.random() < 0.3,
    }  # fmt: skip


DRAWS: dict[str, Any] = {
    "conv": _conv,
    "pool": _pool,
    "crop": lambda r: {"a": r.randint(0, 2), "b": r.randint(0, 2), "s": r.choice([1, 1, 2])},
    "pad": lambda r: {"a": r.randint(0, 3), "b": r.randint(0, 2), "value": r.choice([0.0, 0.5])},
    "up": _up,
    "shift": _how("written", "joined", "rolled", n=lambda r: r.randint(1, 2)),
    "unfold": _how("tensor", "columns", k=lambda r: r.randint(1, 3), s=lambda r: r.choice([1, 1, 2]),
                   p=lambda r: r.randint(0, 1)),
    "overlap": _how("fold", "index", k=lambda r: r.randint(1, 4), s=lambda r: r.choice([1, 2])),
    "rows": _recurrent,
    "columns": _recurrent,
    "cumulative": lambda r: {},
    "loop": _how("select", "unbind", "split", "chunk", "pairs"),
    "attend": lambda r: {"band": r.choice([0, 2, 3]), "hand": r.random() < 0.5},
    "norm": _how("channels", "frame", "frame_group", "batch", "hand", "unit", "softmax"),
    "gate": lambda r: {"pool": r.choice(["mean", "amax", "adaptive"])},
    "graph": _how("matmul", "einsum"),
    "statistics": _how("instance", "group"),
    "view": _how("batch", "channels", "places", "first", "last"),
    "gather": _how("index", "select", "flip", "roll", "scatter", "sort", "topk", "repeat", "where", "clamp",
                   order=lambda r: r.sample(range(12), 4)),
    "count": _how("plain", "expanded", "joined"),
    "act": _how("relu", "silu", "tanh", "sigmoid", "hardswish"),
}  # fmt: skip
