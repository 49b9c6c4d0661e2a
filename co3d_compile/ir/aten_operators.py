"""Arguments of ATen operators, and sets of operators that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, Target

from co3d_compile.ir.index_equation import Kernel
from co3d_compile.ir.node_reading import operand, rank_of, shape_of
from co3d_compile.ir.operator_arguments import Arguments
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
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
# What the tracer noted about a tensor beside a cast, assertions of the model, whether a matrix could be inverted: they
# compute nothing.
CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._linalg_check_errors.default,
}
PLACES = {aten.argmax.default, aten.argmin.default}  # none of them is below zero
VIEWS = {aten.view.default, aten._unsafe_view.default}
RESHAPES = {*VIEWS, aten.reshape.default}
SIZED = {*RESHAPES, aten.expand.default}  # they say the sizes of their result
EXACT = [aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d]
EXACT_OVERLOADS = {o for packet in EXACT for o in (packet.vec, packet.default)}
AVERAGE = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}
DIMS: dict[Target, int] = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}


def sliding_axis(x: Node, n: int) -> int | None:
    """Finds the spatial axis (0 … n-1) that is time alone, or None."""
    layout = known(x)
    place = layout.time
    first = layout.rank - n
    if place is None or not place.alone or place.dim < first:
        return None
    return place.dim - first


@dataclass
class SlidingArgs:
    """The arguments of an operator whose kernel slides over the last dims of a tensor: a number for each of these."""

    x: Node
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    @property
    def dims(self) -> int:
        """Over how many dims the kernel slides."""
        return len(self.kernel)

    @property
    def first(self) -> int:
        """The first of these dims in the tensor."""
        return rank_of(self.x) - self.dims

    @property
    def axis(self) -> int | None:
        """Which of these dims (0 … ``dims`` - 1) is time alone, or None."""
        return sliding_axis(self.x, self.dims)

    @property
    def space(self) -> list[int]:
        """Those of these dims that are not time."""
        axis = self.axis
        return [a for a in range(self.dims) if a != axis]

    def moves(self, a: int) -> bool:
        """Says whether anything happens over a dim."""
        return (self.kernel[a], self.stride[a], self.padding[a]) != (1, 1, 0)

    def over(self, a: int) -> Kernel:
        """The index equation over a dim."""
        return Kernel(self.kernel[a], self.dilation[a], self.stride[a], self.padding[a], self.padding[a])

    def write(self, node: Node) -> None:
        """Puts the arguments back into the node."""
        raise NotImplementedError


@dataclass
class PoolArgs(SlidingArgs):
    """The arguments of an ATen pool."""

    ceil: bool
    count_pad: bool
    divisor: int | None
    average: bool

    @staticmethod
    def of(node: Node) -> PoolArgs:
        n, average, given = DIMS[node.target], node.target in AVERAGE, Arguments(node)
        kernel = given.integers("kernel_size", n)
        divisor = given.given("divisor_override")
        return PoolArgs(
            given.tensor(),
            kernel,
            given.integers("stride", n) or kernel,
            given.integers("padding", n),
            [1] * n if average else given.integers("dilation", n),
            ceil=bool(given.given("ceil_mode")),
            count_pad=not average or bool(given.given("count_include_pad")),
            divisor=divisor if isinstance(divisor, int) else None,
            average=average,
        )

    def over(self, a: int) -> Kernel:
        return replace(super().over(a), ceil=self.ceil)

    def along(self, axes: Iterable[int]) -> PoolArgs:
        """The pool over some of its dims alone."""
        kept = set(axes)

        def part(values: list[int], neutral: int) -> list[int]:
            return [v if a in kept else neutral for a, v in enumerate(values)]

        kernel, stride, dilation = (part(v, 1) for v in (self.kernel, self.stride, self.dilation))
        return replace(self, kernel=kernel, stride=stride, padding=part(self.padding, 0), dilation=dilation)

    def write(self, node: Node) -> None:
        node.args = self.args(self.x, range(self.dims))
        node.kwargs = {}

    def args(self, x: Node, axes: Sequence[int]) -> tuple[Argument, ...]:
        """Writes the operator's arguments for some of its axes."""
        sizes = tuple([v[a] for a in axes] for v in (self.kernel, self.stride, self.padding, self.dilation))
        if not self.average:
            return (x, *sizes, self.ceil)
        divisor = () if len(axes) == 1 or self.divisor is None else (self.divisor,)
        return (x, *sizes[:3], self.ceil, self.count_pad, *divisor)


