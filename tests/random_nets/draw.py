"""Hypothesis strategies for `Net`. Small numbers and early choices are the simple ones: failures shrink to them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from .describe import Flow, Net, Op, Out, flow

MOST = 8  # largest total stride
UNARY = (
    "conv", "conv", "conv", "act", "average", "maximum", "crop", "slice", "pad", "front", "norm", "project", "fold",
    "gate", "transposed", "nearest", "linear",
)  # fmt: skip
JOINS = ("add", "cat", "mul", "larger")
Draw = Callable[[st.SearchStrategy[Any]], Any]


class _Drawing:
    """A network in the making."""

    def __init__(self, draw: Draw, dims: int, size: int, channels: int, dense: bool) -> None:
        self.draw, self.dims, self.size, self.dense = draw, dims, size, dense
        self.ops: list[Op] = []
        self.flows = [Flow(Fraction(1), 0, channels)]

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def upto(self, most: int, least: int = 0) -> int:
        return self.draw(st.integers(least, most))

    def add(self, kind: str, *inputs: int, **args: Any) -> int:
        """Appends an operator; gives the number of its tensor."""
        op = Op(kind, inputs, args)
        self.ops.append(op)
        self.flows.append(flow(op, [self.flows[i] for i in inputs], self.dense))
        return len(self.ops)

    def step(self) -> None:
        """One more operator on a recent tensor, or on two."""
        newest = len(self.ops)
        if newest and self.upto(3) == 3:
            self.join(newest, self.upto(newest - 1))
        else:
            x = newest - min(newest, self.pick(0, 0, 0, 1, 2))
            getattr(self, self.pick(*(f"_{kind}" for kind in UNARY)))(x)

    def join(self, x: int, y: int) -> None:
        """Combines two tensors, brought to one rate."""
        x, y = self._down(x, y), self._down(y, x)
        if self.flows[x].rate != self.flows[y].rate:
            return
        kind = self.pick(*JOINS)
        many = self.flows[x].channels + self.flows[y].channels
        if kind != "cat" or many > 8:
            kind = "add" if kind == "cat" else kind
            y = self._as_wide(y, self.flows[x].channels)
        self.add(kind, x, y)

    def _as_wide(self, y: int, channels: int) -> int:
        if self.flows[y].channels == channels:
            return y
        return self.add("conv", y, k=1, d=1, s=1, p=0, groups=1, out=channels, space=1, causal=False)

    def _down(self, x: int, like: int) -> int:
        """`x` at the rate of `like`, where that is lower: strided, or (at random) `like` comes up to it later."""
        ratio = self.flows[x].rate / self.flows[like].rate
        if ratio <= 1:
            return x if self.dense or ratio == 1 or (1 / ratio).denominator != 1 else self._up_or_not(x, 1 / ratio)
        if ratio.denominator != 1:
            return x
        return self._strided(x, int(ratio))

    def _up_or_not(self, x: int, ratio: Fraction) -> int:
        return x if self.upto(1) == 0 else self._raised(x, int(ratio))

    def _strided(self, x: int, s: int) -> int:
        kind = self.pick("slice", "average", "maximum", "conv")
        if kind == "slice":
            return self.add("slice", x, a=self.upto(1), s=s)
        if kind == "conv":
            return self._kernel(x, s)
        return self.add(kind, x, k=s, s=s, p=0, d=1, ceil=False, count=True, space=1)

    def _raised(self, x: int, r: int) -> int:
        kind = self.pick("nearest", "linear", "transposed")
        if kind == "transposed":
            return self._transpose(x, r)
        return self.add(kind, x, r=r)

    def _stride(self, x: int) -> int:
        s = self.pick(1, 1, 1, 2, 3, 4)
        return s if (self.flows[x].rate / s).denominator <= MOST else 1

    def _space(self) -> int:
        return self.pick(1, 3) if self.dims > 1 and self.size > 1 else 1

    def _kernel(self, x: int, s: int) -> int:
        channels = self.flows[x].channels
        k, d = self.upto(5, 1), self.pick(1, 1, 2, 3)
        causal = self.upto(4) == 4
        groups = self.pick(1, 1, channels)
        out = channels * self.pick(1, 1, 2) if groups > 1 else self.upto(4, 1)
        out = channels if out > 8 else out
        p = 0 if causal else self.upto((k - 1) * d + 1)
        return self.add("conv", x, k=k, d=d, s=s, p=p, groups=groups, out=out, space=self._space(), causal=causal)

    def _transpose(self, x: int, s: int) -> int:
        """With a tap for every entry: others are constants, whose states need a warm-up that no frame shows."""
        k, d = self.upto(max(4, s), s), self.pick(1, 1, 2)
        d = 1 if s % 2 == 0 else d
        p = self.upto(min(2, (k - 1) * d // 2))
        more = self.upto(max(s, d) - 1)
        channels = self.flows[x].channels
        groups = self.pick(1, channels)
        return self.add("transposed", x, k=k, s=s, p=p, more=more, d=d, groups=groups, out=channels)

    def _conv(self, x: int) -> None:
        shared = [
            i for i, op in enumerate(self.ops)
            if op.kind == "conv" and "share" not in op.args
            and self.flows[op.inputs[0]].channels == self.flows[x].channels
            and (op["s"] == 1 or (self.flows[x].rate / op["s"]).denominator <= MOST)
        ]  # fmt: skip
        if shared and self.upto(3) == 3:
            i = self.pick(*shared)
            self.add("conv", x, **{**self.ops[i].args, "share": i})
        else:
            self._kernel(x, self._stride(x))

    def _pooled(self, kind: str, x: int) -> None:
        k = self.upto(4, 1)
        d = self.pick(1, 1, 2) if kind == "maximum" else 1
        p = self.upto(k // 2)
        ceil, count = self.upto(3) == 3, self.upto(1) == 0
        self.add(kind, x, k=k, s=self._stride(x), p=p, d=d, ceil=ceil, count=count, space=self._space())

    def _average(self, x: int) -> None:
        self._pooled("average", x)

    def _maximum(self, x: int) -> None:
        self._pooled("maximum", x)

    def _crop(self, x: int) -> None:
        self.add("crop", x, a=self.upto(3), b=self.upto(3))

    def _slice(self, x: int) -> None:
        self.add("slice", x, a=self.upto(3), s=self._stride(x))

    def _pad(self, x: int) -> None:
        self.add("pad", x, a=self.upto(3), b=self.upto(3), value=self.pick(0.0, 0.5))

    def _front(self, x: int) -> None:
        self.add("front", x, a=self.upto(3, 1))

    def _gate(self, x: int) -> None:
        self.add("gate", x, pool=self.pick("mean", "amax", "adaptive"))

    def _act(self, x: int) -> None:
        self.add("act", x, name=self.pick("silu", "relu", "sigmoid", "hardswish"))

    def _norm(self, x: int) -> None:
        self.add("norm", x)

    def _project(self, x: int) -> None:
        self.add("project", x)

    def _fold(self, x: int) -> None:
        self.add("fold" if self.dims > 1 else "project", x)

    def _raise(self, kind: str, x: int) -> None:
        r = self.pick(2, 2, 3)
        if self.dense or self.flows[x].rate * r > 3:
            self._act(x)
        elif kind == "transposed":
            self._transpose(x, self.pick(1, r))
        else:
            self.add(kind, x, r=r)

    def _transposed(self, x: int) -> None:
        self._raise("transposed", x)

    def _nearest(self, x: int) -> None:
        self._raise("nearest", x)

    def _linear(self, x: int) -> None:
        self._raise("linear", x)


def _outputs(draw: Draw, ops: list[Op]) -> tuple[Out, ...]:
    """Outputs. A deviation reads a pad in front of it as part of its window: random_families has those."""
    last = len(ops)
    head = st.sampled_from(["", "", "", "", "mean", "mean", "amax", "amax", "adaptive", "adaptive", "sum", "std"])
    tensors = [last, *draw(st.lists(st.integers(1, last), max_size=2))] if draw(st.integers(0, 3)) == 3 else [last]
    drawn = [(tensor, draw(head)) for tensor in tensors]
    padded = {tensor for tensor in tensors if ops[tensor - 1].kind in ("pad", "front")}
    return tuple(Out(tensor, "mean" if tensor in padded and how == "std" else how) for tensor, how in drawn)


@st.composite
def nets(draw: Draw, depth: int = 12) -> Net:
    """Networks of up to `depth` drawn operators (bringing branches to one rate and width may add some)."""
    dims, size = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3), (3, 1), (3, 3)]))
    channels = draw(st.integers(1, 4))
    dense = draw(st.integers(0, 4)) == 4
    made = _Drawing(draw, dims, size, channels, dense)
    for _ in range(draw(st.integers(1, depth))):
        made.step()
    if not made.ops:
        made._norm(0)
    gates = any(op.kind == "gate" for op in made.ops)
    return Net(
        tuple(made.ops),
        _outputs(draw, made.ops),
        dims,
        channels,
        size,
        time_dim=draw(st.sampled_from([2, 2, 1, 1 + dims])),
        restore=draw(st.booleans()),
        extra=draw(st.integers(0, 3)),
        times=draw(st.integers(0, 3)),
        dense=dense,
        window_gates=gates and draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        captured=draw(st.integers(1, 2)),
    )
