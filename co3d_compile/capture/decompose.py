"""Decomposes the operators of a captured graph, each kind of them once.

``ExportedProgram.run_decompositions`` traces the whole network a second time, which takes longer than the first. Here
it is given a program with one example of each operator that is to be decomposed, and what it makes of an example takes
the place of every operator like it; all others stay as they are. The usual operators are traced without it: its setup
takes as long as tracing a small network. A program of which this cannot be told operator by operator (control flow,
values that Python reads, writes that other tensors see) goes through PyTorch's own way.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._export.utils import _is_preservable_cia_op
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from co3d_compile.capture.cells import CELLS, Cell
from co3d_compile.capture.decompositions import Table
from co3d_compile.capture.exported_graph import Unlifted, unlift
from co3d_compile.capture.functional_graph import written_apart
from co3d_compile.ir.aten_operators import VIEWS
from co3d_compile.ir.fake_values import fake_like
from co3d_compile.ir.graph_edits import erase_dead
from co3d_compile.ir.node_reading import Operator, returned, whole
from co3d_compile.ir.operator_kind import Kind, kind_of
from co3d_compile.ir.stored_constants import set_constant

aten = torch.ops.aten

ALONE = {
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.all.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.argsort.default,
    aten.as_strided.default,
    aten.chunk.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.einsum.default,
    aten.empty_like.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
    aten.floor_divide.default,
    aten.hann_window.default,
    aten.imag.default,
    aten.index_add.default,
    aten.index_put.default,
    aten.linspace.default,
    aten.mT.default,
    aten.movedim.int,
    aten.narrow.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.real.default,
    aten.repeat_interleave.self_int,
    aten.reshape.default,
    aten.split.Tensor,
    aten.stack.default,
    aten.std.dim,
    aten.sum.default,
    aten.t.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.triu.default,
    aten.type_as.default,
    aten.unbind.int,
    aten.unflatten.int,
    aten.var_mean.dim,
    aten.view_as.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.zeros.default,
    aten.zeros_like.default,
}
"""Operators made of nothing that PyTorch keeps whole, so that any tracer finds the same parts of them."""
MOST = 2000  # kinds of operators that are remembered


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
    """Decomposes the operators of a program; what comes of it is as ``unlift`` gives it.

    A view becomes a ``reshape``: what it asks of the strides need not hold behind parts that were put in.
    """
    found = _decomposed(exported, table)
    for node in found[0].graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
    return found


def _decomposed(exported: ExportedProgram, table: Table) -> Unlifted:
    if all(map(_is_plain, exported.graph.nodes)):
        module, names, learned = unlift(exported)
        if written_apart(module.graph):
            _decompose(module, table)
            erase_dead(module.graph)
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
    found = _known.found(nodes, table)
    found |= {node: _written(node) for node in examples if node.target in CELLS and node not in found}
    quick = {node: compute for node in examples if node not in found and (compute := _quick(node)) is not None}
    others = [node for node in examples if node not in quick and node not in found]
    if quick:
        found |= _decomposed_examples(_traced(quick, table), list(quick))
    if others:
        whole, _, _ = unlift(_program(others).run_decompositions(dict(table)))
        _keep_constants(whole, module)
        found |= _decomposed_examples(whole.graph, others)
    for (kind, alike), example in zip(nodes.items(), examples, strict=True):
        _known.keep(kind, found[example])
        for node in alike:
            _put(module.graph, node, found[example])


class _Known:
    """What operators have become before, by their kinds, as long as the decompositions stay the same."""

    def __init__(self) -> None:
        self.table: Table = {}
        self.parts: dict[Kind, _Parts] = {}

    def found(self, nodes: Mapping[Kind, list[Node]], table: Table) -> dict[Node, _Parts]:
        """Finds what is known of kinds of operators, by the first operator of each."""
        if table != self.table or len(self.parts) > MOST:
            self.table, self.parts = table, {}
        return {alike[0]: self.parts[kind] for kind, alike in nodes.items() if kind in self.parts}

    def keep(self, kind: Kind, parts: _Parts) -> None:
        """Remembers what a kind has become, but for what holds constants of its own or is not PyTorch's."""
        own = isinstance(target := kind[0], OpOverload) and target.namespace == "aten"
        if own and all(each.op == "call_function" for each in parts.nodes):
            self.parts.setdefault(kind, parts)


_known = _Known()


def _written(node: Node) -> _Parts:
    """Writes the parts of a cell of a recurrent layer."""
    cell = Cell(node, _mode_of([node]))
    return _Parts(cell.operands, [each for each in cell.graph.nodes if each.op != "placeholder"], cell.results)