def adaptive_max(x: Tensor, sizes: list[int]) -> Tensor:
    """Pools by adaptive maxima, of which only the values are read (``aten.adaptive_max_pool*`` gives positions too)."""
    result: Tensor = [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d][len(sizes) - 1](x, sizes)
    return result


SEPARABLE: dict[Target, str] = {
    aten.mean.dim: "mean",
    aten.amax.default: "amax",
    aten.amin.default: "amin",
    aten.sum.dim_IntList: "sum",
}


def reduced(node: Node) -> tuple[Node, list[int], bool]:
    """Reads the operand, dims and keepdim of a reduction."""
    x, given = operand(node), Arguments(node)
    return x, given.dims(x), bool(given.integer("keepdim"))


@dataclass
class ConvArgs(SlidingArgs):
    """The arguments of an ATen convolution, transposed or not."""

    weight: Node
    bias: Node | None
    groups: int
    output_padding: list[int]

    @staticmethod
    def of(node: Node) -> ConvArgs:
        given = Arguments(node)
        weight, padding = given.tensor("weight"), given.given("padding")
        if isinstance(padding, str):
            raise NoExtension(f"padding={padding!r} was not made explicit")
        kernel = list(shape_of(weight)[2:])
        transposed = node.target in TRANSPOSED_CONVOLUTIONS
        return ConvArgs(
            given.tensor("input"),
            kernel,
            given.integers("stride", len(kernel)),
            given.integers("padding", len(kernel)),
            given.integers("dilation", len(kernel)),
            weight,
            given.optional("bias"),
            given.integer("groups"),
            given.integers("output_padding", len(kernel)) if transposed else [0] * len(kernel),
        )

    def write(self, node: Node) -> None:
        node.args = (self.x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        node.kwargs = {}


@dataclass(frozen=True)
class FoldArgs:
    """The arguments of ``col2im``, two numbers each; ``blocks`` is how many columns there are along each dim."""

    size: list[int]
    kernel: list[int]
    dilation: list[int]
    padding: list[int]
    stride: list[int]

    @staticmethod
    def of(node: Node) -> FoldArgs:
        given = Arguments(node)
        names = ("output_size", "kernel_size", "dilation", "padding", "stride")
        return FoldArgs(*(given.integers(name, 2) for name in names))

    @property
    def blocks(self) -> list[int]:
        return [(self.size[a] - self._least(a, 1)) // self.stride[a] + 1 for a in range(2)]

    def _least(self, a: int, blocks: int) -> int:
        """The size that so many columns have along a dim."""
        return (blocks - 1) * self.stride[a] - 2 * self.padding[a] + self.dilation[a] * (self.kernel[a] - 1) + 1

    def along(self, a: int) -> tuple[int, int, int, int]:
        """The kernel, stride, padding and dilation along a dim."""
        return self.kernel[a], self.stride[a], self.padding[a], self.dilation[a]

    def more(self, a: int) -> int:
        """Counts the entries behind those that the last column adds to."""
        return self.size[a] - self._least(a, self.blocks[a])


def sliced(node: Node) -> tuple[Node, int, int, int, int]:
    """Reads the operand, dim, start, end and step of a slice, all non-negative."""
    x, given = operand(node), Arguments(node)
    dim = given.dim(x)
    start, end, step = slice(given.given("start"), given.given("end"), given.integer("step")).indices(shape_of(x)[dim])
    return x, dim, start, max(start, end), step


def selected(node: Node) -> tuple[Node, int, int]:
    """Reads the operand, dim and index of a selection, both non-negative."""
    x, given = operand(node), Arguments(node)
    dim = given.dim(x)
    return x, dim, given.integer("index") % shape_of(x)[dim]


def part_taken(node: Node) -> tuple[Node, int, int, int] | None:
    """Reads the operand, dim, first entry and end of a slice or a selection; None for anything else."""
    if node.target is aten.slice.Tensor:
        return sliced(node)[:4]
    if node.target is aten.select.int:
        x, dim, index = selected(node)
        return x, dim, index, index + 1
    return None


NEAREST = [aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d]
LINEAR = [aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d]


def is_pointwise(target: object) -> bool:
    """Says whether PyTorch itself tags the operator as pointwise."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
