"""Arguments of ATen operators, and sets of operators that belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from co3d_compile.ir.node_reading import argument, norm_dims, operand, rank_of, shape_of, spread
from co3d_compile.ir.time_facts import NoExtension, known

aten = torch.ops.aten

# By the number of spatial dims, from one on.
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED_CONVOLUTIONS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
BATCH_NORMS = {aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default}
# What does nothing in inference.
SAME = {
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
# What the tracer noted about a tensor beside a cast, and assertions of the model: they compute nothing.
CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
EXACT = [aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d]
EXACT_OVERLOADS = {o for packet in EXACT for o in (packet.vec, packet.default)}
AVERAGE = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}
DIMS = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}


@dataclass
class PoolArgs:
    """The arguments of an ATen pool, spread over its spatial dims."""

    x: Node
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil: bool
    count_pad: bool
    divisor: int | None
    average: bool

    @staticmethod
    def of(node: Node) -> PoolArgs:
        n = DIMS[node.target]  # type: ignore[index]
        x = operand(node)
        kernel = spread(argument(node, 1, "kernel_size"), n)
        stride = spread(argument(node, 2, "stride", None) or kernel, n)
        padding = spread(argument(node, 3, "padding", 0), n)
        if node.target in AVERAGE:
            ceil, count = argument(node, 4, "ceil_mode", False), argument(node, 5, "count_include_pad", True)
            return PoolArgs(
                x, kernel, stride, padding, [1] * n, ceil, count, argument(node, 6, "divisor_override"), True
            )
        dilation = spread(argument(node, 4, "dilation", 1), n)
        return PoolArgs(x, kernel, stride, padding, dilation, argument(node, 5, "ceil_mode", False), True, None, False)

    def write(self, node: Node) -> None:
        """Puts the arguments back into the node."""
        node.args = self.args(self.x, list(range(len(self.kernel))))
        node.kwargs = {}

    def args(self, x: Node, axes: list[int]) -> tuple:
        """The operator's arguments for some of its axes."""
        k, s, p, d = ([v[a] for a in axes] for v in (self.kernel, self.stride, self.padding, self.dilation))
        if not self.average:
            return (x, k, s, p, d, self.ceil)
        tail = (self.ceil, self.count_pad)
        return (x, k, s, p, *tail) if len(axes) == 1 or self.divisor is None else (x, k, s, p, *tail, self.divisor)


def adaptive_max(x: Tensor, sizes: list[int]) -> Tensor:
    """An adaptive max pool of which only the values are read (``aten.adaptive_max_pool*`` also returns positions)."""
    result: Tensor = [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d][len(sizes) - 1](x, sizes)
    return result


SEPARABLE = {aten.mean.dim: "mean", aten.amax.default: "amax", aten.amin.default: "amin", aten.sum.dim_IntList: "sum"}


def reduced(node: Node) -> tuple[Node, list[int], bool]:
    """Operand, dims and keepdim of a reduction."""
    x = operand(node)
    dims = norm_dims(argument(node, 1, "dim"), rank_of(x))
    at = 3 if node.target in (aten.var.correction, aten.std.correction) else 2
    return x, dims, bool(argument(node, at, "keepdim", False))


@dataclass
class ConvArgs:
    """The arguments of an ATen convolution, transposed or not, spread over its spatial dims."""

    x: Node
    weight: Node
    bias: Node | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    output_padding: list[int]

    @staticmethod
    def of(node: Node) -> ConvArgs:
        transposed = node.target in TRANSPOSED_CONVOLUTIONS
        weight, padding = operand(node, 1), argument(node, 4, "padding", 0)
        if isinstance(padding, str):
            raise NoExtension(f"padding={padding!r} was not made explicit")
        n = rank_of(weight) - 2
        return ConvArgs(
            operand(node),
            weight,
            argument(node, 2, "bias"),
            stride=spread(argument(node, 3, "stride", 1), n),
            padding=spread(padding, n),
            dilation=spread(argument(node, 7 if transposed else 5, "dilation", 1), n),
            groups=argument(node, 6, "groups", 1),
            output_padding=spread(argument(node, 5, "output_padding", 0) if transposed else 0, n),
        )

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return shape_of(self.weight)[2:]

    def write(self, node: Node) -> None:
        """Puts the arguments back into the node."""
        node.args = (self.x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        node.kwargs = {}


def sliding_axis(x: Node, n: int) -> int | None:
    """The spatial axis (0 … n-1) that is time alone, or None."""
    layout = known(x)
    place = layout.time
    first = layout.rank - n
    if place is None or not place.alone or place.dim < first:
        return None
    return place.dim - first


def sliced(node: Node) -> tuple[Node, int, int, int, int]:
    """Operand, dim, start, end and step of a slice, all non-negative."""
    x = operand(node)
    dim = argument(node, 1, "dim", 0) % rank_of(x)
    size = shape_of(x)[dim]
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    start = 0 if start is None else max(0, start + size if start < 0 else start)
    end = size if end is None else min(size, end + size if end < 0 else end)
    return x, dim, start, max(start, end), step


NEAREST = [aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d]
LINEAR = [aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d]
