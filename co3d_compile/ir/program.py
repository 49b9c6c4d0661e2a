"""What the passes work on: the graph, its constants, the options, and what is to be reported."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from co3d_compile.ir.found_parts import Limited, Region, RegionRun, StreamedCrop
from co3d_compile.ir.node_reading import operator_name
from co3d_compile.ir.operator_row import Operator
from co3d_compile.ir.options import Options
from co3d_compile.ir.stored_constants import get_constant, module_of


@dataclass
class Input:
    """A model input: its name, its shape in the clip, and the dim that is time (None: no time).

    ``boxes``: it has rows of its own in each step, any number of them; whether the first column of these is the index
    in the batch. ``waits``: steps after which such rows are used.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    time_dim: int | None
    pulse: int = 0
    boxes: bool | None = None
    waits: int = 0

    @property
    def step_shape(self) -> list[int]:
        """Its shape in a step, at the captured batch: at one entry per step there is no time dim."""
        entries = {self.time_dim: [] if self.pulse == 1 else [self.pulse]}
        return [s for d, size in enumerate(self.shape) for s in entries.get(d, [size])]


@dataclass
class Output:
    """A model output in the step model; ``rate``: frames of the first input from one entry to the next.

    ``lost``: its shape in the clip, if it is a window's and nothing is known of where time is in it.
    """

    name: str
    shape: list[int | str] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    delay: int = 0
    time_dim: int | None = None
    pulse: int = 1
    rate: Fraction = Fraction(1)
    lost: tuple[int, ...] | None = None


@dataclass
class State:
    """One state: the names of its input and output, its value at the start, and whether it never forgets."""

    input: str
    output: str
    shape: list[int | str]
    dtype: torch.dtype
    initial: float = 0.0
    unbounded: bool = False


@dataclass
class Fallback:
    """An operator that is applied to a window, and why."""

    operator: str
    module_path: str
    reason: str
    bytes: int = 0


@dataclass(frozen=True)
class Original:
    """An operator as the model has it, where ``canonicalize`` has written it in another way.

    Args:
        target: The operator.
        args: Its arguments behind the first operand, which both read.
        dims: Of a pool over whole axes: those along which it would go on with the next entries, none of them twice.
    """

    target: Callable[..., Tensor]
    args: tuple[Any, ...]
    dims: tuple[int, ...] = ()

    def write(self, node: Node) -> None:
        """Makes the operator of the node again."""
        node.target, node.args, node.kwargs = self.target, (node.args[0], *self.args), {}


@dataclass
class Step:
    """What the step model is, as far as the passes have come.

    Args:
        states: Written by the last pass.
        valid: Name of the input for valid flags (``boundary="exact"``).
        flush_steps: Steps after the last frame until no result is due any more.
        counters: Of a stream with exact ends: the states that hold its steps so far, and the frames that these lacked.
        length_multiple: Of a stream with exact ends: its length is that of the clip, more or less a multiple of it.
            ``FIXED_LENGTH``: that of the clip alone.
        receptive_field: In frames of the first input; None: without bound.
        warmup_steps: Steps until no result depends any more on what the states held at the start.
        window: Frames of a window, where the model has one.
        fixed_batch: The only batch that the model takes, if it fixes it.
    """

    states: list[State] = field(default_factory=list)
    valid: str | None = None
    flush_steps: int = 0
    counters: list[str] = field(default_factory=list)
    length_multiple: int = 1
    receptive_field: int | None = 1
    warmup_steps: int = 0
    window: int | None = None
    fixed_batch: int | None = None


