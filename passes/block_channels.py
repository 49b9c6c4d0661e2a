"""Block channels: as many channels between convolutions as the blocked image kernels of ONNX Runtime take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.fx import Node

from co3d_compile.ir.aten_operators import reduced
from co3d_compile.ir.graph_edits import insert_constant
from co3d_compile.ir.markers import previous
from co3d_compile.ir.node_reading import operand
from co3d_compile.ir.operator_arguments import Arguments
from co3d_compile.ir.pass_manager import Pass
from co3d_compile.ir.program import Program
from co3d_compile.ir.stored_constants import delete_unused_constants
from co3d_compile.step_graph.convolution_forms import BLOCK, FEWEST

aten = torch.ops.aten
ZEROS = 0.01  # of the channels
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
    """Makes the channels between convolutions a multiple of four: others run in unblocked kernels.

    Such are the 54 channels in the first stage of every X3D, and 230 and 921 in R(2+1)D. A depthwise kernel on 56x56
    pixels takes 142 microseconds for 54 channels and 28 for 56 (ONNX Runtime 1.31, AVX-512, two threads). A few zeros
    are appended to the weights where they are few indeed, since states keep them. Elsewhere the one to three channels
    beyond a multiple of four become a tensor beside the rest, which takes 2 to 4 percent longer than zeros would.
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
                    few = -group.channels % BLOCK <= ZEROS * group.channels
                    (_pad if few else _split)(program, group)
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
    if node.target is aten.mean.dim:
        x, dims, keep = reduced(node)
        return [x] if dims == [2, 3] and keep else None
    return [n for n in node.all_input_nodes if not _spread(n)] if node.target in FINITE else None


def _spread(node: Node) -> bool:
    """Says whether a value is the same for all channels, such as whether a frame is one of the stream."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.dim() < 3 or (value.dim() < 5 and value.shape[-3] == 1))


def _pad(program: Program, group: _Group) -> None:
    more = -group.channels % BLOCK

    def wide(value: Tensor, dim: int) -> Tensor:
        shape = list(value.shape)
        shape[dim] = more
        return torch.cat([value, value.new_zeros(shape)], dim)

    for node in program.graph.nodes:
        if node in group.members:
            _resize(program, node, group.channels + more, "in_fours", wide)
        if node in group.readers:
            _refit(program, node, 1, "in_fours", partial(wide, dim=1))


def _split(program: Program, group: _Group) -> None:
    rest: dict[Node, Node] = {}  # beside each tensor of whole fours what is beyond them
    for node in list(program.graph.nodes):
        halves = [node]
        if node in group.members:
            halves.append(_beyond(program, node, group.channels, rest))
        if node in group.readers:
            source = operand(node)
            halves = [_sum(program, half, source, rest[source]) for half in halves]
        if node in group.members:
            rest[halves[0]] = halves[1]


def _beyond(program: Program, node: Node, channels: int, rest: dict[Node, Node]) -> Node:
    """Leaves a node its whole fours of channels. Returns one like it for the others."""
    fours = channels // BLOCK * BLOCK
    begins = _is_dense(node)  # what it reads has other channels
    with program.graph.inserting_after(node):
        other = program.graph.node_copy(node, lambda n: n if begins else rest.get(n, n))
    for half, start, length in ((node, 0, fours), (other, fours, channels - fours)):
        _resize(program, half, length, f"from_{start}", partial(Tensor.narrow, start=start, length=length))
    return other


def _sum(program: Program, node: Node, fours: Node, rest: Node) -> Node:
    """Writes a convolution as the sum of one for each half of its input."""
    with program.graph.inserting_after(node):
        other = program.graph.node_copy(node)
    with program.graph.inserting_after(other):
        total = program.graph.call_function(aten.add.Tensor, (node, other))
    total.meta = dict(node.meta)
    program.notes.holders[total] = program.notes.holders.pop(node, [])
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    other.args = (rest, other.args[1], None, *other.args[3:])
    start = _channels(fours)
    for half, first, length in ((other, start, _channels(rest)), (node, 0, start)):
        _refit(program, half, 1, f"from_{first}", partial(Tensor.narrow, dim=1, start=first, length=length))
    return total


def _resize(program: Program, node: Node, channels: int, name: str, fit: Callable[[Tensor, int], Tensor]) -> None:
    """Gives a node so many channels; ``fit`` makes a dim of a constant that long."""
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty([value.shape[0], channels, *value.shape[2:]], dtype=value.dtype)
    if node.target is aten.conv2d.default:
        for index, constant in enumerate(node.args[1:3], 1):  # weight and bias
            if isinstance(constant, Node):
                _refit(program, node, index, name, lambda v: fit(v, 0))
        if Arguments(node).integer("groups") > 1:
            node.args = (*node.args[:6], channels)


def _refit(program: Program, node: Node, index: int, name: str, fit: Callable[[Tensor], Tensor]) -> None:
    """Puts another constant in the place of a constant operand."""
    old = operand(node, index)
    new = insert_constant(program, node, f"{old.target}_{name}", fit(program.constant(old)).contiguous())
    node.args = (*node.args[:index], new, *node.args[index + 1 :])


def _is_dense(node: Node) -> bool:
    """Says whether it is a convolution over space with all channels, of constant weights."""
    if node.target is not aten.conv2d.default or Arguments(node).integer("groups") != 1:
        return False
    parameters = [a for a in node.args[1:3] if a is not None]
    return all(isinstance(a, Node) and a.op == "get_attr" for a in parameters)


def _channels(node: Node) -> int:
    return int(node.meta["val"].shape[1])
