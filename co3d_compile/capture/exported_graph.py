"""The graph of an exported program: constants as attributes, names of outputs."""

from __future__ import annotations

import copy
from typing import TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export._remove_effect_tokens_pass import _remove_effect_tokens
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from co3d_compile.capture.torchscript import DECIDE
from co3d_compile.errors import CaptureError
from co3d_compile.ir.node_reading import module_path
from co3d_compile.ir.stored_constants import module_of, set_constant

Unlifted: TypeAlias = tuple[GraphModule, list[str], frozenset[str]]


def with_free_names(exported: ExportedProgram) -> ExportedProgram:
    """Gives weights whose path begins with a name that PyTorch's graph modules have other names.

    A part of a network may be called ``graph``, ``code`` or ``meta``. The paths of its operators stay as they are.
    """
    taken = set(dir(GraphModule(nn.Module(), Graph())))
    old = [str(spec.target) for spec in exported.graph_signature.input_specs if spec.target is not None]
    firsts = {name.split(".")[0] for name in (*old, *exported.state_dict, *exported.constants)}
    if taken.isdisjoint(firsts):
        return exported

    def free(name: str) -> str:
        first = name.split(".")[0]
        while first in taken or (first != name.split(".")[0] and first in firsts):
            first += "_"
        return first + name[len(name.split(".")[0]) :]

    signature = copy.deepcopy(exported.graph_signature)
    for spec in signature.input_specs:
        spec.target = spec.target if spec.target is None else free(spec.target)
    for result in signature.output_specs:
        if result.kind is OutputKind.BUFFER_MUTATION and result.target is not None:
            result.target = free(result.target)
    return ExportedProgram(
        exported.graph_module,
        exported.graph,
        signature,
        {free(name): value for name, value in exported.state_dict.items()},
        exported.range_constraints,
        exported.module_call_graph,
        exported.example_inputs,
        {free(name): value for name, value in exported.constants.items()},
        verifiers=exported.verifiers,
    )


def unlift(exported: ExportedProgram) -> Unlifted:
    """Makes a graph module with parameters and buffers as attributes, and the user's inputs and outputs alone.

    Returns:
        The module, the names of its outputs, and which of its attributes are parameters.
    """
    if any(spec.kind is InputKind.TOKEN for spec in exported.graph_signature.input_specs):
        exported = _remove_effect_tokens(exported)  # they keep the order of checks, which compute nothing
    signature = exported.graph_signature
    root = nn.Module()
    constants = {**exported.state_dict, **exported.constants}
    graph = Graph()
    env: dict[Node, Node] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    user = [i for i, spec in enumerate(signature.output_specs) if spec.kind is OutputKind.USER_OUTPUT]
    returned = next(n for n in exported.graph.nodes if n.op == "output").args[0]
    tensors = [isinstance(returned[i], Node) for i in user]  # a model may return None or a number beside tensors
    for node in exported.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            target = str(specs[node.name].target)
            set_constant(root, target, constants[target])
            env[node] = graph.get_attr(target)
            env[node].meta = dict(node.meta)
        elif node.op == "get_attr" and isinstance(getattr(exported.graph_module, str(node.target), None), nn.Module):
            raise CaptureError(
                f"{type_of_control(node)} in the model chooses what is computed by the values of its input.",
                module_path=module_path(node),
                hint=DECIDE,
            )
        elif node.op == "output":
            graph.output(tuple(env[returned[i]] for i, tensor in zip(user, tensors, strict=True) if tensor))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            if node.users:
                raise CaptureError(
                    f"The input {node.name} is no tensor.", hint="Bake it into the model with a wrapper."
                )
            graph.erase_node(node)
    module = module_of(root, graph)
    learned = frozenset(str(s.target) for s in signature.input_specs if s.kind is InputKind.PARAMETER)
    return module, output_names(exported, tensors), learned


def type_of_control(node: Node) -> str:
    """Names what a part of a captured graph is given to: ``torch.cond`` and the like."""
    users = [str(getattr(user.target, "__name__", user.target)) for user in node.users]
    return f"torch.{users[0]}" if users else "Control flow"


def output_names(exported: ExportedProgram, tensors: list[bool]) -> list[str]:
    """Names the outputs: by dict keys where there are any, else ``output`` or ``output_0``, ``output_1``, …

    Args:
        tensors: For each leaf that the model returns, whether it is a tensor.
    """
    count = sum(tensors)
    spec = exported.call_spec.out_spec
    if spec is not None:
        paths = [p for p, _ in pytree.tree_leaves_with_path(pytree.tree_unflatten([0] * spec.num_leaves, spec))]
        keys = ["_".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in p) for p in paths]
        if len(keys) == len(tensors) and all(k and not k[0].isdigit() for k in keys):
            return [key for key, tensor in zip(keys, tensors, strict=True) if tensor]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
