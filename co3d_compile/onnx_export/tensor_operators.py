"""From ATen operators to ONNX operators: one entry per operator that a step graph is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from co3d_compile.ir.markers import expand_batch
from co3d_compile.ir.node_reading import argument, norm_dims, rank_of, shape_of, spread
from co3d_compile.onnx_export.emitter import translates

if TYPE_CHECKING:
    import onnx_ir as ir

    from co3d_compile.onnx_export.emitter import Emitter

aten = torch.ops.aten
REDUCE = {
    aten.mean.dim: "ReduceMean",
    aten.sum.dim_IntList: "ReduceSum",
    aten.amax.default: "ReduceMax",
    aten.amin.default: "ReduceMin",
}
MAX_POOLS = {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default}


@translates(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _conv(e: Emitter, node: Node) -> ir.Value:
    weight = node.args[1]
    assert isinstance(weight, Node)
    n = len(shape_of(weight)) - 2
    padding = spread(argument(node, 4, "padding", 0), n)
    return e.op(
        "Conv",
        *(e.value(a) if a is not None else None for a in (node.args[0], weight, argument(node, 2, "bias"))),
        kernel_shape=list(shape_of(weight)[2:]),
        strides=spread(argument(node, 3, "stride", 1), n),
        pads=[*padding, *padding],
        dilations=spread(argument(node, 5, "dilation", 1), n),
        group=argument(node, 6, "groups", 1),
    )


@translates(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(e: Emitter, node: Node) -> ir.Value:
    weight = node.args[1]
    assert isinstance(weight, Node)
    n = len(shape_of(weight)) - 2
    padding = spread(argument(node, 4, "padding", 0), n)
    return e.op(
        "ConvTranspose",
        *(e.value(a) if a is not None else None for a in (node.args[0], weight, argument(node, 2, "bias"))),
        kernel_shape=list(shape_of(weight)[2:]),
        strides=spread(argument(node, 3, "stride", 1), n),
        pads=[*padding, *padding],
        output_padding=spread(argument(node, 5, "output_padding", 0), n),
        dilations=spread(argument(node, 7, "dilation", 1), n),
        group=argument(node, 6, "groups", 1),
    )


@translates(aten.linear.default)
def _linear(e: Emitter, node: Node) -> ir.Value:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if rank_of(x) == 2:  # type: ignore[arg-type]
        inputs = [e.value(a) for a in (x, weight, bias) if a is not None]
        return e.op("Gemm", *inputs, transB=1)
    product = e.op("MatMul", e.value(x), e.transposed(weight))
    return product if bias is None else e.op("Add", product, e.value(bias))


@translates(aten.addmm.default)
def _addmm(e: Emitter, node: Node) -> ir.Value:
    bias, a, b = (e.value(x) for x in node.args[:3])
    return e.op("Add", e.op("MatMul", a, b), bias)


@translates(aten.cat.default)
def _cat(e: Emitter, node: Node) -> ir.Value:
    parts: Any = node.args[0]
    if len(parts) == 1:
        return e.value(parts[0])
    return e.op("Concat", *(e.value(p) for p in parts), axis=argument(node, 1, "dim", 0) % rank_of(node))


@translates(aten.slice.Tensor)
def _slice(e: Emitter, node: Node) -> ir.Value:
    x, dim, start, end, step = (
        argument(node, i, n, d)
        for i, n, d in ((0, "self", None), (1, "dim", 0), (2, "start", 0), (3, "end", None), (4, "step", 1))
    )
    end = 2**62 if end is None else end
    axes = [dim % rank_of(node)]
    return e.op("Slice", e.value(x), e.ints([start or 0]), e.ints([end]), e.ints(axes), e.ints([step]))


@translates(aten.select.int)
def _select(e: Emitter, node: Node) -> ir.Value:
    x, dim, index = node.args
    return e.op("Gather", e.value(x), e.int_scalar(index), axis=dim % rank_of(x))  # type: ignore


@translates(aten.index_select.default)
def _index_select(e: Emitter, node: Node) -> ir.Value:
    x, dim, index = node.args
    return e.op("Gather", e.value(x), e.value(index), axis=dim % rank_of(x))  # type: ignore


@translates(aten.embedding.default)
def _embedding(e: Emitter, node: Node) -> ir.Value:
    return e.op("Gather", e.value(node.args[0]), e.value(node.args[1]), axis=0)


@translates(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(e: Emitter, node: Node) -> ir.Value:
    sizes: Any = node.args[1]
    return e.op("Reshape", e.value(node.args[0]), e.ints(sizes))


@translates(aten.permute.default)
def _permute(e: Emitter, node: Node) -> ir.Value:
    return e.op("Transpose", e.value(node.args[0]), perm=norm_dims(node.args[1], rank_of(node)))  # type: ignore


@translates(aten.transpose.int, aten.t.default)
def _transpose(e: Emitter, node: Node) -> ir.Value:
    rank = rank_of(node)
    a, b = (d % rank for d in (argument(node, 1, "dim0", 0), argument(node, 2, "dim1", 1)))
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return e.op("Transpose", e.value(node.args[0]), perm=order)


@translates(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(e: Emitter, node: Node) -> ir.Value:
    x = node.args[0]
    dims = [d for d in norm_dims(node.args[1], rank_of(x)) if shape_of(x)[d] == 1]  # type: ignore
    return e.op("Squeeze", e.value(x), e.ints(dims)) if dims else e.value(x)


@translates(aten.unsqueeze.default)
def _unsqueeze(e: Emitter, node: Node) -> ir.Value:
    return e.op("Unsqueeze", e.value(node.args[0]), e.ints([node.args[1] % rank_of(node)]))  # type: ignore


@translates(aten.expand.default)
def _expand(e: Emitter, node: Node) -> ir.Value:
    sizes: Any = node.args[1]
    return e.op("Expand", e.value(node.args[0]), e.ints([1 if s == -1 else s for s in sizes]))


@translates(aten.repeat.default)
def _repeat(e: Emitter, node: Node) -> ir.Value:
    counts: Any = node.args[1]
    x = e.value(node.args[0])
    missing = len(counts) - rank_of(node.args[0])  # type: ignore[arg-type]
    if missing:
        x = e.op("Unsqueeze", x, e.ints(list(range(missing))))
    return e.op("Tile", x, e.ints(counts))


@translates(expand_batch)
def _expand_batch(e: Emitter, node: Node) -> ir.Value:
    x, like, x_dim, like_dim = node.args
    size = e.op("Shape", e.value(like), start=like_dim, end=like_dim + 1)  # type: ignore[operator]
    rank = rank_of(node)
    parts = [size if d == x_dim else e.ints([1]) for d in range(rank)]
    return e.op("Expand", e.value(x), e.op("Concat", *parts, axis=0) if rank > 1 else size)


@translates(*REDUCE)
def _reduce(e: Emitter, node: Node) -> ir.Value:
    x = node.args[0]
    dims = norm_dims(argument(node, 1, "dim"), rank_of(x))  # type: ignore[arg-type]
    keep = bool(argument(node, 2, "keepdim", False))
    if node.target is aten.mean.dim and rank_of(x) == 4 and sorted(dims) == [2, 3]:  # type: ignore[arg-type]
        pooled = e.op("GlobalAveragePool", e.value(x))  # stays in the runtime's blocked layout
        return pooled if keep else e.op("Squeeze", pooled, e.ints([2, 3]))
    return e.op(REDUCE[node.target], e.value(x), e.ints(dims), keepdims=int(keep))  # type: ignore[index]


@translates(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(e: Emitter, node: Node) -> ir.Value | None:
    n = int(str(node.target).split("pool")[1][0])
    ceil, count, divisor = (
        argument(node, 4, "ceil_mode", False),
        argument(node, 5, "count_include_pad", True),
        argument(node, 6, "divisor_override"),
    )
    if divisor is not None or ceil or rank_of(node) != n + 2:
        return None
    kernel = spread(node.args[1], n)
    padding = spread(argument(node, 3, "padding", 0), n)
    return e.op(
        "AveragePool",
        e.value(node.args[0]),
        kernel_shape=kernel,
        pads=[*padding, *padding],
        strides=spread(argument(node, 2, "stride") or kernel, n),
        count_include_pad=int(count),
    )


@translates(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def _max_pool(e: Emitter, node: Node) -> ir.Value | None:
    n = int(str(node.target).split("pool")[1][0])
    if rank_of(node) != n + 2:
        return None
    kernel = spread(node.args[1], n)
    padding = spread(argument(node, 3, "padding", 0), n)
    return e.op(
        "MaxPool",
        e.value(node.args[0]),
        kernel_shape=kernel,
        pads=[*padding, *padding],
        strides=spread(argument(node, 2, "stride") or kernel, n),
        dilations=spread(argument(node, 4, "dilation", 1), n),
        ceil_mode=int(argument(node, 5, "ceil_mode", False)),
    )


@translates(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def _softmax(e: Emitter, node: Node) -> ir.Value:
    name = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return e.op(name, e.value(node.args[0]), axis=node.args[1])


@translates(aten.layer_norm.default)
def _layer_norm(e: Emitter, node: Node) -> ir.Value:
    shape: Any = node.args[1]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    scale = e.value(weight) if weight is not None else e.filled(shape, 1.0, node)
    inputs = [e.value(node.args[0]), scale, *([e.value(bias)] if bias is not None else [])]
    return e.op("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(argument(node, 4, "eps", 1e-5)))


@translates(aten.constant_pad_nd.default)
def _pad(e: Emitter, node: Node) -> ir.Value:
    flat: Any = node.args[1]
    rank = rank_of(node)
    pads = [(0, 0)] * (rank - len(flat) // 2) + [(flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2)]
    fill = argument(node, 2, "value", 0)
    if fill == 0 and node.meta["val"].is_floating_point() and any(u.target in MAX_POOLS for u in node.users):
        # ONNX Runtime moves a pad with zeros into a max pool behind it, where it pads with minus infinity.
        fill = torch.finfo(node.meta["val"].dtype).tiny
    value = e.scalar(fill, node)
    return e.op("Pad", e.value(node.args[0]), e.ints([a for a, _ in pads] + [b for _, b in pads]), value)
