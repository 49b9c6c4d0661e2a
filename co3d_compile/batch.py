"""The batch: many streams advance together, so no size in the step graph may fix how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from co3d_compile.graph import fake_mode
from co3d_compile.program import Program, module_path, operator_name

FACTOR = 3


def doubled(example_inputs: Sequence[Any]) -> tuple[Any, ...] | None:
    """The example with two clips instead of one, so that the batch can be told from other dims of size one.

    None where there is more than one clip already, or an input without a batch.
    """
    tensors = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, torch.Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None

    def twice(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, torch.Tensor) else value

    return tuple(pytree.tree_map(twice, tuple(example_inputs)))


def at_another_batch(program: Program) -> dict[Node, Any]:
    """The fake value of each node where the batch is :data:`FACTOR` times the captured one.

    An operator that fixes the batch ends it: a warning says which, and nothing is known of what follows.
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
                with mode, torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
            except Exception:  # whatever a meta kernel raises for sizes that do not fit
                rows = program.fixed_batch = program.inputs[0].shape[0]
                program.warnings.append(
                    f"The model fixes its batch at {rows} (at {operator_name(node.target)} in "
                    f"{module_path(node) or 'the model'}): run it with batch={rows}."
                )
                return {}
    return values


def grown_dims(node: Node, values: dict[Node, Any]) -> list[int]:
    """The dims of a node's output that grow with the batch."""
    if node not in values or not isinstance(values[node], torch.Tensor):
        return []
    sizes = zip(node.meta["val"].shape, values[node].shape, strict=True)
    return [d for d, (old, new) in enumerate(sizes) if old != new]