def _mode_of(nodes: Sequence[Node]) -> FakeTensorMode:
    """Finds what the shapes of nodes live in."""
    values = pytree.tree_leaves([node.meta["val"] for node in nodes])
    mode: FakeTensorMode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
    return mode


def _quick(node: Node) -> Operator | None:
    """Makes what computes an operator that is traced by itself; None: PyTorch's decomposition is asked.

    Dropout and batch norm of a network in use have one form each, which is what PyTorch makes of them, too.
    """
    target, given = node.target, node.args
    if target is aten.dropout.default and len(given) == 3 and not given[2]:
        return lambda x, *_: aten.clone.default(x)
    if target is aten.batch_norm.default and len(given) == 9 and not given[5] and None not in given[:5]:
        return lambda x, w, b, mean, variance, _, momentum, epsilon, __: (
            aten._native_batch_norm_legit_no_training.default(x, w, b, mean, variance, momentum, epsilon)[0]
        )
    moves = target is aten.pad.default and (len(given) < 3 or given[2] in ("constant", "reflect", "replicate"))
    return target if callable(target) and (moves or target in ALONE) else None


def _traced(examples: Mapping[Node, Operator], table: Table) -> Graph:
    """Decomposes a graph of the examples side by side: inputs and outputs are those of :func:`_program`.

    Args:
        examples: What computes each of them.
        table: Decompositions.
    """
    operands = [operand for node in examples for operand in node.all_input_nodes]

    def side_by_side(*values: Tensor) -> tuple[Tensor, ...]:
        waiting, results = iter(values), list[Tensor]()
        for node, compute in examples.items():
            own = {operand: next(waiting) for operand in node.all_input_nodes}
            result = compute(*map_arg(node.args, own.__getitem__), **map_arg(node.kwargs, own.__getitem__))
            results += [result] if isinstance(result, Tensor) else result
        return tuple(results)

    values = [node.meta["val"] for node in operands]
    with _mode_of([*operands, *examples]), torch.no_grad():
        own = [aten.alias.default(x) for x in values]  # an operand of two examples is two inputs
        return make_fx(side_by_side, decomposition_table=dict(table))(*own).graph


def _results_of(node: Node) -> int | None:
    """Counts how many tensors an operator gives in a tuple or list; None: one, by itself."""
    value = node.meta["val"]
    return len(value) if isinstance(value, (tuple, list)) else None


def _program(examples: list[Node]) -> ExportedProgram:
    """Makes a program of the examples side by side: their operands are its inputs, their results its outputs."""
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


def _decomposed_examples(graph: Graph, examples: list[Node]) -> dict[Node, _Parts]:
    """Reads what each example has become."""
    inputs = iter([node for node in graph.nodes if node.op == "placeholder"])
    outputs = iter(returned(graph))
    found = {}
    for node in examples:
        operands = [next(inputs) for _ in node.all_input_nodes]
        results = [next(outputs) for _ in range(_results_of(node) or 1)]
        needed = set(results)
        for each in reversed(graph.nodes):
            if each in needed:
                needed.update(each.all_input_nodes)
        between = [each for each in graph.nodes if each in needed and each.op != "placeholder"]
        found[node] = _Parts(operands, between, results)
    return found


def _put(graph: Graph, node: Node, parts: _Parts) -> None:
    """Puts what a kind has become in the place of one operator of it."""
    env = dict(zip(parts.operands, node.all_input_nodes, strict=True))
    mode = _mode_of([node])

    def of_now(value: FakeTensor) -> Tensor:
        return value if value.fake_mode is mode else fake_like(mode, value)

    with graph.inserting_before(node):
        for each in parts.nodes:
            if each.op == "get_attr":
                env[each] = graph.get_attr(_renamed(each))
            else:
                args, kwargs = map_arg(each.args, env.__getitem__), map_arg(each.kwargs, env.__getitem__)
                env[each] = graph.create_node(each.op, each.target, args, kwargs)
            own = {key: value for key, value in node.meta.items() if key != "tensor_meta"}
            env[each].meta = {**own, "val": pytree.tree_map_only(FakeTensor, of_now, each.meta["val"])}
    if _results_of(node) is None:
        node.replace_all_uses_with(env[parts.results[0]])
    for item in list(node.users):
        item.replace_all_uses_with(env[parts.results[whole(item, 1)]])
        graph.erase_node(item)
    graph.erase_node(node)


def _renamed(constant: Node) -> str:
    return f"decomposed_{str(constant.target).replace('.', '_')}"


def _keep_constants(source: GraphModule, module: GraphModule) -> None:
    """Takes over constants that decompositions have made."""
    for node in source.graph.nodes:
        if node.op == "get_attr":
            set_constant(module, _renamed(node), getattr(source, str(node.target)))
