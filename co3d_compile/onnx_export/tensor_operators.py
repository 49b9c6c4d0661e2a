"""From ATen operators to ONNX operators: one entry per operator that a step graph is made of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch.fx import Node
from torch.fx.node import Target

from co3d_compile.ir.aten_operators import DIMS, ConvArgs, PoolArgs, reduced
from co3d_compile.ir.markers import expand_batch
from co3d_compile.ir.node_reading import operand, rank_of, shape_of, whole
from co3d_compile.ir.operator_arguments import Arguments, order_of
from co3d_compile.onnx_export.emitter import TABLE, Attribute, Emitter, declared, translates

aten = torch.ops.aten
TABLE.update(
    {
        aten.embedding.default: declared("Gather", "weight", "indices", axis=0),
        aten.index_select.default: declared("Gather", "self", "index", axis="dim"),
        aten.gather.default: declared("GatherElements", "self", "index", axis="dim"),
        aten.softmax.int: declared("Softmax", axis="dim"),
        aten._softmax.default: declared("Softmax", axis="dim"),
        aten.log_softmax.int: declared("LogSoftmax", axis="dim"),
        aten._log_softmax.default: declared("LogSoftmax", axis="dim"),
        aten.view.default: lambda e, node: e.op("Reshape", operand(node), Arguments(node).integers("size")),
        aten._unsafe_view.default: lambda e, node: e.op("Reshape", operand(node), Arguments(node).integers("size")),
        aten.reshape.default: lambda e, node: e.op("Reshape", operand(node), Arguments(node).integers("shape")),
        aten.permute.default: lambda e, node: e.op("Transpose", operand(node), perm=order_of(node) or []),
        aten.transpose.int: lambda e, node: e.op("Transpose", operand(node), perm=order_of(node) or []),
        aten.unsqueeze.default: lambda e, node: e.op("Unsqueeze", operand(node), [Arguments(node).dim(node)]),
        aten.expand.default: lambda e, node: e.op(
            "Expand", operand(node), [1 if size == -1 else size for size in Arguments(node).integers("size")]
        ),
        aten.select.int: lambda e, node: e.op(
            "Gather",
            operand(node),
            e.int_scalar(Arguments(node).integer("index")),
            axis=Arguments(node).dim(operand(node)),
        ),
        aten.addmm.default: lambda e, node: e.op(
            "Add", e.op("MatMul", operand(node, 1), operand(node, 2)), operand(node)
        ),
    }
)
CONVOLUTIONS: dict[Target, str] = {
    aten.conv1d.default: "Conv",
    aten.conv2d.default: "Conv",
    aten.conv3d.default: "Conv",
    aten.conv_transpose1d.default: "ConvTranspose",
    aten.conv_transpose2d.input: "ConvTranspose",
    aten.conv_transpose3d.input: "ConvTranspose",
}
REDUCE: dict[Target, str] = {
    aten.mean.dim: "ReduceMean",
    aten.sum.dim_IntList: "ReduceSum",
    aten.amax.default: "ReduceMax",
    aten.amin.default: "ReduceMin",
}


@translates(*CONVOLUTIONS)
def _convolution(e: Emitter, node: Node) -> ir.Value:
    conv, name = ConvArgs.of(node), CONVOLUTIONS[node.target]
    more: dict[str, Attribute] = {"output_padding": conv.output_padding} if name == "ConvTranspose" else {}
    return e.op(
        name,
        conv.x,
        conv.weight,
        conv.bias,
        kernel_shape=conv.kernel,
        strides=conv.stride,
        pads=conv.padding * 2,
        **more,
        dilations=conv.dilation,
        group=conv.groups,
    )


@translates(aten.linear.default)
def _linear(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    x, weight, bias = given.tensor("input"), given.tensor("weight"), given.optional("bias")
    if rank_of(x) == 2:
        return e.op("Gemm", x, weight, bias, transB=1)
    product = e.op("MatMul", x, e.transposed(weight))
    return product if bias is None else e.op("Add", product, bias)


@translates(aten.cat.default)
def _cat(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    parts = given.tensors("tensors")
    return e.value(parts[0]) if len(parts) == 1 else e.op("Concat", *parts, axis=given.dim(node))


@translates(aten.slice.Tensor)
def _slice(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    start = 0 if given.given("start") is None else given.integer("start")
    end = 2**62 if given.given("end") is None else given.integer("end")
    return e.op("Slice", given.tensor(), [start], [end], [given.dim(node)], [given.integer("step")])


@translates(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(e: Emitter, node: Node) -> ir.Value:
    x = operand(node)
    dims = [d for d in Arguments(node).dims(x) if shape_of(x)[d] == 1]
    return e.op("Squeeze", x, dims) if dims else e.value(x)


@translates(aten.repeat.default)
def _repeat(e: Emitter, node: Node) -> ir.Value:
    x, counts = operand(node), Arguments(node).integers("repeats")
    missing = len(counts) - rank_of(x)
    return e.op("Tile", e.op("Unsqueeze", x, range(missing)) if missing else x, counts)


@translates(expand_batch)
def _expand_batch(e: Emitter, node: Node) -> ir.Value:
    x_dim, like_dim = whole(node, 2), whole(node, 3)
    size = e.op("Shape", operand(node, 1), start=like_dim, end=like_dim + 1)
    parts = [size if d == x_dim else e.ints([1]) for d in range(rank_of(node))]
    return e.op("Expand", operand(node), e.op("Concat", *parts, axis=0) if len(parts) > 1 else size)


@translates(*REDUCE)
def _reduce(e: Emitter, node: Node) -> ir.Value:
    x, dims, keep = reduced(node)
    if node.target is aten.mean.dim and rank_of(x) == 4 and sorted(dims) == [2, 3]:
        pooled = e.op("GlobalAveragePool", x)  # stays in the runtime's blocked layout
        return pooled if keep else e.op("Squeeze", pooled, [2, 3])
    return e.op(REDUCE[node.target], x, dims, keepdims=int(keep))


@translates(*DIMS)
def _pool(e: Emitter, node: Node) -> ir.Value | None:
    pool = PoolArgs.of(node)
    if rank_of(node) != len(pool.kernel) + 2:
        return None
    slides: dict[str, Attribute] = {"kernel_shape": pool.kernel, "pads": pool.padding * 2, "strides": pool.stride}
    if not pool.average:
        return e.op("MaxPool", pool.x, **slides, dilations=pool.dilation, ceil_mode=int(pool.ceil))
    if pool.ceil or pool.divisor is not None:
        return None
    return e.op("AveragePool", pool.x, **slides, count_include_pad=int(pool.count_pad))


@translates(aten.layer_norm.default)
def _layer_norm(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    shape = given.integers("normalized_shape")
    scale = given.optional("weight") or e.filled(shape, 1.0, node)
    x, bias = given.tensor("input"), given.optional("bias")
    return e.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=given.number("eps"))


@translates(aten.constant_pad_nd.default)
def _pad(e: Emitter, node: Node) -> ir.Value:
    given = Arguments(node)
    flat, fill = given.integers("pad"), given.number("value")
    beside = [0] * (rank_of(node) - len(flat) // 2)
    if fill == 0 and node.meta["val"].is_floating_point() and any(u.target in DIMS for u in node.users):
        # ONNX Runtime moves a pad with zeros into a pool behind it: a max pool pads with minus infinity, and no pool
        # takes as much as its kernel.
        fill = torch.finfo(node.meta["val"].dtype).tiny
    return e.op("Pad", given.tensor(), _each_dim(flat, beside), e.scalar(fill, node))


def _each_dim(flat: list[int], beside: list[int]) -> list[int]:
    """Lists what is added in front of each dim, and then what is added behind each, as ONNX has it."""
    return [*beside, *flat[-2::-2], *beside, *flat[::-2]]


@translates(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
@translates(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def _pad_with_copies(e: Emitter, node: Node) -> ir.Value:
    flat = Arguments(node).integers("padding")
    pads = _each_dim(flat, [0] * (rank_of(node) - len(flat) // 2))
    return e.op("Pad", operand(node), pads, mode="reflect" if "reflection" in str(node.target) else "edge")


def _windows(e: Emitter, x: Node | ir.Value, dim: int, first: list[int], inside: list[int]) -> ir.Value:
    """Puts two dims in the place of one: where each window begins, and the places in it."""
    index = np.add.outer(np.array(first, np.int64), np.array(inside, np.int64))
    name = "_".join(map(str, [*first[:2], len(first), *inside[:2], len(inside)]))
    return e.op("Gather", x, e.initializer(f"windows.{name}", index), axis=dim)


@translates(aten.unfold.default)
def _unfold(e: Emitter, node: Node) -> ir.Value:
    given, x = Arguments(node), operand(node)
    dim, size, step = given.dim(x, "dimension"), given.integer("size"), given.integer("step")
    rest = [d for d in range(rank_of(node)) if d != dim + 1]
    windows = _windows(e, x, dim, list(range(0, shape_of(x)[dim] - size + 1, step)), list(range(size)))
    return e.op("Transpose", windows, perm=[*rest, dim + 1]) if dim + 2 < rank_of(node) else windows


@translates(aten.im2col.default)
def _columns(e: Emitter, node: Node) -> ir.Value | None:
    given, x = Arguments(node), operand(node)
    if rank_of(x) != 4:
        return None
    kernel, dilation, padding, stride = (given.integers(n, 2) for n in ("kernel_size", "dilation", "padding", "stride"))
    value: Node | ir.Value = x
    if any(padding):
        value = e.op("Pad", x, [0, 0, *padding, 0, 0, *padding], e.scalar(0, node))
    for i in (1, 0):  # the width first: the height stays where it is
        length = shape_of(x)[2 + i] + 2 * padding[i]
        first = range(0, length - dilation[i] * (kernel[i] - 1), stride[i])
        value = _windows(e, value, 2 + i, list(first), list(range(0, dilation[i] * kernel[i], dilation[i])))
    columns = e.op("Transpose", value, perm=[0, 1, 3, 5, 2, 4])
    return e.op("Reshape", columns, [-1, *shape_of(node)[1:]])


@translates(aten.matmul.default)
def _product(e: Emitter, node: Node) -> ir.Value:
    """Writes vectors as matrices of one row or column.

    ONNX Runtime makes one operator of a transpose and a product with a vector, which gives other numbers (1.31).
    """
    a, b = e.pair(node)
    row, column = (rank_of(operand(node, i)) == 1 for i in range(2))
    a = e.op("Unsqueeze", a, [0]) if row else a
    b = e.op("Unsqueeze", b, [1]) if column else b
    product = e.op("MatMul", a, b)
    alone = [*([-2] if row else []), *([-1] if column else [])]
    return e.op("Squeeze", product, alone) if alone else product
