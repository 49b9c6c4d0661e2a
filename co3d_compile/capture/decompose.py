"""Decomposes the operators of a captured graph, each kind of them once.

``ExportedProgram.run_decompositions`` traces the whole network a second time, which takes longer than the first. Here
it is given a program with one example of each operator that is to be decomposed, and what it makes of an example takes
the place of every operator like it; all others stay as they are. A program of which this cannot be told operator by
operator (control flow, values that Python reads, writes that other tensors see) goes through PyTorch's own way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._export.utils import _is_preservable_cia_op
from torch._ops import OpOverload
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from co3d_compile.capture.exported_graph import Unlifted, unlift
from co3d_compile.capture.functional_graph import written_apart
from co3d_compile.ir.operator_kind import Kind, kind_of
from co3d_compile.ir.stored_constants import set_constant

Table: TypeAlias = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class _Parts:
    """What takes the place of all operators of one kind.

    Attributes:
        operands: Placeholders of the decomposed program, in the order in which the operator reads its operands.
        nodes: What is between these and the results, in order.
        results: One, or one for each entry that the operator returns.
    """

    operands: list[Node]
    nodes: list[Node]
    results: list[Node]


def decomposed(exported: ExportedProgram, table: Table) -> Unlifted:
    """Returns the program with operators decomposed, as ``unlift`` gives it."""
    if all(map(_is_plain, exported.graph.nodes)):
        module, names, learned = unlift(exported)
        if written_apart(module.graph):
            _decompose(module, table)
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()
            return module, names, learned
    return unlift(exported.run_decompositions(dict(table)))


def _is_plain(node: Node) -> bool:
    """Says whether all is known of a node by itself: an operator from tensors to tensors, of sizes that are numbers."""
    values = pytree.tree_leaves((node.meta.get("val"), node.args, node.kwargs))
    if any(isinstance(v, torch.SymInt) for v in values) or not all(map(_is_sized, values)):
        return False
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function" or not (isinstance(node.target, OpOverload) or node.target is operator.getitem):
        return False
    value = node.meta.get("val")
    return value is None or all(isinstance(v, Tensor) for v in pytree.tree_leaves(value))


def _is_sized(value: object) -> bool:
    return not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape)


def _decompose(module: GraphModule, table: Table) -> None:
    """Replaces the operators that the table has, and those of which PyTorch keeps none."""

    def wanted(node: Node) -> bool:
        target = node.target
        if not isinstance(target, OpOverload) or node.meta.get("val") is None:
            return False
        return target in table or (target._can_decompose() and not _is_preservable_cia_op(target))

    nodes: dict[Kind, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and wanted(node):
            nodes.setdefault(kind_of(node), []).append(node)
    if not nodes:
        return
    examples = [alike[0] for alike in nodes.values()]
    whole, _, _ = unlift(_program(examples).run_decompositions(dict(table)))
    _keep_constants(whole, module)
    for parts, alike in zip(_decomposed_examples(whole.graph, examples), nodes.values(), strict=True):
        for node in alike:
            _put(module.graph, node, parts)


def _results_of(node: Node) -> int | None:
    """Returns how many tensors an operator returns in a tuple or list; None: one, by itself."""
    value = node.meta["val"]
    return len(value) if isinstance(value, (tuple, list)) else None


def _program(examples: list[Node]) -> ExportedProgram:
    """Returns a program of the examples side by side: their operands are its inputs, their results its outputs."""
    graph = Graph()
    inputs: list[Node] = []
    for node in examples:
        for operand in node.all_input_nodes:
            inputs.append(graph.placeholder(f"x{len(inputs)}"))
            inputs[-1].meta = {"val": operand.meta["val"]}
    waiting, outputs = iter(inputs), []
    for node in examples:
        own = {operand: next(waiting) for operand in node.all_input_nodes}
        copy = graph.node_copy(node, own.__getitem__)
        count = _results_of(node)
        for i in range(count or 0):
            item = graph.call_function(operator.getitem, (copy, i))
            item.meta = {**node.meta, "val": node.meta["val"][i]}
            outputs.append(item)
        if count is None:
            outputs.append(copy)
    graph.output(tuple(outputs))
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
    values = tuple(node.meta["val"] for node in inputs)
    specs = pytree.tree_structure((values, {})), pytree.tree_structure(tuple(range(len(outputs))))
    whole = ModuleCallEntry("", ModuleCallSignature([], [], *specs))
    return ExportedProgram(nn.Module(), graph, signature, {}, {}, [whole], (values, {}))


def _decomposed_examples(graph: Graph, examples: list[Node]) -> list[_Parts]:
    """Returns what each example has become."""
    inputs = iter([node for node in graph.nodes if node.op == "placeholder"])
    (returned,) = next(node for node in graph.nodes if node.op == "output").args
    outputs = iter(returned)
    found = []
    for node in examples:
        operands = [next(inputs) for _ in node.all_input_nodes]
        results = [next(outputs) for _ in range(_results_of(node) or 1)]
        needed = set(results)
        for each in reversed(graph.nodes):
            if each in needed:
                needed.update(each.all_input_nodes)
        between = [each for each in graph.nodes if each in needed and each.op != "placeholder"]
        found.append(_Parts(operands, between, results))
    return found


def _put(graph: Graph, node: Node, parts: _Parts) -> None:
    """Puts what a kind has become in the place of one operator of it."""
    env = dict(zip(parts.operands, node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        for each in parts.nodes:
            if each.op == "get_attr":
                env[each] = graph.get_attr(_renamed(each))
            else:
                args, kwargs = map_arg(each.args, env.__getitem__), map_arg(each.kwargs, env.__getitem__)
                env[each] = graph.create_node(each.op, each.target, args, kwargs)
            own = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
            env[each].meta = {**own, "val": each.meta["val"]}
    if _results_of(node) is None:
        node.replace_all_uses_with(env[parts.results[0]])
    for item in list(node.users):
        item.replace_all_uses_with(env[parts.results[item.args[1]]])  # type: ignore[index]
        graph.erase_node(item)
    graph.erase_node(node)


def _renamed(constant: Node) -> str:
    return f"decomposed_{str(constant.target).replace('.', '_')}"


def _keep_constants(source: GraphModule, module: GraphModule) -> None:
    """Takes over constants that decompositions have made."""
    for node in source.graph.nodes:
        if node.op == "get_attr":
            set_constant(module, _renamed(node), getattr(source, str(node.target)))


__all__ = ["decomposed"]
