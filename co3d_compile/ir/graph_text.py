"""A graph as text, for dumps."""

from __future__ import annotations

import torch
from torch.fx import Node

from co3d_compile.ir.node_reading import module_path, operator_name
from co3d_compile.ir.program import Program
from co3d_compile.ir.time_facts import KEY


def text_of(program: Program) -> str:
    """Writes the graph as text: one line a node, with its module path, shape in the clip and time facts."""
    return "".join(f"{node.name} = {describe(node)}\n" for node in program.graph.nodes)


def describe(node: Node) -> str:
    """Writes one node as text."""
    value = node.meta.get("val")
    shape = f" : {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    fact = f"  | {node.meta[KEY]}" if KEY in node.meta else ""
    path = f"  # {module_path(node)}" if module_path(node) else ""
    if node.op == "call_function":
        args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        return f"{operator_name(node.target)}({args}){shape}{fact}{path}"
    if node.op == "output":
        return f"output{node.args[0]}"
    return f"{node.op} {node.target}{shape}{fact}{path}"
