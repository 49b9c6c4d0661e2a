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
    """Entries per frame (in dense mode: of one clip), delay and channels of a tensor, and entries cropped in front."""

    rate: Fraction
    delay: int
    channels: int
    crop: int = 0


def flow(op: Op, x: list[Flow], dense: bool) -> Flow:
    """The table of DESIGN section 1."""
    first = x[0]
    rate, delay, channels = first.rate, first.delay, op.args.get("out", first.channels)
    if op.kind in SLIDING:
        k, d, s, p = kernel(op)
        if dense:
            later, cropped = ((k - 1) * d - p) * rate.denominator, max(0, -p) * rate.denominator
            return Flow(rate / s, delay + later, channels, first.crop + cropped)
        return Flow(rate / s, -1 - (p - 1 - delay - (k - 1) * d) // s, channels, (first.crop + max(0, -p)) // s)
    if op.kind == "transposed":
        return Flow(rate * op["s"], op["s"] * delay + op["p"], channels, first.crop * op["s"])
    if op.kind in ("nearest", "linear"):
        r = op["r"]
        return Flow(rate * r, r * delay + (r // 2 if op.kind == "linear" else 0), channels, first.crop * r)
    if op.kind == "cat":
        channels = sum(f.channels for f in x)
    return Flow(rate, max(f.delay for f in x), channels, min(f.crop for f in x))


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
