"""What the passes work on: the graph, its constants, the options, and what is to be reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from co3d_compile.errors import UsageError

if TYPE_CHECKING:
    from co3d_compile.survey import Operator

CHOICES = {
    "pool_scope": ("frame", "window", "recompute"),
    "stride_mode": ("step", "dense"),
    "boundary": ("stream", "exact"),
    "unsupported": ("window", "error"),
    "state_io": ("paired", "renamed"),
}

MOST_FRAMES = 100_000  # of a window or a step


@dataclass(frozen=True)
class Options:
    """The options of :func:`co3d_compile.compile`; see there."""

    window: int | None = None
    frames_per_step: int | None = None
    pool_scope: str = "frame"
    stride_mode: str = "step"
    boundary: str = "stream"
    unsupported: str = "window"
    state_io: str = "paired"
    time_dim: int | Sequence[int | None] = 2

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}.")
        for name in ("window", "frames_per_step"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} must be a positive whole number of frames, not {value!r}.")
            if value is not None and value > MOST_FRAMES:  # would fill the memory long before it fails
                raise UsageError(f"{name}={value} makes no sense: at most {MOST_FRAMES} frames.")
        dims = [self.time_dim] if self.time_dim is None or isinstance(self.time_dim, int) else self.time_dim
        if not isinstance(dims, Sequence) or any(not isinstance(d, int | None) for d in dims):
            what = f"time_dim={self.time_dim!r} is neither a dim nor a list of them."
            raise UsageError(what, hint="Give the dim that counts the frames, for (N, C, T, H, W) that is 2.")
        if self.boundary == "exact" and self.stride_mode == "dense":
            raise UsageError(
                "boundary='exact' has no meaning with stride_mode='dense': clips at every phase have no common end.",
                hint="Use stride_mode='step', or boundary='stream'.",
            )


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


def operator_name(target: Any) -> str:
    """The name of an operator as people know it: ``aten.conv3d``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return str(getattr(target, "__name__", target))


def module_path(node: Node) -> str:
    """Dotted path of the module that a node came from (empty for the model itself)."""
    if "path" in node.meta:
        return str(node.meta["path"])
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for prefix in ("L['self'].", "L['self']"):
        path = path.removeprefix(prefix)
    return path


def get_constant(root: nn.Module, target: str) -> torch.Tensor:
    """The tensor of a dotted attribute."""
    value: Any = root
    for atom in target.split("."):
        value = getattr(value, atom)
    return value.detach()


def set_constant(root: nn.Module, target: str, value: torch.Tensor) -> None:
    """Registers a tensor under a dotted name, making the modules on the way."""
    *path, last = target.split(".")
    for atom in path:
        if not hasattr(root, atom):
            root.add_module(atom, nn.Module())
        root = getattr(root, atom)
    root.register_buffer(last, value.detach(), persistent=True)


def delete_unused_constants(module: GraphModule) -> None:
    """Forgets constants that no node reads any more."""
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name, _ in list(module.named_buffers()):
        if name not in used:
            owner: nn.Module = module
            *path, last = name.split(".")
            for atom in path:
                owner = getattr(owner, atom)
            delattr(owner, last)


def bytes_of(shape: Sequence[int | str], dtype: torch.dtype) -> int:
    """Bytes of one stream's share of a tensor."""
    return math.prod(int(s) for s in shape if not isinstance(s, str)) * dtype.itemsize
