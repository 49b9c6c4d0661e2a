"""Constants of a graph: reads, registers and deletes them by dotted name, and gives them to another graph."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule


def module_of(root: nn.Module, graph: Graph) -> GraphModule:
    """Makes a module that runs a graph with the constants of another module that it reads.

    Its Python code is written when it is first run, not after each rewrite.
    """
    return _LazyGraphModule(root, graph)


def get_constant(root: nn.Module, target: str) -> torch.Tensor:
    """Reads the tensor of a dotted attribute."""
    value: torch.Tensor = attrgetter(target)(root)
    return value.detach()


def owner_of(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Finds the module that has a constant, and the name by which it has it."""
    path, _, name = target.rpartition(".")
    return root.get_submodule(path), name


def is_taken(root: nn.Module, target: str) -> bool:
    """Says whether there is something under a dotted name."""
    value: Any = root
    for atom in target.split("."):
        if not hasattr(value, atom):
            return False
        value = getattr(value, atom)
    return True


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
            delattr(*owner_of(module, name))
