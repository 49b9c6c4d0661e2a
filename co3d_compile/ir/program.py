"""What the passes work on: the graph, its constants, the options, and what is to be reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule, Node

from co3d_compile.ir.node_reading import operator_name
from co3d_compile.ir.options import Options
from co3d_compile.ir.stored_constants import get_constant

if TYPE_CHECKING:
    from co3d_compile.ir.operator_row import Operator


@dataclass
class Input:
    """A model input: its name, its shape in the clip, and the dim that is time (None: no time)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    time_dim: int | None
    pulse: int = 0


@dataclass
class Output:
    """A model output in the step model; ``rate``: frames of the first input from one entry to the next."""

    name: str
    shape: list[int | str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    delay: int = 0
    time_dim: int | None = None
    pulse: int = 1
    rate: Fraction = Fraction(1)


@dataclass
class State:
    """One state: the names of its input and output, and its value at the start."""

    input: str
    output: str
    shape: list[int | str]
    dtype: torch.dtype
    initial: float = 0.0
    warmup: int | None = 0


@dataclass
class Fallback:
    """An operator that is applied to a window, and why."""

    operator: str
    module_path: str
    reason: str
    bytes: int = 0


@dataclass
class Program:
    """A model on its way through the passes.

    Args:
        module: The graph with its constants; passes rewrite ``module.graph`` in place.
        options: What the user asked for.
        inputs: The model's inputs, in order.
        outputs: The model's outputs, in order.
        promises: What holds of the graph: what passes ``ensure`` and later ones ``require``.
        actions: For the report: what was done to which operator, counted.
        recomputed: What falls back to a window.
        gates: Module path and scope of each gate.
        states: Filled by the last pass.
        fixed_batch: The only batch the model takes, if it fixes it.
        valid: Name of the input for valid flags (``boundary="exact"``).
        flush_steps: Steps after the last frame until no result is due any more.
        survey: What is known of each operator, before time leaves the graph.
        captured: Names of the nodes as they were captured.
        became: By which node one was replaced, by name.
        holders: By node of the step graph: the results whose entries it holds, as (name, entry).
        values: The ONNX value of entry i of a node, by (name, i).
    """

    module: GraphModule
    options: Options
    inputs: list[Input]
    outputs: list[Output]
    name: str = "model"
    promises: set[str] = field(default_factory=set)
    actions: dict[tuple[str, str], int] = field(default_factory=dict)
    recomputed: list[Fallback] = field(default_factory=list)
    gates: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    receptive_field: int | None = 1
    warmup_steps: int = 0
    window: int | None = None
    valid: str | None = None
    flush_steps: int = 0
    fixed_batch: int | None = None
    survey: list[Operator] = field(default_factory=list)
    captured: tuple[str, ...] = ()
    became: dict[str, str] = field(default_factory=dict)
    holders: dict[Node, list[tuple[str, int]]] = field(default_factory=dict)
    values: dict[tuple[str, int], str] = field(default_factory=dict)

    def follow(self) -> None:
        """From now on remembers which node took another's place, so that results can be told from the captured ones."""
        self.captured = tuple(n.name for n in self.graph.nodes)
        self.module._register_replace_node_hook(lambda old, new, user: self.became.__setitem__(old.name, new))

    def places(self) -> dict[str, str]:
        """The node that has the value of each captured one, by name; what has no such node is left out."""
        there = {n.name for n in self.graph.nodes}
        found = {}
        for captured in self.captured:
            name, seen = captured, set()
            while name not in there and name in self.became and name not in seen:
                seen.add(name)
                name = self.became[name]
            if name in there:
                found[captured] = name
        return found

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    def placeholders(self) -> list[Node]:
        """The nodes of the inputs, in their order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def shape(self, shape: Sequence[int | str]) -> list[int | str]:
        """A shape of the step model: the batch is N, or the number that the model fixes."""
        return [self.fixed_batch or "N" if isinstance(s, str) else s for s in shape]

    def record(self, node: Node, action: str) -> None:
        """Counts what was done to an operator, for the report."""
        key = (operator_name(node.target), action)
        self.actions[key] = self.actions.get(key, 0) + 1

    def constant(self, node: Node) -> torch.Tensor:
        """The tensor behind a ``get_attr`` node."""
        return get_constant(self.module, str(node.target))


def bytes_of(shape: Sequence[int | str], dtype: torch.dtype) -> int:
    """Bytes of one stream's share of a tensor."""
    return math.prod(int(s) for s in shape if not isinstance(s, str)) * dtype.itemsize
