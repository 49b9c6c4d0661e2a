"""Writes PyTorch functions into a step graph: what users give for their own operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node, map_arg
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import Argument
from torch.nn import functional
from torch.utils import _pytree as pytree

from co3d_compile.capture.decompose import decomposed
from co3d_compile.capture.decompositions import decompositions
from co3d_compile.errors import UsageError, first_line
from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.node_reading import returned, where
from co3d_compile.ir.options import Options
from co3d_compile.ir.program import Program
from co3d_compile.passes.canonicalize import Canonicalize
from co3d_compile.step_graph.step_graph import StepGraph

aten = torch.ops.aten
STREAMS = 7919  # a batch, in tracing, that no other size is a multiple of
SIZES = {aten.reshape.default, aten.expand.default}


Function = Callable[..., Tensor]  # of the arguments of an operator
Compute = Callable[["Call"], Tensor]


@dataclass(frozen=True)
class Entries:
    """What an entry of the output reads of one operand.

    Args:
        items: Entries without time, oldest first; or one tensor with it, where the operator is applied to a window.
        dim: Where time is in the clip; None where it has no dim of its own.
        batch: Where the batch is in each item.
        slides: Whether the kernel slides over this operand.
    """

    items: tuple[Any, ...]
    dim: int | None
    batch: int
    slides: bool = False


Leaf: TypeAlias = Argument | Entries


@dataclass(frozen=True)
class Call:
    """The arguments of an operator, with something else in the place of each operand: entries, nodes or tensors."""

    args: tuple[Leaf, ...]
    kwargs: Mapping[str, Leaf]

    @staticmethod
    def of(node: Node, operand: Callable[[Node], Entries | Node | Tensor]) -> Call:
        """Writes the arguments of a node, with what a function makes of each operand."""
        return Call(node.args, node.kwargs).map(lambda arg: operand(arg) if isinstance(arg, Node) else arg)

    def map(self, function: Callable[[Leaf], Leaf]) -> Call:
        """Applies a function to each argument, inside of lists too."""
        return Call(*pytree.tree_map(function, (self.args, self.kwargs)))

    def leaves(self) -> list[Leaf]:
        """Lists all arguments, lists flattened."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def to(self, function: Function) -> Tensor:
        """Computes what a function makes of these arguments."""
        return function(*self.args, **self.kwargs)


def by_function(function: Function) -> Compute:
    """Runs the user's function for one entry."""

    def unwrap(e: Leaf) -> Leaf:
        return (list(e.items) if e.slides else e.items[0]) if isinstance(e, Entries) else e

    return lambda call: call.map(unwrap).to(function)


