"""The step graph in PyTorch: a module with explicit state, and a ``torch.export`` program for other runtimes."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from co3d_compile.contract.model_contract import Contract, resolve
from co3d_compile.errors import UnsupportedError, UsageError
from co3d_compile.ir.program import Program
from co3d_compile.ir.stack_traces import without_stack_traces
from co3d_compile.ir.stored_constants import owner_of, set_constant
from co3d_compile.runtime.stream_lengths import StreamLengths

State: TypeAlias = tuple[Tensor, ...]
Results: TypeAlias = Tensor | tuple[Tensor, ...]

# The names by which operators' own schemas call what is trained.
WEIGHTS = ("weight", "bias", "mat2", "batch1", "batch2")
aten = torch.ops.aten


class StepModule(nn.Module):
    """One step of a compiled model in eager PyTorch, differentiable, its state given and returned.

    The weights and biases of convolutions, linear layers and norms are parameters, all other constants buffers.
    Batch norms are folded into the convolutions, and a weight is laid out as the step needs it (one per tap, or taps
    side by side), so names differ from the network's; :meth:`CompiledModel.with_weights` takes them back into ONNX.

    Attributes:
        info: The contract. The state is a tuple of tensors in the order of ``info.states``.
        graph: The step as an FX module: inputs, ``valid`` if there is one, states in; results, next states out.
    """

    def __init__(self, program: Program, info: Contract) -> None:
        super().__init__()
        self.info = info
        self.graph = step_graph(program)
        self._lengths = StreamLengths(info) if info.lengths else None

    def forward(
        self, *frames: Tensor, state: State | None = None, valid: Tensor | None = None
    ) -> tuple[Results, State]:
        """Advances all streams by one step.

        Args:
            frames: One tensor per model input, in model order, shaped as the ONNX input (``info.inputs``).
            state: What the last step returned; None: the start.
            valid: For ``boundary="exact"``: which frames are there, bool (N, frames_per_step). Default: all.

        Returns:
            The results (a tuple in model order, the tensor itself if there is one output), and the next state.
            Next states may share memory with the inputs: write into none of them.

        Raises:
            UsageError: The number of inputs or states does not fit.
            SessionError: A stream ends that is too short for exact ends.
        """
        self._check(len(frames))
        if state is None:
            state = self.initial_state(frames[0].shape[0])
        if len(state) != len(self.info.states):
            raise UsageError(
                f"Got {len(state)} states, expected {len(self.info.states)}.", hint="Give what the last step returned."
            )
        flags = self._flags(frames[0], valid)
        if valid is not None and self._lengths is not None:
            given = {spec.input: x.detach().cpu().numpy() for spec, x in zip(self.info.states, state, strict=True)}
            self._lengths.check(valid.cpu().numpy(), given)
        values = self.graph(*frames, *flags, *state)
        own = len(self.info.outputs)
        return values[0] if own == 1 else tuple(values[:own]), tuple(values[own:])

    def initial_state(self, batch: int = 1) -> State:
        """Makes the state at the start of ``batch`` streams, on the device of the weights."""
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        return tuple(
            torch.full(resolve(s.shape, batch), s.initial, dtype=getattr(torch, s.dtype), device=device)
            for s in self.info.states
        )

    def run(self, *clips: Tensor, state: State | None = None) -> tuple[Results, State]:
        """Steps through clips, as the network takes them, with gradients through all steps.

        Args:
            clips: One tensor per model input, with frames on its time dim: any whole number of steps.
            state: The state before the first frame; None: the start.

        Returns:
            The results of all steps, stacked on a new dim 1: (N, steps, …), and the last state.

        Raises:
            UsageError: The frames are not a whole number of steps, or none.
        """
        self._check(len(clips))
        steps, rows = self._steps(clips), []
        for j in range(steps):
            results, state = self(*self._frames(clips, j), state=state)
            rows.append(results if isinstance(results, tuple) else (results,))
        stacked = tuple(torch.stack(column, 1) for column in zip(*rows, strict=True))
        assert state is not None
        return stacked[0] if len(stacked) == 1 else stacked, state

    def _check(self, given: int) -> None:
        names = [spec.name for spec in self.info.inputs]
        if given != len(names):
            raise UsageError(f"Got {given} inputs, expected {len(names)}.", hint=f"In this order: {', '.join(names)}.")

    def _flags(self, frames: Tensor, valid: Tensor | None) -> list[Tensor]:
        if self.info.valid is None:
            if valid is not None:
                raise UsageError("This model takes no valid flags.", hint='Compile it with boundary="exact".')
            return []
        shape = frames.shape[0], self.info.inputs[0].frames_per_step or 1
        return [torch.ones(shape, dtype=torch.bool, device=frames.device) if valid is None else valid]

    def _steps(self, clips: tuple[Tensor, ...]) -> int:
        """Counts how many steps the clips are."""
        found = set()
        for spec, clip in zip(self.info.inputs, clips, strict=True):
            if spec.frames_per_step is not None and spec.time_dim is not None:
                steps, rest = divmod(clip.shape[spec.time_dim], spec.frames_per_step)
                found.add(0 if rest else steps)
        if len(found) != 1 or not min(found):
            pulses = ", ".join(f"{name}: {n}" for name, n in self.info.frames_per_step.items())
            raise UsageError("The clips are not the same whole number of steps.", hint=f"Frames per step: {pulses}.")
        return found.pop()

    def _frames(self, clips: tuple[Tensor, ...], step: int) -> list[Tensor]:
        """Takes the inputs of one step."""
        frames = []
        for spec, clip in zip(self.info.inputs, clips, strict=True):
            if spec.frames_per_step is None or spec.time_dim is None:
                frames.append(clip)
            elif spec.frames_per_step == 1:
                frames.append(clip.select(spec.time_dim, step))
            else:
                frames.append(clip.narrow(spec.time_dim, step * spec.frames_per_step, spec.frames_per_step))
        return frames


def step_graph(program: Program, *, distinct: bool = False) -> GraphModule:
    """Copies the step graph so that its weights are parameters.

    Args:
        program: A threaded program.
        distinct: Copies outputs that are an input, a constant or another output: runtimes want tensors of their own.
    """
    graph = Graph()
    copied: dict[Node, Node] = {}
    results = graph.graph_copy(program.graph, copied)
    assert isinstance(results, tuple)
    if distinct:
        taken: set[Any] = set()
        results = tuple(_own(graph, node, taken) for node in results)
    graph.output(results)
    root = nn.Module()
    weights = learned(program)
    for name, value in program.module.named_buffers():
        set_constant(root, name, value.clone())
        if name in weights:
            owner, last = owner_of(root, name)
            tensor = owner._buffers.pop(last)
            assert tensor is not None
            owner.register_parameter(last, nn.Parameter(tensor))
    return GraphModule(root, graph, class_name="Step")


def _own(graph: Graph, node: Node, taken: set[Any]) -> Node:
    if node.op == "call_function" and node not in taken:
        taken.add(node)
        return node
    return graph.call_function(aten.clone.default, (node,))


def learned(program: Program) -> set[str]:
    """Gives the names of the floating-point constants that an operator takes as a weight or bias, by its own schema."""
    names = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = [a.name for a in node.target._schema.arguments]
        for name, value in [*zip(arguments, node.args, strict=False), *node.kwargs.items()]:
            constant = name in WEIGHTS and isinstance(value, Node) and value.op == "get_attr"
            if constant and value.meta["val"].is_floating_point():
                names.add(str(value.target))
    return names


def with_weights(program: Program, module: StepModule) -> Program:
    """Gives a program the constants of a step module.

    Raises:
        UsageError: The module is of another model.
        UnsupportedError: What lies beyond the ends of a clip was computed from the old weights.
    """
    if program.step.valid is not None:
        raise UnsupportedError(
            'With boundary="exact" the file holds values that were computed from the weights.',
            hint="Train the network itself, or a step module with boundary='stream', and compile again.",
        )
    values = {**dict(module.graph.named_buffers()), **dict(module.graph.named_parameters())}
    old = dict(program.module.named_buffers())
    odd = [n for n in sorted(old.keys() | values.keys()) if n not in old or n not in values]
    odd += [n for n in old if n in values and old[n].shape != values[n].shape]
    if odd:
        raise UsageError(f"The step module is of another model: {', '.join(odd[:3])}.", hint="Use its own to_module().")
    root = nn.Module()
    for name, value in values.items():
        set_constant(root, name, value.detach().to("cpu", old[name].dtype).clone())
    graph = Graph()
    copied: dict[Node, Node] = {}
    graph.output(graph.graph_copy(program.graph, copied))
    step = dataclasses.replace(program.step, states=[dataclasses.replace(state) for state in program.step.states])
    holders = {copied[n]: held for n, held in program.notes.holders.items() if n in copied}
    notes = dataclasses.replace(program.notes, holders=holders)
    return dataclasses.replace(program, module=GraphModule(root, graph), step=step, notes=notes)


def exported_program(program: Program, batch: int | None = None) -> ExportedProgram:
    """Captures the step by ``torch.export``; see :meth:`CompiledModel.to_exported_program`."""
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise UsageError(f"batch must be a positive whole number of streams, not {batch!r}.")
    if program.step.fixed_batch is not None and batch not in (None, program.step.fixed_batch):
        raise UsageError(f"The model fixes its batch at {program.step.fixed_batch}.", hint="Leave batch out.")
    dynamic = batch is None and program.step.fixed_batch is None
    # A batch of one would be taken for a constant where any batch is wanted.
    size = 2 if dynamic else batch or program.step.fixed_batch or 1
    module = step_graph(program, distinct=True).requires_grad_(False).eval()
    values = [n.meta["val"] for n in program.placeholders()]
    inputs = tuple(torch.zeros((size, *v.shape[1:]), dtype=v.dtype) for v in values)
    shapes = tuple({0: Dim("batch")} for _ in inputs) if dynamic else None
    with warnings.catch_warnings(), torch.no_grad(), without_stack_traces():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def positional_contract(info: Contract) -> str:
    """Writes the metadata of an exported program: every state has its own output, in the order of the states."""
    data = json.loads(info.to_json())
    data["weights_sha256"] = None  # of the ONNX file
    for state in data["states"]:
        state["output"] = f"next.{state['input']}"
    if data.get("options"):
        data["options"]["state_io"] = "paired"
    return json.dumps(data)
