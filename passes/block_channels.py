"""Block channels: as many channels between convolutions as the blocked image kernels of ONNX Runtime take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from co3d_compile.ir.graph_edits import insert_constant
from co3d_compile.ir.markers import previous
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import delete_unused_constants
from co3d_compile.step_graph.convolution_forms import BLOCK, FEWEST

aten = torch.ops.aten
# Finite where their operands are: a value that is not would get past the zeros in the weights that follow.
FINITE = {
    previous,
    aten.add.Tensor,
    aten.clamp.default,
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.maximum.default,
    aten.mean.dim,
    aten.minimum.default,
    aten.mul.Tensor,
    aten.neg.default,
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.softplus.default,
    aten.sub.Tensor,
    aten.tanh.default,
    aten.where.self,
}


class BlockChannels(Pass):
    """Makes the channels between convolutions a multiple of four: others run in unblocked kernels.

    Such are the 54 channels in the first stage of every X3D, and 230 and 921 in R(2+1)D. A depthwise kernel on 56x56
    pixels takes 142 microseconds for 54 channels and 28 for 56 (ONNX Runtime 1.31, AVX-512, two threads). One to three
    zeros are appended to the weights, and so to the states behind them: 54 channels become 56.
    Results stay as they are; only what nothing but convolutions reads is changed.
    """

    requires = frozenset({"lowered"})
    ensures = frozenset({"lowered"})

    def run(self, program: Program) -> bool:
        done: set[Node] = set()
        modified = False
        for node in list(program.graph.nodes):
            if node not in done and _is_dense(node) and _channels(node) >= FEWEST and _channels(node) % BLOCK:
                group = _group(node)
                done |= group.members
                if group.closed:
                    _pad(program, group)
                    modified = True
        delete_unused_constants(program.module)
        return modified


@dataclass
class _Group:
    """Tensors that have the same channels: they change together or not at all."""

    channels: int
    members: set[Node] = field(default_factory=set)
    readers: set[Node] = field(default_factory=set)
    closed: bool = True


def _group(start: Node) -> _Group:
    group = _Group(_channels(start))
    stack = [start]
    while stack and group.closed:
        node = stack.pop()
        if node in group.members:
            continue
        group.members.add(node)
        sources = _sources(node, group.channels)
        group.closed = sources is not None
        for user in node.users:
            if _is_dense(user) and user.args[0] is node and node not in user.args[1:]:
                group.readers.add(user)
            else:
                stack.append(user)
        stack.extend(sources or ())
    return group


def _sources(node: Node, channels: int) -> list[Node] | None:
    """Lists the operands that share a node's channels; None if it cannot change."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    if value.shape[1] != channels:
        return None
    if _is_dense(node):
        return []
    if node.target is aten.conv2d.default:
        x, weight = operand(node), operand(node, 1)
        depthwise = Arguments(node).integer("groups") == channels == x.meta["val"].shape[1]
        return [x] if depthwise and weight.op == "get_attr" else None
    return [n for n in node.all_input_nodes if not _spread(n)] if node.target in FINITE else None


def _spread(node: Node) -> bool:
    """Says whether a value is the same for all channels, such as whether a frame is one of the stream."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dim() < 3 or (value.dim() < 5 and value.shape[-3] == 1))


def _pad(program: Program, group: _Group) -> None:
    """Appends channels of zeros to the tensors of a group, and to the weights that read them."""
    more = -group.channels % BLOCK
    for node in program.graph.nodes:
        if node in group.members:
            _resize(program, node, more)
        if node in group.readers:
            _widen(program, node, 1, 1, more)


def _resize(program: Program, node: Node, more: int) -> None:
    """Gives a node so many channels more."""
    value, channels = node.meta["val"], _channels(node) + more
    with value.fake_mode:
        node.meta["val"] = torch.empty([value.shape[0], channels, *value.shape[2:]], dtype=value.dtype)
    if node.target is aten.conv2d.default:
        for index, constant in enumerate(node.args[1:3], 1):  # weight and bias
            if isinstance(constant, Node):
                _widen(program, node, index, 0, more)
        if Arguments(node).integer("groups") > 1:
            node.args = (*node.args[:6], channels)


def _widen(program: Program, node: Node, index: int, dim: int, more: int) -> None:
    """Appends so many zeros to a dim of a constant operand."""
    old = operand(node, index)
    value = program.constant(old)
    zeros = value.new_zeros([more if d == dim else size for d, size in enumerate(value.shape)])
    new = insert_constant(program, node, f"{old.target}_in_fours", torch.cat([value, zeros], dim))
    node.args = (*node.args[:index], new, *node.args[index + 1 :])


def _is_dense(node: Node) -> bool:
    """Says whether it is a convolution over space with all channels, of constant weights."""
    if node.target is not aten.conv2d.default or Arguments(node).integer("groups") != 1:
        return False
    parameters = [a for a in node.args[1:3] if a is not None]
    return all(isinstance(a, Node) and a.op == "get_attr" for a in parameters)


def _channels(node: Node) -> int:
    return int(node.meta["val"].shape[1])