def by_operator(function: Function, kernel: Kernel, dim: int | None) -> Compute:
    """Applies the operator itself to the entries that one entry of the output reads, stacked on the time dim.

    It pads as it does in the clip: the entry whose taps are these entries is taken from what it returns.
    """
    front = -kernel.p if kernel.p < 0 else -kernel.p % kernel.s
    tail = max(0, -kernel.p_end)

    def stacked(e: Leaf) -> Leaf:
        if not isinstance(e, Entries):
            return e
        if e.dim is None:
            return e.items[0]
        items = [*e.items[:1] * front, *e.items, *e.items[-1:] * tail] if e.slides else list(e.items)
        return torch.cat([x.unsqueeze(e.dim) for x in items], e.dim) if len(items) > 1 else items[0].unsqueeze(e.dim)

    def compute(call: Call) -> Tensor:
        result = call.map(stacked).to(function)
        return result if dim is None else result.select(dim, (kernel.p + front) // kernel.s)

    return compute


def over_clip(function: Function, kernel: Kernel, dim: int | None) -> Compute:
    """Applies the user's function for every entry of a clip, with zeros outside of it."""

    def compute(call: Call) -> Tensor:
        operands = [e for e in call.leaves() if isinstance(e, Entries) and e.dim is not None]
        length = max(e.items[0].shape[e.dim] for e in operands)
        count = kernel.length(length)
        back = max(0, (count - 1) * kernel.s + (kernel.k - 1) * kernel.d + 1 - kernel.p - length)

        def padded(e: Leaf) -> Leaf:
            if not isinstance(e, Entries) or e.dim is None or not e.slides:
                return e
            x = e.items[0]
            return replace(e, items=(functional.pad(x, [0, 0] * (x.dim() - 1 - e.dim) + [kernel.p, back]),))

        def at(e: Leaf, o: int) -> Leaf:
            if not isinstance(e, Entries):
                return e
            x, d = e.items[0], e.dim
            if d is None:
                return x
            if not e.slides:
                return x.select(d, min(o, x.shape[d] - 1))
            return [x.select(d, o * kernel.s + i * kernel.d) for i in range(kernel.k)]

        around = call.map(padded)
        results = [around.map(partial(at, o=o)).to(function).unsqueeze(dim or 0) for o in range(count)]
        return torch.cat(results, dim or 0)

    return compute


def inline(node: Node, low: StepGraph, compute: Compute, call: Call) -> Node:
    """Traces a function of entries and writes its operators into the step graph, for any number of streams."""
    batches: dict[Node, int | None] = {}
    for leaf in call.leaves():
        if isinstance(leaf, Entries):
            batches.update(dict.fromkeys(leaf.items, leaf.batch))
        elif isinstance(leaf, Node):
            batches.setdefault(leaf, None)
    program = trace(node, low, compute, call, batches)
    env = dict(zip(program.placeholders(), batches, strict=True))
    for inner in program.graph.nodes:
        if inner.op == "get_attr":
            value = any_batch(node, inner, program.constant(inner))
            env[inner] = low.constant(f"{node.name}.{inner.target}", value)
        elif inner.op == "call_function":
            args, kwargs = map_arg(any_batch(node, inner, (inner.args, inner.kwargs)), env.__getitem__)
            env[inner] = low.call(inner.target, *args, **kwargs)
    return env[returned(program.graph)[0]]


def trace(node: Node, low: StepGraph, compute: Compute, call: Call, batches: dict[Node, int | None]) -> Program:
    """Traces the function to a graph of ATen operators, as the compiler captures a model."""

    class Traced(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            env = dict(zip(batches, tensors, strict=True))

            def value(leaf: Leaf) -> Leaf:
                if isinstance(leaf, Entries):
                    return replace(leaf, items=tuple(env[n] for n in leaf.items))
                return env[leaf] if isinstance(leaf, Node) else leaf

            return compute(call.map(value))

    examples = []
    with FakeTensorMode(shape_env=ShapeEnv()):
        for n, batch in batches.items():
            shape = [s // low.batch * STREAMS if d == batch else s for d, s in enumerate(low.sizes(n))]
            examples.append(torch.empty(shape, dtype=n.meta["val"].dtype))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own deprecations
            exported = torch.export.export(Traced(), tuple(examples), strict=False)
            module, _, learned = decomposed(exported, decompositions())
    except Exception as error:
        raise UsageError(f"What computes one entry fails: {first_line(error)}", **where(node)) from error
    program = Program(module, Options(), [], [], learned=learned)
    Canonicalize().run(program)
    return program


def any_batch(node: Node, inner: Node, tree: Any) -> Any:
    """Lists what a traced operator reads, with -1 for sizes that hold the number of streams."""

    def free(value: Any) -> Any:
        numbers = value.shape if isinstance(value, Tensor) else [value]
        if not any(isinstance(x, (int, float)) and x and x % STREAMS == 0 for x in numbers):
            return value
        if inner.target in SIZES:
            return -1
        raise UsageError(
            "The number of streams is not fixed, but its function writes it down.",
            **where(node),
            hint="Use sizes of -1, or broadcasting.",
        )

    return pytree.tree_map(free, tree)
