"""Block channels: as many channels between convolutions as the blocked image kernels of ONNX Runtime take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from co3d_compile.graph import insert_constant
from co3d_compile.manager import Pass
from co3d_compile.primitive import previous
from co3d_compile.program import Program, delete_unused_constants
from co3d_compile.rules.base import argument, norm_dims
from co3d_compile.tap_convolution import FEWEST

aten = torch.ops.aten
BLOCK = 4
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
    """Appends zeros to the weights of convolutions, until the channels between them are a multiple of four.

    Others run in unblocked kernels: the 54 channels in the first stage of every X3D, 230 and 921 in R(2+1)D. A
    depthwise kernel on 56x56 pixels takes 142 microseconds for 54 channels and 28 for 56 (ONNX Runtime 1.31, AVX-512,
    two threads). Results stay as they are; what nothing but convolutions reads is padded, and nothing else.
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
    """Tensors that have the same channels: they are padded together or not at all."""

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
    """The operands that share a node's channels; None if it cannot be padded."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    if value.shape[1] != channels:
        return None
    if _is_dense(node):
        return []
    if node.target is aten.conv2d.default:
        x, weight = node.args[0], node.args[1]
        assert isinstance(x, Node) and isinstance(weight, Node)
        depthwise = argument(node, 6, "groups", 1) == channels == x.meta["val"].shape[1]
        return [x] if depthwise and weight.op == "get_attr" else None
    if node.target is aten.mean.dim:
        over_space = norm_dims(argument(node, 1, "dim"), 4) == [2, 3] and argument(node, 2, "keepdim", False)
        return node.all_input_nodes if over_space else None
    return [n for n in node.all_input_nodes if not _spread(n)] if node.target in FINITE else None


def _spread(node: Node) -> bool:
    """Whether a value is the same for all channels, such as whether a frame is one of the stream."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dim() < 3 or (value.dim() < 5 and value.shape[-3] == 1))


def _pad(program: Program, group: _Group) -> None:
    more = -group.channels % BLOCK
    for node in program.graph.nodes:
        if node in group.members:
            value = node.meta["val"]
            with value.fake_mode:
                shape = [value.shape[0], group.channels + more, *value.shape[2:]]
                node.meta["val"] = torch.empty(shape, dtype=value.dtype)
            if node.target is aten.conv2d.default:
                groups = argument(node, 6, "groups", 1)
                _widen(program, node, 1, 0, more)
                if isinstance(argument(node, 2, "bias"), Node):
                    _widen(program, node, 2, 0, more)
                if groups > 1:
                    node.args = (*node.args[:6], groups + more)
        if node in group.readers:
            _widen(program, node, 1, 1, more)


def _widen(program: Program, node: Node, index: int, dim: int, more: int) -> None:
    """Appends zeros to a constant operand."""
    old = node.args[index]
    assert isinstance(old, Node)
    value = program.constant(old)
    shape = list(value.shape)
    shape[dim] = more
    wide = torch.cat([value, value.new_zeros(shape)], dim)
    new = insert_constant(program, node, f"{old.target}_in_fours", wide)
    node.args = (*node.args[:index], new, *node.args[index + 1 :])


def _is_dense(node: Node) -> bool:
    """Whether it is a convolution over space with all channels, of constant weights."""
    if node.target is not aten.conv2d.default or argument(node, 6, "groups", 1) != 1:
        return False
    parameters = [a for a in node.args[1:3] if a is not None]
    return all(isinstance(a, Node) and a.op == "get_attr" for a in parameters)


def _channels(node: Node) -> int:
    return int(node.meta["val"].shape[1])
