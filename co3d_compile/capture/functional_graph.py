"""Writes become operators with a result of their own: ``relu_(x)`` becomes ``relu(x)``.

What is written into a part of a tensor, ``x[:, t] = y``, becomes a new tensor that has it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from co3d_compile.ir.graph_edits import shape_of_call
from co3d_compile.ir.operator_arguments import Arguments

aten = torch.ops.aten
# Made of other operators, which might return an operand itself; these never do.
_FRESH = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.zeros.default,
    aten.zeros_like.default,
}
_CASTS = {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default}
_VIEWS = {
    aten.alias.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""Operators that give a part of their operand, or all of it, where it lies."""
_WITH_A_PART = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}
"""What gives a tensor in which such a part has been written."""
_SAME_ORDER = {aten.alias.default, aten.squeeze.dim, aten.unsqueeze.default, aten.view.default}
_WRITABLE = {*_WITH_A_PART, *_SAME_ORDER, aten.transpose.int}


def written_apart(graph: Graph) -> bool:
    """Replaces operators that write into an operand of their own, or a part of it. Says whether no other is left.

    What reads an operand behind the write reads the result.
    """
    _drop_dropout(graph)
    _drop_casts(graph)
    order, made = {node: i for i, node in enumerate(graph.nodes)}, set[Node]()
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        functional = _functional(node.target)
        operand = node.args[0] if node.args else None
        if functional is None or not isinstance(operand, Node):
            return False
        if _is_own(operand, node):
            node.target = functional
            _read_result(operand, node, order, order[node])
        elif not _Written(graph, node, operand, order, made).apart(functional):
            return False
    return True


def _drop_dropout(graph: Graph) -> None:
    """Takes out dropout in place, which changes nothing in a network in use."""
    for node in list(graph.nodes):
        if node.target is aten.dropout_.default and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _drop_casts(graph: Graph) -> None:
    """Takes out casts to the type and device that a tensor has: they give the tensor itself."""
    for node in [n for n in graph.nodes if n.target in _CASTS]:
        x, value = node.args[0], node.meta["val"]
        assert isinstance(x, Node)
        own, kept = x.meta["val"], ("dtype", "device", "layout")
        copies = node.target is not aten.type_as.default and Arguments(node).given("copy")
        if not copies and own.stride() == value.stride() and all(getattr(own, k) == getattr(value, k) for k in kept):
            node.replace_all_uses_with(x)
            graph.erase_node(node)


def _read_result(old: Node, new: Node, order: dict[Node, int], at: int) -> None:
    """Lets what reads a node behind a place read another one."""
    for user in list(old.users):
        if order[user] > at:
            user.replace_input_with(old, new)


