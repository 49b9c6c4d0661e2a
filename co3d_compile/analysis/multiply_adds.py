"""Multiply-adds of a graph, by module path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from co3d_compile.ir.frame_loop import is_loop, loop_of
from co3d_compile.ir.graph_edits import fake_mode
from co3d_compile.ir.node_reading import called, module_path, operand, shape_of
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.operator_kind import Kind, kind_of
from co3d_compile.ir.operator_row import Operator
from co3d_compile.ir.program import Program, bytes_of
from co3d_compile.ir.resized_graph import Captures
from co3d_compile.rules import is_pointwise, rule_for
from co3d_compile.rules.recurrent import Recurrent

MOST = 20_000  # kinds of operators that are remembered
_known: dict[Kind, int] = {}


@dataclass
class Costs:
    """Multiply-adds by module path, of a whole graph at batch one."""

    by_path: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.by_path.total()


def costs(program: Program) -> Costs:
    """Gives multiply-adds of convolutions, matrix products and recurrent layers at batch one, by PyTorch's own counter.

    Of operators of one kind one is counted.
    """
    batch = max(1, int(program.placeholders()[0].meta["val"].shape[0]))
    kinds: dict[Kind, list[Node]] = {}
    for node in filter(_counts, program.graph.nodes):
        kinds.setdefault(kind_of(node), []).append(node)
    counted = _counted(program, {kind: alike[0] for kind, alike in kinds.items()})
    found: Counter[str] = Counter()
    for kind, flops in counted.items():
        for node in kinds[kind] if flops else []:
            found[module_path(node)] += flops
    return Costs(Counter({path: flops // 2 // batch for path, flops in found.items()}))


def _counted(program: Program, examples: Mapping[Kind, Node]) -> dict[Kind, int]:
    """Counts what an operator of each kind computes; what PyTorch's own operators do is remembered."""
    new = {kind: node for kind, node in examples.items() if kind not in _known}
    counted = {kind: _known[kind] for kind in examples.keys() - new.keys()}
    if new:
        with torch.no_grad(), fake_mode(program), FlopCounterMode(display=False) as counter:
            counted |= {kind: _flops(node, counter) for kind, node in new.items()}
        if len(_known) >= MOST:
            _known.clear()
        _known.update({kind: counted[kind] for kind, node in new.items() if _is_usual(node)})
    return counted


def _is_usual(node: Node) -> bool:
    """Says whether the kind of an operator says all: it is PyTorch's own, and its sizes are numbers."""
    values = pytree.tree_leaves([n.meta["val"] for n in node.all_input_nodes])
    known = all(isinstance(size, int) for value in values for size in value.shape)
    return known and isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def _counts(node: Node) -> bool:
    """Says whether an operator may be counted: a loop, a recurrent layer, what PyTorch counts, or is made of that."""
    target = node.target
    if not isinstance(target, OpOverload):
        return is_loop(node)
    if is_pointwise(target):
        return False
    counted = target.overloadpacket in flop_registry or target._can_decompose()
    return counted or isinstance(rule_for(target), Recurrent)


def _flops(node: Node, counter: FlopCounterMode) -> int:
    """Counts what an operator computes; of a loop, what its body does in each turn."""
    if is_loop(node):
        loop = loop_of(node)
        turns = shape_of(operand(node))[loop.walked[0]]
        return turns * sum(_flops(n, counter) for n in loop.body.graph.nodes if _counts(n))
    if isinstance(rule_for(node.target), Recurrent):
        return 2 * _of_recurrent_layer(node)
    before = counter.get_total_flops()
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    called(node.target)(*args, **kwargs)
    return int(counter.get_total_flops() - before)  # sizes of TorchScript may be symbols


def _of_recurrent_layer(node: Node) -> int:
    """Counts the multiply-adds of an LSTM, a GRU or an RNN, of which PyTorch counts some as none.

    Entries times weights.
    """
    weights = [p.meta["val"] for p in Arguments(node).tensors("params")]
    return prod(shape_of(operand(node))[:-1]) * sum(w.numel() for w in weights if w.dim() == 2)


def region_costs(captures: Captures, entries: int) -> int:
    """Counts the multiply-adds of a region on so many entries of one stream."""
    batch = 1 if captures.wide is not None else captures.sizes[0].batch
    inputs = [n.meta["val"].dtype for n in captures.short.graph.nodes if n.op == "placeholder"]
    clips = [torch.zeros(s, dtype=d) for s, d in zip(captures.shapes(entries, batch), inputs, strict=True)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        captures.at(entries, batch)(*clips)
    return int(counter.get_total_flops()) // 2 // batch


def with_costs(rows: list[Operator], clip: Costs, step: Costs, program: Program) -> list[Operator]:
    """Adds what each module costs and remembers, at the operator of the module that does most with time."""
    states: Counter[str] = Counter()
    for state in program.step.states:
        path = state.input.removeprefix("state.").rpartition(".")[0]
        states[path] += bytes_of(state.shape, state.dtype)
    result = list(rows)
    for name, amounts in (("macs_clip", clip.by_path), ("macs_step", step.by_path), ("state_bytes", states)):
        for path, amount in amounts.items():
            at = _owner(rows, path, remembers=name == "state_bytes")
            if at is not None:
                result[at] = replace(result[at], **{name: getattr(result[at], name) + amount})
    return result


def _owner(rows: list[Operator], path: str, *, remembers: bool) -> int | None:
    """Finds the operator that a module's costs are shown at: one that remembers, or the first that computes."""
    parts = [at for at, row in enumerate(rows) if row.operator != "input"]
    named = "" if path == "model" else path
    own = [at for at in parts if rows[at].module_path == named] or (parts[-1:] if path == "model" else [])
    heavy = [at for at in own if any(word in rows[at].operator for word in ("conv", "linear", "mm", "attention"))]
    with_past = [at for at in own if rows[at].done]
    if remembers:
        return next(iter(with_past or heavy or own), None)
    return next(iter(heavy or own), None)
