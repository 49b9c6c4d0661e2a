"""Outputs of modules inside a network, which are given beside the network's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from co3d_compile.errors import UsageError
from co3d_compile.ir.node_reading import module_calls, returned
from co3d_compile.support.readable_numbers import did_you_mean


def add_outputs(module: GraphModule, paths: Sequence[str]) -> list[str]:
    """Makes outputs of the results of some modules; returns their names: the paths, numbered where there are several.

    Raises:
        UsageError: There is no such module, it computes nothing, or it is called several times.
    """
    inside = {node: module_calls(node) for node in module.graph.nodes if node.op == "call_function"}
    names: list[str] = []
    added: list[Node] = []
    for path in paths:
        results = _results(path, inside)
        added += results
        names += [path] if len(results) == 1 else [f"{path}.{at}" for at in range(len(results))]
    module.graph.output_node().args = ((*returned(module.graph), *added),)
    module.recompile()
    return names


def _results(path: str, inside: dict[Node, dict[str, str]]) -> list[Node]:
    """Finds what a module gives to the rest of the network."""
    calls = {call for stack in inside.values() for call, where in stack.items() if where == path != ""}
    if not calls:
        known = sorted({where for stack in inside.values() for where in stack.values()} - {""})
        hint = did_you_mean(path, known) or f"There are {', '.join(known[:8])}{', …' * (len(known) > 8)}."
        raise UsageError(f"No module {path!r} computes something in this network.", hint=hint)
    if len(calls) > 1:
        what = f"The module {path!r} is called {len(calls)} times, so it has no one output."
        raise UsageError(what, hint="Name a module that holds all its calls, or one that follows.")
    own = {node for node, stack in inside.items() if calls & set(stack)}
    given = [node for node in inside if node in own and any(user not in own for user in node.users)]
    return [node for node in given if isinstance(node.meta.get("val"), torch.Tensor)]