@dataclass
class Notes:
    """What is only reported, or looked up when results are compared.

    Args:
        actions: What was done to which operator, counted.
        recomputed: What falls back to a window.
        regions: What is local in time, and so runs on a few entries at each step.
        gates: Module path and scope of each gate.
        not_local: Why the region that an operator starts is a window, by the name of its node.
        loops: What became of loops over frames that hand values on, for people.
        limited: What reads less of the future than in the model, in order.
        warnings: Sentences for people.
        survey: What is known of each operator, before time leaves the graph.
        split_views: Captured views that split time into blocks, and their shape for a clip twice as long.
        goes_on: Captured constants that count frames, or say which frames see each other, with the dims that grow with
            the clip, and their values.
        loop_starts: Numbers, other than zero, that captured loops over frames start from.
        remembers: Captured operators that remember all frames.
        far_out: How far it was looked at that counts and loops go on as in a clip, for people.
        crops: Captured slices and selections over time, of a window that is no clip: first entry, end, and entries.
        streamed_crops: With exact ends: captured slices and selections over time behind which results have time.
        captured: Names of the nodes as they were captured.
        became: By which node one was replaced, by name.
        kernels: By name of a convolution that took in what was behind it: the name of the one that it was.
        holders: By node of the step graph: the results whose entries it holds, as (name, entry, place). The place of an
            entry that was computed with others is ``@dim,index``, else it is empty.
        values: The ONNX value of entry i of a node, and its place there, by (name, i).
        origins: The operator and the module path that each ONNX node comes from, by its name.
    """

    actions: dict[tuple[str, str], int] = field(default_factory=dict)
    recomputed: list[Fallback] = field(default_factory=list)
    regions: list[RegionRun] = field(default_factory=list)
    gates: list[tuple[str, str]] = field(default_factory=list)
    not_local: dict[str, str] = field(default_factory=dict)
    loops: list[str] = field(default_factory=list)
    limited: list[Limited] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    survey: list[Operator] = field(default_factory=list)
    split_views: dict[str, tuple[int, ...]] = field(default_factory=dict)
    goes_on: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    loop_starts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    remembers: frozenset[str] = frozenset()
    far_out: str = ""
    crops: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    streamed_crops: dict[str, StreamedCrop] = field(default_factory=dict)
    captured: tuple[str, ...] = ()
    became: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    holders: dict[Node, list[tuple[str, int, str]]] = field(default_factory=dict)
    values: dict[tuple[str, int], str] = field(default_factory=dict)
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Program:
    """A model on its way through the passes.

    Args:
        module: The graph with its constants; passes rewrite ``module.graph`` in place.
        options: What the user asked for.
        inputs: The model's inputs, in order.
        outputs: The model's outputs, in order.
        name: The model's name, for people.
        promises: What holds of the graph: what passes ``ensure`` and later ones ``require``.
        decreed: Operators that are windows since their rules failed: for each the names of its node, the first that is
            there.
        learned: Names of the constants that are parameters of the model.
        refuted: Captured views that split time into as many parts, however long the clip is, captured constants that
            are other numbers for a longer clip, and operators that remember all frames and start from such, or change
            far out: they make no blocks, count no frames and hand no state on.
        originals: The operators that ``annotate_time`` may want as the model has them, by node.
        written: Nodes in which ``canonicalize`` joins the pieces of what is written into a tensor.
        step: What the step model is.
        looking: Whether what is local in time is still looked for: until it is found, windows take no paddings.
        regions: The parts of the clip graph that are local in time, by the names under which it calls them.
        notes: What is only reported.
    """

    module: GraphModule
    options: Options
    inputs: list[Input]
    outputs: list[Output]
    name: str = "model"
    promises: set[str] = field(default_factory=set)
    decreed: list[tuple[str, ...]] = field(default_factory=list)
    learned: frozenset[str] = frozenset()
    refuted: frozenset[str] = frozenset()
    looking: bool = False
    originals: dict[Node, Original] = field(default_factory=dict)
    written: set[Node] = field(default_factory=set)
    step: Step = field(default_factory=Step)
    regions: dict[str, Region] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)

    def follow(self) -> None:
        """Remembers from now on which node took another's place, so that results can be told from the captured ones."""
        self.notes.captured = tuple(n.name for n in self.graph.nodes)
        became = self.notes.became
        self.module._register_replace_node_hook(lambda old, new, user: became.__setitem__(old.name, new))

    def places(self) -> dict[str, str]:
        """Finds the node that has the value of each captured one, by name; what has no such node is left out."""
        there = {n.name for n in self.graph.nodes}
        found, became = {}, self.notes.became
        for captured in self.notes.captured:
            name, seen = captured, set()
            while name not in there and name in became and name not in seen:
                seen.add(name)
                name = became[name]
            if name in there:
                found[captured] = name
        return found

    def names_of(self, node: Node) -> list[str]:
        """Lists the names of a node: its own, and those of the nodes that it took the place of."""
        names = [node.name]
        for name in names:
            names += [old for old, new in self.notes.became.items() if new == name and old not in names]
        return names

    def captured_name(self, node: Node) -> str:
        """Finds the name that a convolution or pool had when it was captured."""
        name = self.notes.kernels.get(node.name, node.name)
        while name not in self.notes.captured:
            name = next(old for old, new in self.notes.became.items() if new == name)
        return name

    def on(self, graph: Graph) -> Program:
        """Makes a program of another graph with the same constants, to be annotated or tried on.

        What was asked for, and what is known of the network, stays. What passes find and note begins anew.
        """
        other = replace(
            self,
            module=module_of(self.module, graph),
            inputs=[replace(i) for i in self.inputs],
            outputs=[replace(o) for o in self.outputs],
            promises=set(),
            originals={},
            written=set(),
            step=Step(),
            notes=Notes(loop_starts=self.notes.loop_starts),
        )
        other.follow()
        return other

    def copied(self) -> Program:
        """Makes a program of a copy of its graph; nodes keep their names."""
        other = self.on(copy.deepcopy(self.graph))
        new = dict(zip(self.graph.nodes, other.graph.nodes, strict=True))
        other.promises = set(self.promises)
        other.originals = {new[n]: original for n, original in self.originals.items() if n in new}
        other.written = {new[n] for n in self.written if n in new}
        return other

    @property
    def graph(self) -> Graph:
        return self.module.graph

    def placeholders(self) -> list[Node]:
        """Lists the nodes of the inputs, in their order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def first_timed(self) -> tuple[Node, int]:
        """Finds the first input that has time, and its frames."""
        for node, spec in zip(self.placeholders(), self.inputs, strict=True):
            if spec.time_dim is not None:
                return node, spec.shape[spec.time_dim]
        raise AssertionError("a stream has frames")

    def shape(self, shape: Sequence[int | str]) -> list[int | str]:
        """Writes a shape of the step model: the batch is N, or the number that the model fixes.

        Rows of an input are K.
        """
        return [self.step.fixed_batch or s if s == "N" else s for s in shape]

    def record(self, node: Node, action: str) -> None:
        """Counts what was done to an operator, for the report."""
        key = (operator_name(node.target), action)
        self.notes.actions[key] = self.notes.actions.get(key, 0) + 1

    def constant(self, node: Node) -> torch.Tensor:
        """Reads the tensor behind a ``get_attr`` node."""
        return get_constant(self.module, str(node.target))


def bytes_of(shape: Sequence[int | str], dtype: torch.dtype) -> int:
    """Counts the bytes of one stream's share of a tensor."""
    return math.prod(int(s) for s in shape if not isinstance(s, str)) * dtype.itemsize
