"""The batch: many streams advance together, so no size in the step graph may fix how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg

from co3d_compile.ir.graph_edits import fake_mode
from co3d_compile.ir.node_reading import module_path, operator_name
from co3d_compile.ir.program import Program
from co3d_compile.support.silence_torch import quiet

FACTOR = 3


def at_another_batch(program: Program) -> dict[Node, Any]:
    """The fake value of each node where the batch is :data:`FACTOR` times the captured one.

    An operator that fixes the batch ends it, and so does a graph captured for one clip in which streams are found to
    mix: ``program.step.fixed_batch`` is set, a warning says why, and nothing is known of what follows.
    """
    mode = fake_mode(program)
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            rows, *rest = node.meta["val"].shape
            with mode:
                values[node] = torch.empty(rows * FACTOR, *rest, dtype=node.meta["val"].dtype)
        elif node.op == "get_attr":
            values[node] = node.meta["val"]
        elif node.op == "call_function":
            try:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
                with mode, torch.no_grad(), quiet():
                    values[node] = node.target(*args, **kwargs)
                if _rank(values[node]) != _rank(node.meta["val"]):
                    raise ValueError("a dim of size one was the batch")
            except Exception:  # whatever a meta kernel raises for sizes that do not fit
                _fix(program, f"at {operator_name(node.target)} in {module_path(node) or 'the model'}")
                return {}
    if program.inputs[0].shape[0] == 1 and _streams_mix(program, values):
        _fix(program, "it was captured for one clip, and does not say which of its dims of size one is the batch")
        return {}
    if not all(_per_stream(program, node, values) for node in _results(program)):
        _fix(program, "what it returns does not have one row per stream")
        return {}
    return values


def _results(program: Program) -> list[Node]:
    """What the model itself returns; the states follow."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    return list(output.args[0])[: len(program.outputs)]


def _per_stream(program: Program, node: Node, values: dict[Node, Any]) -> bool:
    """Whether a result is a constant, or has the batch for one of its dims and nowhere else."""
    grown = grown_dims(node, values)
    rows = program.inputs[0].shape[0]
    return node.op == "get_attr" or [node.meta["val"].shape[d] for d in grown] == [rows]


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _fix(program: Program, why: str) -> None:
    rows = program.step.fixed_batch = program.inputs[0].shape[0]
    program.notes.warnings.append(f"The model fixes its batch at {rows} ({why}): run it with batch={rows}.")


def _streams_mix(program: Program, values: dict[Node, Any]) -> bool:
    """Whether one step of two streams at once differs from the same step of each alone, on random numbers.

    Frames and states are random, so that every path through the graph is taken.
    """
    generator = torch.Generator().manual_seed(0)
    nodes = program.placeholders()
    both = [_random((2, *n.meta["val"].shape[1:]), n.meta["val"].dtype, generator) for n in nodes]
    output = next(n for n in program.graph.nodes if n.op == "output")
    try:
        with torch.no_grad():
            together = program.module(*both)
            alone = [program.module(*(x[i : i + 1] for x in both)) for i in range(2)]
    except Exception:  # an operator that takes the batch for something else may fail in any way
        return True
    for node, result, *each in zip(output.args[0], together, *alone, strict=True):
        if node.op == "get_attr":
            continue
        dims = grown_dims(node, values)
        if len(dims) != 1 or not _equal(result, torch.cat(each, dims[0])):
            return True
    return False


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=dtype, generator=generator)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    scale = b.nan_to_num(0.0, 0.0, 0.0).abs().max() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(scale) + 1e-30, equal_nan=True)


def grown_dims(node: Node, values: dict[Node, Any]) -> list[int]:
    """The dims of a node's output that grow with the batch."""
    if node not in values or not isinstance(values[node], torch.Tensor):
        return []
    sizes = zip(node.meta["val"].shape, values[node].shape, strict=True)
    return [d for d, (old, new) in enumerate(sizes) if old != new]