@dataclass
class _Written:
    """A write into a part of a tensor.

    Attributes:
        graph: The graph.
        node: The operator that writes.
        operand: What it writes into.
        order: The places of all nodes.
        made: Tensors with a part in them that were written here: nothing else reads what they are made of.
    """

    graph: Graph
    node: Node
    operand: Node
    order: dict[Node, int]
    made: set[Node]

    def apart(self, functional: OpOverload) -> bool:
        """Replaces the operator; says whether it could be, as all that shares the memory is known."""
        path = self._path()
        family = self._family(path[0])
        if family is None:
            return False
        read = self._read_later(family)
        parts = path[1:]
        if read and parts and (self.node.users or any(x.target not in _WRITABLE for x in parts)):
            return False
        self.node.target = functional
        self._evaluate(self.node)
        if read:
            self._put_back(path, [x for x in family[1:] if x in read])
        return True

    def _read_later(self, family: list[Node]) -> set[Node]:
        """Finds those of a tensor and its parts that are read behind the write, or have parts that are."""
        at, found = self.order[self.node], set[Node]()
        for member in reversed(family):
            others = [user for user in member.users if user.target not in _VIEWS]
            if any(self.order[user] > at for user in others) or any(user in found for user in member.users):
                found.add(member)
        return found

    def _path(self) -> list[Node]:
        """Lists what is written into, behind the tensor that it is a part of, which comes first."""
        path = [self.operand]
        while path[0].target in _VIEWS and path[0] not in self.made:
            path.insert(0, path[0].all_input_nodes[0])
        return path

    def _family(self, base: Node) -> list[Node] | None:
        """Lists a tensor and all parts of it; None where something may share its memory that is not known to."""
        if base not in self.made and not _is_apart(base):
            return None
        family = [base]
        for member in family:
            for user in member.users:
                if user.target in _VIEWS:
                    family.append(user)
                elif not (user.op == "output" or _is_apart(user) or self._writes_later(user)):
                    return None
        return family

    def _writes_later(self, node: Node) -> bool:
        """Says whether a node is this write, or one behind it, which will be looked at in its turn."""
        writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        return writes and self.order[node] >= self.order[self.node]

    def _put_back(self, path: list[Node], parts: list[Node]) -> None:
        """Writes the tensor that has the part, and what is read of it behind the write."""
        at, value = self.order[self.node], self.node
        for whole, part in reversed(list(pairwise(path))):
            value = self._whole(value, whole, part)
        self.made.add(value)
        became, last = {path[0]: value}, value
        for member in parts:
            source = member.all_input_nodes[0]
            if self.order[member] < at:
                last = self._behind(last, member.target, became[source], *member.args[1:])
                became[member] = last
        for old, new in became.items():
            _read_result(old, new, self.order, at)

    def _whole(self, value: Node, whole: Node, part: Node) -> Node:
        """Writes a tensor with new values in a part of it."""
        if part.target in _SAME_ORDER:
            return self._behind(value, aten.reshape.default, value, list(whole.meta["val"].shape))
        if part.target is aten.transpose.int:
            return self._behind(value, part.target, value, *part.args[1:])
        return self._behind(value, _WITH_A_PART[part.target], whole, value, *part.args[1:])  # type: ignore[index]

    def _behind(self, before: Node, target: Any, *args: Any) -> Node:
        """Puts an operator behind another one."""
        with self.graph.inserting_after(before):
            new = self.graph.call_function(target, args)
        new.meta = dict(self.node.meta)
        self.order[new] = self.order[self.node]
        self._evaluate(new)
        return new

    def _evaluate(self, node: Node) -> None:
        mode = self.node.meta["val"].fake_mode
        node.meta = {**node.meta, "val": shape_of_call(mode, node.target, node.args, node.kwargs)}


def _is_apart(node: Node) -> bool:
    """Says whether the result of an operator shares no memory with what it reads."""
    if node.target in _CASTS:
        return True  # to another type: others are taken out
    if node.target is aten.contiguous.default:
        return len(node.args) == 1 and not node.args[0].meta["val"].is_contiguous()  # type: ignore[union-attr]
    return isinstance(node.target, OpOverload) and not _may_alias(node.target)


def _functional(target: OpOverload) -> OpOverload | None:
    """Finds the operator that gives what another one writes into its first operand, and into nothing else."""
    first, *others = target._schema.arguments
    name = target._schema.name.removeprefix("aten::")
    writes = first.alias_info is not None and first.alias_info.is_write
    if not writes or any(other.alias_info is not None for other in others) or not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    found = getattr(packet, target._overloadname, None)
    return found if isinstance(found, OpOverload) and not _may_alias(found) else None


def _is_own(operand: Node, node: Node) -> bool:
    """Says whether an operand shares its memory with nothing, and the result is a tensor like it."""
    value, result = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if (value.shape, value.dtype, value.stride()) != (result.shape, result.dtype, result.stride()):
        return False
    others = [user for user in operand.users if user is not node]
    return all(map(_is_apart, (operand, *others)))


def _may_alias(target: OpOverload) -> bool:
    """Says whether a result may be an operand, or a part of one."""
    if target in _FRESH:
        return False
    return target._can_decompose() or any(each.alias_info is not None for each in target._schema.returns)
