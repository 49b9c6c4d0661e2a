"""A random network as data, and the rate and delay of each of its tensors by the table of DESIGN section 1.

The repr of a `Net` is a Python expression that gives it back: paste it into a test to run a failure again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class Op:
    """One operator on earlier tensors (0 is the network's input, op i makes tensor i + 1).

    kind and its parameters:
        conv k d s p groups out space causal share   temporal kernel; `share`: the weights of that op
        average, maximum k s p d ceil count space    pools (`count`: count_include_pad)
        crop a b            `x[a:-b]`;   slice a s   `x[a::s]`
        pad a b value       constant pad;   front a  zeros joined in front
        transposed k s p more d groups               `more`: output padding
        nearest r, linear r
        act name, norm, project, fold                `fold`: a convolution over space, time folded into batch
        gate pool           squeeze and excitation
        add, mul, cat, larger   of two tensors, cut to the shorter one
    """

    kind: str
    inputs: tuple[int, ...]
    args: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]


@dataclass(frozen=True)
class Out:
    """One output: a tensor as it is, or `head` (mean, amax, adaptive, flatten) applied to the newest clip of it."""

    tensor: int
    head: str = ""


@dataclass(frozen=True)
class Net:
    """A network: `dims` of (T, H, W) it has, its channels and pixels, and where time is in its input and outputs."""

    ops: tuple[Op, ...]
    outputs: tuple[Out, ...]
    dims: int = 1
    channels: int = 2
    size: int = 1
    time_dim: int = 2
    restore: bool = False
    extra: int = 0
    times: int = 0
    dense: bool = False
    window_gates: bool = False
    batch: int = 1
    captured: int = 1

    @property
    def space(self) -> tuple[int, ...]:
        return (self.size,) * (self.dims - 1)

    def used(self) -> list[int]:
        """Tensors that some output depends on."""
        found = set()
        queue = [out.tensor for out in self.outputs]
        while queue:
            tensor = queue.pop()
            if tensor not in found:
                found.add(tensor)
                queue += self.ops[tensor - 1].inputs if tensor else ()
        return sorted(found)

    def pulse(self) -> int:
        """The least frames per step that give every tensor whole entries."""
        flows = self.flows()
        return 1 if self.dense else math.lcm(*(flows[t].rate.denominator for t in self.used()))

    def flows(self) -> list[Flow]:
        result = [Flow(Fraction(1), 0, self.channels)]
        for op in self.ops:
            result.append(flow(op, [result[i] for i in op.inputs], self.dense))
        return result


@dataclass(frozen=True)
class Flow:
    """Entries per frame (in dense mode: of one clip), delay and channels of a tensor, and what became of its front.

    `cut` entries were cropped there, and `filled` put there that no kernel behind has taken for its padding.
    """

    rate: Fraction
    delay: int
    channels: int
    cut: int = 0
    filled: int = 0

    @property
    def crop(self) -> int:
        """Entries that are missing in front."""
        return max(0, self.cut - self.filled)


def flow(op: Op, x: list[Flow], dense: bool) -> Flow:
    """The table of DESIGN section 1."""
    first = x[0]
    rate, delay, channels = first.rate, first.delay, op.args.get("out", first.channels)
    if op.kind in SLIDING:
        k, d, s, p = kernel(op)
        if dense:
            d, p = d * rate.denominator, p * rate.denominator
            return Flow(rate / s, delay + (k - 1) * d - p, channels, *front(first, (k - 1) * d, 1, p))
        later = -1 - (p - 1 - delay - (k - 1) * d) // s
        return Flow(rate / s, later, channels, *front(first, (k - 1) * d, s, p))
    if op.kind == "transposed":
        more = first.cut * op["s"], first.filled * op["s"]
        return Flow(rate * op["s"], op["s"] * delay + op["p"], channels, *more)
    if op.kind in ("nearest", "linear"):
        r = op["r"]
        later = r * delay + (r // 2 if op.kind == "linear" else 0)
        return Flow(rate * r, later, channels, first.cut * r, first.filled * r)
    if op.kind == "cat":
        channels = sum(f.channels for f in x)
    filled = min(f.filled for f in x)
    return Flow(rate, max(f.delay for f in x), channels, min(f.crop for f in x) + filled, filled)


def front(x: Flow, reach: int, s: int, p: int) -> tuple[int, int]:
    """What is cut and filled in front of `y[o] = f(x[o*s - p], …, x[o*s - p + reach])`."""
    cut, filled = x.cut, x.filled
    if p < 0:  # a crop takes what was filled in first
        cut, filled = cut + max(0, -p - filled), max(0, filled + p)
    if p > 0:  # what is more than a kernel's own padding is new in front
        filled += max(0, p - reach)
    else:
        filled = max(0, filled - reach)
    return (cut, filled) if s == 1 else (max(0, cut - filled) // s, max(0, filled - cut) // s)


SLIDING = ("conv", "average", "maximum", "crop", "slice", "pad", "front")


def kernel(op: Op) -> tuple[int, int, int, int]:
    """Taps, dilation, stride and front padding of an operator that slides over time."""
    if op.kind == "conv":
        front = (op["k"] - 1) * op["d"] if op["causal"] else op["p"]
        return op["k"], op["d"], op["s"], front
    if op.kind in ("average", "maximum"):
        return op["k"], op["d"], op["s"], op["p"]
    if op.kind in ("crop", "slice"):
        return 1, 1, op.args.get("s", 1), -op["a"]
    return 1, 1, 1, op["a"]
